"""Real layers in full size, at batch 32 and 256: wide products, second tiles, gradients in chunks, statistics over
thousands of rows.

The truth cannot be held for a whole batch of 256 in many processes at once, so plain PyTorch computes it, and eager's
own result, in parts: some of the images, where gradients of weights are summed over the parts, or for BatchNorm, whose
statistics need every image, some of the channels. It is float64 beside float32, and float32 beside 16 bits, whose
rounding is a thousand times coarser.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, backends
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_cnn import _library
from fused_cnn._trees import leaves_of
from fused_cnn.ops._cases import Case, Maker, OpCases
from fused_cnn.testing import Comparison, _same_side_of_the_kink, all_cases, judge

pytestmark = [
    pytest.mark.full_size,
    pytest.mark.xdist_group("full_size"),
    pytest.mark.usefixtures("nan_filled_memory", "freed_memory"),
]

GPU = DEVICE == "cuda"
IMAGES = 32 if GPU else 1  # in a part
RUNS = (  # batch and dtype
    [(32, torch.float32), *((n, d) for n in (32, 256) for d in (torch.bfloat16, torch.float16))]
    if GPU
    else [(2, torch.float32)]
)
LAYERS = {  # of each op the largest and the most different; of one that is not here every real layer
    "add_relu": ("resnet50 layer1", "resnet50 layer4"),
    "bn_relu": ("resnet50 conv1 training", "resnet50 layer2 conv2 eval", "resnet50 layer4 conv2 training"),
    "bn_add_relu": ("resnet50 layer1 training", "resnet50 layer2 downsample training", "resnet50 layer4 eval"),
    "bn_relu_concat": ("googlenet 3a training", "googlenet 5b training"),
    "concat_bias_relu": ("googlenet 3b", "googlenet 5b"),
    "conv1x1_bias_relu": (
        "resnet50 layer1 conv1", "resnet50 layer1 conv3", "resnet50 layer2 downsample", "resnet50 layer4 conv3",
        "googlenet 4a reduce5x5",
    ),
    "conv_bias_relu": ("googlenet stem 7x7", "resnet50 layer2 conv2 stride 2", "resnet18 layer1 conv2",
    "googlenet_paper 4a 5x5"),
    "inception": ("googlenet 3b", "googlenet 5b"),
    "max_pool2d": ("resnet50 maxpool", "googlenet 4a branch4"),
}  # fmt: skip


@pytest.fixture
def freed_memory() -> Iterator[None]:
    """What a test held is the other processes' to use."""
    yield
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()


class _Maker(Maker):
    """Knows which tensors are a batch of images."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(dtype, device=DEVICE, **options)
        self.images: list[Tensor] = []

    def activation(self, *shape: int) -> Tensor:
        self.images.append(super().activation(*shape))
        return self.images[-1]


@dataclass(frozen=True)
class Part:
    """A piece of the work that can be done by itself."""

    inputs: Any  # the op's positional and keyword arguments, of which it takes
    # (one of them, that or its gradient) -> what belongs to this part; all of it if it is shared.
    cut: Callable[[Tensor, Tensor], Tensor]
    out: Callable[[Tensor], Tensor]  # the result or its gradient -> what belongs to this part


def piece(i: int, count: int, t: Tensor, dim: int) -> Tensor:
    begin, end = (t.size(dim) * k // count for k in (i, i + 1))
    return t.narrow(dim, begin, end - begin)


def parts_of(case: Case, inputs: Any, images: list[Tensor]) -> Iterator[Part]:
    count = max(1, case.shape[0] // IMAGES)
    if "training" not in case.options:
        for i in range(count):
            take = partial(piece, i, count)
            yield Part(
                inputs,
                lambda t, v, take=take: take(v, 0) if any(t is x for x in images) else v,
                lambda v, take=take: take(v, 0),
            )
    elif "channels" not in case.options:
        for i in range(count):
            take = partial(piece, i, count)
            yield Part(
                inputs, lambda t, v, take=take: take(v, 1 if t.dim() == 4 else 0), lambda v, take=take: take(v, 1)
            )
    else:  # a branch at a time
        (xs, norms), options = inputs
        first = 0
        for x, norm in zip(xs, norms, strict=True):
            place = (1, first, x.size(1))
            yield Part((([x], [norm]), options), lambda _, v: v, lambda v, place=place: v.narrow(*place))
            first += x.size(1)


def reference(op_cases: OpCases, part: Part, dtype: torch.dtype | None, grad_out: Tensor | None = None) -> list[Tensor]:
    """Plain PyTorch on a part, in `dtype` or the inputs' own: its result, or given grad_out the gradients of the inputs
    that want one."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = part.cut(leaf, leaf).detach().clone()
        return copy.to(dtype or leaf.dtype).requires_grad_(leaf.requires_grad and grad_out is not None)

    args, kwargs = inputs = pytree.tree_map(own, part.inputs)
    out = op_cases.op(*args, **kwargs, backend="reference")
    if grad_out is None:
        return [out]
    return list(torch.autograd.grad(out, leaves_of(inputs), grad_out.to(out.dtype)))


def compare_in_parts(op_cases: OpCases, case: Case, backend: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """fused_cnn.testing.compare, with the truth and eager computed in parts."""
    maker = _Maker(dtype)
    args, kwargs = inputs = op_cases.make(case, maker)
    parts = list(parts_of(case, inputs, maker.images))
    truth_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    hold = partial(judge, rounding=op_cases.rounding, summation=op_cases.summation, dtype=dtype)
    out = op_cases.op(*args, **kwargs, backend=backend)
    grad_out = _Maker(dtype, seed=1, grad=False).activation(*out.shape)
    for part in parts:
        (truth,), (eager,) = (reference(op_cases, part, d) for d in (truth_dtype, None))
        yield hold("out", part.out(out), eager, truth, factor=2.0)
        _same_side_of_the_kink(part.out(grad_out), [truth, eager, part.out(out)])
    leaves = leaves_of(inputs)
    found = dict(zip(map(id, leaves), torch.autograd.grad(out, leaves, grad_out), strict=True))
    shared = {}  # gradients of what every part reads: their sums so far
    for part in parts:
        truths, eagers = (reference(op_cases, part, d, part.out(grad_out)) for d in (truth_dtype, None))
        for leaf, truth, eager in zip(leaves_of(part.inputs), truths, eagers, strict=True):
            mine = found[id(leaf)]
            if part.cut(leaf, mine) is not mine or len(parts) == 1:
                yield hold("grad", part.cut(leaf, mine), eager, truth, factor=3.0)
                continue
            sums = shared.get(id(leaf), (0, 0))
            shared[id(leaf)] = tuple(s + g.double() for s, g in zip(sums, (eager, truth), strict=True))
    for i, (eager, truth) in shared.items():
        yield hold("grad of all", found[i], eager, truth, factor=3.0)


def sized(case: Case, batch: int) -> Case:
    n, c, h, w = case.batched(batch).shape
    return Case(case.name, (n, c, h, w) if GPU else (n, c, min(h, 7), min(w, 7)), case.options, case.real)


def every_run() -> Iterator[object]:
    for op_cases in all_cases():
        cases = {case.name: case for case in op_cases.cases}
        for backend in backends() if GPU else ["native"]:
            if _library.has_kernel(op_cases.decides, backend, DEVICE):
                for name in LAYERS.get(op_cases.name) or [case.name for case in op_cases.cases if case.real]:
                    for batch, dtype in RUNS:
                        label = f"{op_cases.name}-{backend}-{name}-{batch}-{str(dtype)[6:]}".replace(" ", "_")
                        yield pytest.param(op_cases, sized(cases[name], batch), backend, dtype, id=label)


@pytest.mark.parametrize(("op_cases", "case", "backend", "dtype"), list(every_run()))
def test_real_layers_agree_with_the_truth(op_cases: OpCases, case: Case, backend: str, dtype: torch.dtype) -> None:
    for comparison in compare_in_parts(op_cases, case, backend, dtype):
        assert comparison.ok, comparison


def less_gradient(t: Tensor) -> Tensor:
    return t * 0.99 + (t * 0.01).detach()


BREAKS = {
    "an image": ("conv1x1_bias_relu", lambda op, x, *rest, **o: op(torch.cat([x[:-1], x[-1:] * 1.01]), *rest, **o)),
    "a sum": ("conv1x1_bias_relu", lambda op, x, weight, *rest, **o: op(x, less_gradient(weight), *rest, **o)),
    "a channel": (
        "bn_relu",
        lambda op, x, bn, **o: op(x, bn._replace(bias=torch.cat([bn.bias[:-1], bn.bias[-1:] + 0.01])), **o),
    ),
    "a gradient in a branch": (
        "bn_relu_concat",
        lambda op, xs, norms, **o: op([*xs[:-1], less_gradient(xs[-1])], norms, **o),
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_wrong_in_one_part_is_found(what: str) -> None:
    name, wrong = BREAKS[what]
    right = next(o for o in all_cases() if o.name == name)

    def op(*args: Any, **kwargs: Any) -> Tensor:
        return right.op(*args, **kwargs) if kwargs["backend"] == "reference" else wrong(right.op, *args, **kwargs)

    case = next(c for c in right.cases if c.name == LAYERS[name][0])
    found = list(
        compare_in_parts(
            replace(right, op=op), Case("small", (2, case.shape[1], 7, 7), case.options), "native", torch.float32
        )
    )
    assert not all(comparison.ok for comparison in found)
