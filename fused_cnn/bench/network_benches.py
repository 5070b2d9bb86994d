"""Whole networks, timed: torchvision's, in inference and in training steps, eager and fused, against every peer at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis import count, minimum_traffic, saved_bytes
from ..measure import Work
from . import _kernels, _memory, _networks, _peers
from ._benches import Bench, Prepared, short
from ._numbers import LARGEST, Autocast, Pair, compare_scores, compare_training, scores, training_step

TRAINING_CHECK = (2, 96)  # images and pixels: float64 gradients in full size take minutes


def network_benches(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    *,
    device: str,
    passes: Sequence[str] = ("inference", "training step"),
    backend: str | None = None,
    compilers: Sequence[str] = (),
    size: int = 224,
) -> Iterator[NetworkBench]:
    """torchvision's networks with their BatchNorm statistics made real: inference at every batch, and a
    training step at the largest; a training step in a 16-bit dtype is float32 under autocast.
    """
    for direction in passes:
        for dtype in dtypes:
            for batch in batches if direction == "inference" else [max(batches)]:
                for name in names:
                    yield NetworkBench(dtype, device, backend, tuple(compilers), name, batch, direction, size)


@dataclass(frozen=True)
class NetworkBench(Bench):
    """A network's inference or training step."""

    model: str
    batch: int
    direction: str
    size: int

    kind = "model"

    @property
    def labels(self) -> dict[str, Any]:
        return {"model": self.model, "batch": self.batch, "dtype": short(self.dtype), "pass": self.direction}

    @property
    def room(self) -> str:
        return self.name  # each row has a process of its own

    @property
    def training(self) -> bool:
        return self.direction != "inference"

    def prepared(self, batch: int, size: int) -> tuple[Pair, Tensor]:
        """The network, eager and fused, and images; to train, in float32 under autocast where the dtype has 16 bits."""
        numbers = (len(_networks.PHOTOGRAPHS), batch)
        every, images = (_networks.photographs(_networks.PHOTOGRAPHS, n, size).to(self.device) for n in numbers)
        network = _networks.network(self.model, every)
        if not self.training:
            return Pair.of(network.to(self.dtype), self.backend), images.to(self.dtype)
        pair = Pair.of(network, self.backend).training()
        if self.dtype != torch.float32:
            pair = Pair(Autocast(pair.eager, self.dtype), Autocast(pair.fused, self.dtype), pair.report)
        return pair, images

    def check(self) -> None:
        few, pixels = TRAINING_CHECK
        pair, images = self.prepared(few, pixels if self.training else self.size)
        numbers = compare_training(pair, images, in_float64=False)[0] if self.training else [compare_scores(pair, images)[0]]
        wrong = [n for n in numbers if not n.ok]
        assert not wrong, f"{self.model}, {short(self.dtype)}, {self.direction}: {wrong[0]}"

    def make(self) -> Prepared:
        pair, images = self.prepared(self.batch, self.size)
        models = {"eager": pair.eager, "fused": pair.fused}
        variants = {variant: self.work(model, images) for variant, model in models.items()}
        plain = pair.eager.model if isinstance(pair.eager, Autocast) else pair.eager
        least = minimum_traffic(copy.deepcopy(plain).to(self.dtype), images.to(self.dtype), backward=self.training).bytes
        counted, flops = self._counted(models, images)
        work = Prepared(variants, least, flops, counted)
        peers: dict[str, Callable[[], Work]] = {} if self.training else {**_peers.runtimes(pair.eager, images)}
        peers |= {name: partial(self.compiled, name, models, images) for name in self.compilers}
        work.add_peers(peers, LARGEST[self.dtype])
        if self.device == "cuda":
            counted["launches"] = {variant: _kernels.launches(each, self.device) for variant, each in variants.items()}
            counted["peak"] = {variant: _memory.peak_on_gpu(model, variants[variant]) for variant, model in models.items()}
            graphs = {"fused graph": "fused", "graph": "eager"}
            work.captures = {name: partial(_peers.graphed, variants[of]) for name, of in graphs.items()}
        else:
            counted["peak"] = _memory.peaks_in_children({variant: partial(self.variant, variant) for variant in models})
        return work

    def work(self, model: nn.Module, images: Tensor) -> Work:
        if self.training:
            return lambda: scores(training_step(model, images)).detach()  # nothing is kept of its graph
        return torch.no_grad()(lambda: model(images))

    def compiled(self, name: str, models: Mapping[str, nn.Module], images: Tensor) -> Work:
        """One of _peers.COMPILERS over the eager or the fused network."""
        peer = _peers.COMPILERS[name]
        return _peers.compiled(models[peer.of], peer.mode, lambda model: self.work(model, images), frozen=not self.training)

    def variant(self, name: str) -> Work:
        """One variant by itself: eager, fused or one of _peers.COMPILERS."""
        pair, images = self.prepared(self.batch, self.size)
        models = {"eager": pair.eager, "fused": pair.fused}
        return self.compiled(name, models, images) if name in _peers.COMPILERS else self.work(models[name], images)

    def _counted(self, models: Mapping[str, nn.Module], images: Tensor) -> tuple[dict[str, Any], int]:
        """What is counted at the dispatcher, with the CPU kernels' costs: launches, bytes moved, ops that it does not know; for a
        training step bytes kept for its backward; and the eager network's operations.
        """
        works = {variant: self.work(model, images) for variant, model in models.items()}
        for work in works.values():
            work()  # folds and packs
        counts = {variant: count(work) for variant, work in works.items()}
        found: dict[str, Any] = {}
        if self.device == "cpu":
            found["launches"] = {variant: c.launches for variant, c in counts.items()}
            found["traffic"] = {variant: c.bytes for variant, c in counts.items()}
            found["unknown"] = {variant: c.unknown for variant, c in counts.items() if c.unknown}
        if self.training:
            found["saved"] = {variant: saved_bytes(model, images) for variant, model in models.items()}
        return found, counts["eager"].flops
