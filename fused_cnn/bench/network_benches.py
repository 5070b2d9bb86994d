"""Whole networks, timed: torchvision's, in inference and in training steps, eager, fused, in inference optimized, and
every peer at hand."""

from __future__ import annotations

import copy
import gc
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..analysis import count, minimum_traffic, saved_bytes
from ..measure import Work, graphed, interleaved
from ..plan.export import package
from ..plan.optimized import OptimizedModel, optimize
from . import networks, peers
from .benches import Bench, Makers, Prepared
from .ceilings import short
from .numbers import LARGEST, Autocast, Pair, compare_scores, compare_training, work
from .profiling import host, kernels, peak_on_gpu, peaks_in_children
from .results import PASSES, Row

MODELS = ("googlenet", "resnet50")
PACKAGE = "fused package"
DEPLOYED = ("fused dynamic", PACKAGE)  # inference alone
MOST_KERNELS = 45  # of a profile
TRAINING_CHECK = (2, 96)  # images and pixels: float64 gradients in full size take minutes


def network_benches(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batches: Sequence[int],
    passes: Iterable[str] = PASSES.values(),
    **of: Any,
) -> Iterator[NetworkBench]:
    """torchvision's networks with their BatchNorm statistics made real: inference at every batch, and a training step
    at the largest; a training step in a 16-bit dtype is float32 under autocast. `of` is what the benches have in
    common."""
    for direction, dtype in itertools.product(passes, dtypes):
        for batch, name in itertools.product(batches if direction == "inference" else [max(batches)], names):
            yield NetworkBench(model=name, batch=batch, dtype=dtype, direction=direction, **of)


@dataclass(frozen=True, kw_only=True)
class NetworkBench(Bench):
    """A network's inference or training step."""

    model: str
    batch: int
    direction: str
    size: int = 224

    kind = "model"

    @property
    def labels(self) -> Row:
        return {"model": self.model, "batch": self.batch, "dtype": short(self.dtype), "pass": self.direction}

    @property
    def training(self) -> bool:
        return self.direction != "inference"

    def prepared(self, batch: int, size: int) -> tuple[Pair, Tensor]:
        """The network, eager and fused, and images; to train, in float32 under autocast where the dtype has 16 bits."""
        each, images = (networks.photographs(n, size).to(self.device) for n in (len(networks.PHOTOGRAPHS), batch))
        network = networks.network(self.model, each)
        if not self.training:
            return Pair.of(network.to(self.dtype), self.backend), images.to(self.dtype)
        pair = Pair.of(network, self.backend).training()
        if self.dtype != torch.float32:
            pair = Pair(Autocast(pair.eager, self.dtype), Autocast(pair.fused, self.dtype), pair.report)
        return pair, images

    def check(self) -> None:
        few, pixels = TRAINING_CHECK
        pair, images = self.prepared(few, pixels if self.training else self.size)
        if self.training:
            numbers, _ = compare_training(pair, images, in_float64=False)
        else:
            # On a GPU a capture that fails would leave the process unfit for what comes after the check.
            others = {"optimized": self.optimized(pair, images)} if self.device == "cpu" else {}
            numbers, _ = compare_scores(pair, images, **others)
        wrong = [n for n in numbers if not n.ok]
        assert not wrong, f"{self.model}, {short(self.dtype)}, {self.direction}: {wrong[0]}"

    def make(self) -> Prepared:
        pair, images = self.prepared(self.batch, self.size)
        variants = pair.works(images)
        if self.device == "cpu" and not self.training:
            variants["optimized"] = work(self.optimized(pair, images), images)
        for each in variants.values():
            each()  # folds and packs
        # At the dispatcher, with the CPU kernels' costs: what a GPU launches is profiled.
        counts = {name: count(each) for name, each in variants.items()}
        plain = copy.deepcopy(pair.eager.model if isinstance(pair.eager, Autocast) else pair.eager).to(self.dtype)
        least = minimum_traffic(plain, images.to(self.dtype), backward=self.training).bytes
        prepared = Prepared(variants, least, counts["eager"].flops)
        counted = prepared.counted
        if self.training:
            counted["saved"] = {name: saved_bytes(model, images) for name, model in pair.models.items()}
        makers: Makers = {} if self.training else peers.runtimes(pair.eager, images)
        wanted = [name for name in self.compilers if not (self.training and name in DEPLOYED)]
        compiled = {name: partial(self.compiled, name, pair, images) for name in wanted}
        prepared.add_peers({**makers, **compiled}, LARGEST[self.dtype])
        if self.device == "cuda":
            counted["launches"] = {name: sum(n for _, n, _ in kernels(v, self.device)) for name, v in variants.items()}
            counted["peak"] = {name: peak_on_gpu(model, variants[name]) for name, model in pair.models.items()}
            graphs = {"fused graph": "fused", "graph": "eager"}
            captures: Makers = {name: partial(graphed, variants[of]) for name, of in graphs.items()}
            plans: Makers = {} if self.training else {"optimized": lambda: work(self.optimized(pair, images), images)}
            prepared.captures = {**plans, **captures}
        else:
            counted["launches"] = {name: c.launches for name, c in counts.items()}
            counted["traffic"] = {name: c.bytes for name, c in counts.items()}
            counted["unknown"] = {name: c.unknown for name, c in counts.items() if c.unknown}
            first_calls: Makers = {name: partial(self.variant, name) for name in pair.models}
            starts: Makers = {} if self.training else {"optimized": self.start}
            counted["peak"] = peaks_in_children({**first_calls, **starts})
        return prepared

    def optimized(self, pair: Pair, images: Tensor) -> OptimizedModel:
        return optimize(pair.eager, images, backend=self.backend)

    def start(self) -> Work:
        """The optimized network's start, which folds, packs and plans, and first call."""
        pair, images = self.prepared(self.batch, self.size)
        return lambda: self.optimized(pair, images)(images)

    def packaged(self, pair: Pair, images: Tensor) -> Work:
        """The optimized network's AOTInductor package, loaded."""
        with tempfile.TemporaryDirectory() as folder:  # what is loaded has been unpacked into another one
            file = package(self.optimized(pair, images), f"{folder}/network.pt2")
            loaded = torch._inductor.aoti_load_package(file)
        return torch.no_grad()(lambda: loaded(images))

    def compiled(self, name: str, pair: Pair, images: Tensor) -> Work:
        """One of peers.COMPILERS over the eager or the fused network, or the package."""
        if name == PACKAGE:
            return self.packaged(pair, images)
        of, options = peers.COMPILERS[name]
        return peers.compiled(pair.models[of], options, partial(work, images=images), frozen=not self.training)

    def variant(self, name: str) -> Work:
        """One variant by itself: eager, fused or one of peers.COMPILERS."""
        pair, images = self.prepared(self.batch, self.size)
        if name in peers.COMPILERS:
            return self.compiled(name, pair, images)
        return work(pair.models[name], images)

    def profile(self, variant: str, seconds: float, with_host: bool) -> Row:
        """A variant's milliseconds a step, how long of these the device was busy and with how many launches, and its
        kernels. `peak` is the most bytes that were allocated on a GPU during a step, weights and images among them."""
        torch.compiler.reset()  # forgets the row before
        step = self.variant(variant)
        gc.collect()  # the other variant's network
        ms = interleaved({variant: step}, self.device, seconds)[variant].median * 1e3
        peak = None
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()  # without what the first ones took to compile, fold and pack
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        found = kernels(step, self.device)
        busy = sum(microseconds for *_, microseconds in found) / 1e3
        launches = sum(n for _, n, _ in found)
        longest = [list(kernel) for kernel in found[:MOST_KERNELS]]
        more = {"host": host(step, self.device)} if with_host else {}
        return {"ms": ms, "peak": peak, "busy_ms": busy, "launches": launches, "kernels": longest, **more}
