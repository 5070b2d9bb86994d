"""Do an eager and a fused network compute the same? Scores, every gradient and every running statistic.

The truth is plain PyTorch in float64, and the contract that of fused_cnn.testing: an error of the fused network is at
most a factor times eager's own error in the same dtype, plus rounding, plus for gradients the kink: an activation that
is zero but for rounding may fall on either side of ReLU, and one that does moves its gradients by its whole share,
which is far more than rounding. Eager's own worst gradient shows how much. Because that term is wide, the same
gradients are also compared in float64, where no activation is so close to zero and the bound is rounding alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..fuse import fuse_
from ..measure import Work
from ..testing import GRAD_FACTOR, OUT_FACTOR, Comparison, bound_of, relative
from .errors import RequestError
from .networks import without_dropout

ROUNDING = 16  # units in the last place of the largest value: sums of thousands of terms, taken in another order
KINK = 0.1  # of the largest value: the least that one activation beyond the kink is allowed to move a gradient
# No scores may be further from the truth than this. Random weights amplify every rounding: in bfloat16 eager ResNet-50
# is itself 0.3 off.
LARGEST = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
FLOAT64_LARGEST = 1e-9


@dataclass
class Pair:
    """The same network twice over copies of the same weights, and what fuse_ said."""

    eager: nn.Module
    fused: nn.Module
    report: Any

    @classmethod
    def of(cls, model: nn.Module, backend: str | None) -> Pair:
        fused = copy.deepcopy(model)
        report = fuse_(fused, backend=backend)
        if not report.fused:
            raise RequestError(f"nothing in {type(model).__name__} can be fused")
        return cls(model, fused, report)

    @property
    def models(self) -> dict[str, nn.Module]:
        return {"eager": self.eager, "fused": self.fused}

    def training(self) -> Pair:
        """Copies in training mode that two runs can be compared on."""
        return Pair(without_dropout(self.eager).train(), without_dropout(self.fused).train(), self.report)

    def works(self, images: Tensor) -> dict[str, Work]:
        return {variant: work(model, images) for variant, model in self.models.items()}


class Autocast(nn.Module):
    """A network under autocast (AMP), as people train in 16 bits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images)


def scores(out: Any) -> Tensor:
    """The class scores: torchvision's networks with auxiliary classifiers return a named tuple in training."""
    return out if isinstance(out, Tensor) else out[0]


def loss(out: Any, labels: Tensor) -> Tensor:
    """Cross-entropy, with 0.3 of each auxiliary classifier's (arXiv 1409.4842, section 5)."""
    auxiliary = [] if isinstance(out, Tensor) else [o for o in out[1:] if o is not None]
    wide = [o if o.dtype == torch.float64 else o.float() for o in (scores(out), *auxiliary)]
    weights = [1.0] + [0.3] * len(auxiliary)
    return torch.stack([w * F.cross_entropy(o, labels) for w, o in zip(weights, wide, strict=True)]).sum()


def training_step(model: nn.Module, images: Tensor) -> Any:
    """Forward, loss and backward; returns what the network returned."""
    model.zero_grad(set_to_none=True)
    out = model(images)
    labels = torch.arange(len(images), device=images.device) * 7 % scores(out).size(1)
    loss(out, labels).backward()
    return out


def work(model: nn.Module, images: Tensor) -> Work:
    """One inference or, of a model in training mode, one training step, of whose graph nothing is kept."""
    if model.training:
        return lambda: scores(training_step(model, images)).detach()
    return torch.no_grad()(lambda: model(images))


def step_results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Scores, gradients and running statistics after one training step of a copy."""
    model = without_dropout(model).train()
    results = {"training scores": scores(training_step(model, images)).detach()}
    results |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def contiguous(model: nn.Module) -> nn.Module:
    """A copy that runs in the other memory layout, by other algorithms: a second sample of eager's own error."""
    other: Any = copy.deepcopy(model)  # whose `to` the stubs of some torch do not know with memory_format alone
    return other.to(memory_format=torch.contiguous_format)


def compare_scores(pair: Pair, images: Tensor, **others: nn.Module) -> tuple[list[Comparison], dict[str, float]]:
    """Scores in eval mode, of fused and of others with the same weights, and how many of the five best classes fused
    shares with eager, and eager with float64."""
    with torch.no_grad():
        truth = copy.deepcopy(pair.eager).double()(images.double())
        eager = pair.eager(images)
        fused = pair.fused(images)
        found = {"scores": fused, **{f"scores, {name}": model(images) for name, model in others.items()}}
        other = contiguous(pair.eager)(images.contiguous())
    eager_error = max(relative(eager, truth), relative(other, truth))
    # The scores' dtype: under autocast the images have another.
    bound = bound_of(eager_error, OUT_FACTOR, ROUNDING * torch.finfo(eager.dtype).eps, LARGEST[eager.dtype])
    numbers = [
        Comparison(name, relative(out, truth), eager_error, bound, relative(out, eager)) for name, out in found.items()
    ]
    return numbers, {"fused_and_eager": top5(fused, eager), "eager_and_float64": top5(eager, truth)}


def top5(a: Tensor, b: Tensor) -> float:
    """The share of each image's five best classes that both have."""
    both = a.topk(5).indices.unsqueeze(2) == b.topk(5).indices.unsqueeze(1)
    return both.any(2).double().mean().item()


def elements_beyond(bound: float, actual: Tensor, truth: Tensor) -> str:
    """How many elements are further off than a bound that is relative to the largest true value."""
    within = (actual.double() - truth).abs() <= bound * truth.abs().max()
    return f"{within.numel() - int(within.sum())} of {within.numel()}"


def compare_training(pair: Pair, images: Tensor, in_float64: bool = True) -> tuple[list[Comparison], list[Comparison]]:
    """Every gradient and running statistic of one training step: in the images' dtype, and with both in float64."""
    truth = step_results(copy.deepcopy(pair.eager).double(), images.double())
    eager = step_results(pair.eager, images)
    other = step_results(contiguous(pair.eager), images.contiguous())
    fused = step_results(pair.fused, images)
    errors = {n: max(relative(eager[n], t), relative(other[n], t)) for n, t in truth.items()}
    gradients = {n for n, _ in pair.eager.named_parameters()} & truth.keys()
    rounding = ROUNDING * torch.finfo(images.dtype).eps
    kink = max([KINK, *(errors[n] for n in gradients)])
    numbers = []
    for n, t in truth.items():
        factor, absolute = (GRAD_FACTOR, kink + rounding) if n in gradients else (OUT_FACTOR, rounding)
        bound = bound_of(errors[n], factor, absolute)
        beyond = elements_beyond(bound_of(errors[n], factor, rounding), fused[n], t)
        numbers.append(Comparison(n, relative(fused[n], t), errors[n], bound, relative(fused[n], eager[n]), beyond))
    if not in_float64:
        return numbers, []
    wide = step_results(copy.deepcopy(pair.fused).double(), images.double())
    distances = {n: relative(wide[n], t) for n, t in truth.items()}
    return numbers, [Comparison(n, d, 0.0, FLOAT64_LARGEST, d) for n, d in distances.items()]
