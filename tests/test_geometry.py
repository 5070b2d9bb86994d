"""Every op's geometry from one pixel up against eager PyTorch: the same shapes and numbers, and refused exactly where
eager refuses. A test takes many sizes, since a call takes microseconds."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, backends
from torch import Tensor, nn

import fused_cnn
from fused_cnn import ops
from fused_cnn._trees import leaves_of, mapped
from fused_cnn.nn import MaxPool2d
from fused_cnn.ops import BatchNormArgs

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(DEVICE != "cpu", reason="geometry of the CPU kernels and of Triton's interpreter"),
]

# The truth is eager in float32. Float32 sums a few hundred products in another order; bfloat16 rounds once or, before a
# bias or a residual, once more, values that are below 8.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-6}}
each_dtype = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
needs_triton = pytest.mark.skipif("triton" not in backends(), reason="Triton is not installed")


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    t = torch.randn(shape).to(dtype)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_(grad)


def outcome(call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    """The result, or None where the call is refused."""
    try:
        return call(*args, **kwargs)
    except (ValueError, RuntimeError):
        return None


def compare(
    actual: Callable[..., Tensor], eager: Callable[..., Tensor], args: tuple[Any, ...], dtype: torch.dtype, what: Any
) -> bool:
    """Whether eager takes these arguments; the other one then gives the same, and gradients too, where any is asked
    for."""
    wide = mapped(lambda t: t.detach().float().requires_grad_(t.requires_grad), args, Tensor)
    out, expected = outcome(actual, *args), outcome(eager, *wide)
    assert (out is None) == (expected is None), f"{what}: eager {'refuses' if expected is None else 'takes'} it"
    if out is None or expected is None:
        return False
    assert out.dtype == dtype
    found, truth = [out], [expected]
    if leaves := leaves_of(args):
        grad = torch.randn(out.shape).masked_fill((out > 0) != (expected > 0), 0.0)  # nothing across ReLU's kink
        found += torch.autograd.grad(out, leaves, grad.to(dtype))
        truth += torch.autograd.grad(expected, leaves_of(wide), grad.to(dtype).float())
    for t, e in zip(found, truth, strict=True):
        if not torch.equal(t.float(), e):  # the comparison that explains itself takes longer than the op
            torch.testing.assert_close(t.float(), e, **CLOSE[dtype], equal_nan=True, msg=lambda m: f"{what}: {m}")
    return True


Pool = tuple[int, int, int, int, bool]  # kernel, stride, padding, dilation, ceil_mode
POOLS: list[Pool] = [
    (kernel, stride, padding, dilation, ceil_mode)
    for kernel in range(1, 6)
    for stride in range(1, 5)
    for padding in range(kernel // 2 + 1)
    for dilation in range(1, 4)
    for ceil_mode in (False, True)
]


def sees_pixels(side: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> bool:
    """Whether every window covers a pixel of the image. Where one does not, in a dilated pool, its result is -inf, and
    eager's index, which its backward writes to, is outside of the image."""
    reach = side + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)
    starts = range(-padding, min(reach + 1, side + padding), stride)
    return all(any(0 <= start + tap * dilation < side for tap in range(kernel)) for start in starts)


def pool_agrees(backend: str, dtype: torch.dtype, shape: tuple[int, ...], window: Pool, grad: bool) -> bool:
    grad = grad and all(sees_pixels(side, *window) for side in shape[2:])
    return compare(
        lambda x: fused_cnn.max_pool2d(x, *window, backend=backend),
        lambda x: F.max_pool2d(x, *window),
        (tensor(*shape, dtype=dtype, grad=grad),),
        dtype,
        (shape, window),
    )


@each_dtype
@pytest.mark.parametrize("height", range(1, 13))
def test_max_pool2d(height: int, dtype: torch.dtype) -> None:
    every = 1 if dtype == torch.float32 else 5  # the dtypes differ in how they load and store
    sizes = itertools.islice(itertools.product(range(1, 13), POOLS), 0, None, every)
    taken = [
        pool_agrees("native", dtype, (1, 17 if n % 16 == 0 else 3, height, width), window, grad=n % 8 == 0)
        for n, (width, window) in enumerate(sizes)
    ]
    assert any(taken) and not all(taken)


@needs_triton
def test_max_pool2d_in_triton() -> None:
    sizes = itertools.product(range(1, 8), range(1, 8), POOLS)
    for n, (height, width, window) in enumerate(itertools.islice(sizes, 0, None, 331)):
        pool_agrees("triton", torch.float32, (1, 3, height, width), window, grad=n % 4 == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_max_pool2d_where_pytorchs_own_pool_runs(dtype: torch.dtype) -> None:
    for side, window in itertools.product((1, 2, 5), POOLS):
        x = torch.randn(1, 3, side, side + 1, dtype=dtype)
        out, expected = outcome(fused_cnn.max_pool2d, x, *window), outcome(F.max_pool2d, x, *window)
        assert (out is None) == (expected is None), (x.shape, window)
        assert out is None or torch.equal(out, expected), (x.shape, window)


WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (2,), "stride": (1,), "padding": (1,), "dilation": (2,)},
    {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]},
    {"kernel_size": (2, 3), "stride": ()},
    {"kernel_size": (2, 3), "stride": []},
    {"kernel_size": 2, "stride": 0},
    {"kernel_size": 0, "stride": 1},
    {"kernel_size": 2, "dilation": 0},
    {"kernel_size": 3, "padding": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": -1},
    {"kernel_size": (2, 3, 4)},
    {"kernel_size": ()},
]
SHAPES = [(2, 3, 5, 5), (0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0), (3, 5, 5), (0, 5, 5), (5, 5)]


@each_dtype
def test_max_pool2d_takes_what_nn_max_pool2d_takes(dtype: torch.dtype) -> None:
    """The module also takes one image without a batch, which the op, of (N, C, H, W) alone, refuses."""
    taken = 0
    for shape, window in itertools.product(SHAPES, WINDOWS):
        x = torch.randn(shape).to(dtype)
        expected = outcome(nn.MaxPool2d(**window), x)
        calls = [MaxPool2d(**window)] + [lambda x, w=window: fused_cnn.max_pool2d(x, **w)] * (len(shape) == 4)
        for call in calls:
            actual = outcome(call, x)
            assert (actual is None) == (expected is None), (shape, window)
            assert actual is None or torch.equal(actual, expected), (shape, window)
        taken += expected is not None
    assert taken == 5 * 3  # five windows, of a batch, of no image and of one image


def convolutions(step: int = 1) -> Iterator[tuple[tuple[int, int], int, dict[str, int]]]:
    """Image, kernel and geometry; without the dilated ones of which a window sees padding alone: oneDNN's, which is
    PyTorch's and through it the native one of a plain weight, ends the process at some of those."""
    sizes = itertools.product(range(1, 10), range(1, 6), range(1, 4), range(4), (1, 2), (1, 3))
    for side, kernel, stride, padding, dilation, groups in itertools.islice(sizes, 0, None, step):
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        size = (side, (3 * side + kernel + stride) % 9 + 1)
        if dilation == 1 or all(sees_pixels(s, kernel, stride, padding, dilation, ceil_mode=False) for s in size):
            yield size, kernel, geometry


def conv_args(size: tuple[int, int], kernel: int, groups: int, dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
    fan_in = 3 // groups * kernel**2
    weight = (torch.randn(6, 3 // groups, kernel, kernel) * fan_in**-0.5).to(dtype).requires_grad_(grad)
    return tensor(2, 3, *size, dtype=dtype, grad=grad), weight, tensor(6, dtype=dtype, grad=grad)


@each_dtype
def test_conv_bias_relu(dtype: torch.dtype) -> None:
    """A plain weight, and packed the one that the engine takes."""
    taken = []
    for n, (size, kernel, geometry) in enumerate(convolutions()):
        # The gradients of a plain weight are oneDNN's; its bfloat16 ones of such small images read memory unwritten.
        args = conv_args(size, kernel, geometry["groups"], dtype, grad=n % 8 == 0 and dtype == torch.float32)

        def packed(x: Tensor, weight: Tensor, bias: Tensor, geometry: dict[str, int] = geometry) -> Tensor:
            how = {name: geometry[name] for name in ("stride", "dilation", "groups")}
            return ops.conv_bias_relu(x, *ops.pack_conv(weight, bias, like=x, **how), **geometry)

        def plain(*t: Tensor, geometry: dict[str, int] = geometry) -> Tensor:
            return ops.conv_bias_relu(*t, **geometry, backend="native")

        def eager(*t: Tensor, geometry: dict[str, int] = geometry) -> Tensor:
            return torch.relu(F.conv2d(*t, **geometry))

        taken.append(compare(plain, eager, args, dtype, (size, kernel, geometry)))
        compare(packed, eager, tuple(t.detach() for t in args), dtype, ("packed", size, kernel, geometry))
    assert any(taken) and not all(taken)


@needs_triton
def test_conv_bias_relu_in_triton() -> None:
    for n, (size, kernel, geometry) in enumerate(convolutions(97)):
        compare(
            lambda *t, geometry=geometry: ops.conv_bias_relu(*t, **geometry, backend="triton"),
            lambda *t, geometry=geometry: torch.relu(F.conv2d(*t, **geometry)),
            conv_args(size, kernel, geometry["groups"], torch.float32, grad=n % 4 == 0),
            torch.float32,
            (size, kernel, geometry),
        )


def inception_args(shape: tuple[int, ...], kernel5: int, dtype: torch.dtype, grad: bool) -> tuple[Any, ...]:
    c = shape[1]
    shapes = [(3, c, 1), (2, c, 1), (5, 2, 3), (1, c, 1), (2, 1, kernel5), (4, c, 1)]
    weights = [(torch.randn(o, i, k, k) * (i * k * k) ** -0.5).to(dtype).requires_grad_(grad) for o, i, k in shapes]
    return tensor(*shape, dtype=dtype, grad=grad), weights, [tensor(o, dtype=dtype, grad=grad) for o, _, _ in shapes]


def eager_inception(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    def conv(x: Tensor, i: int) -> Tensor:
        return torch.relu(F.conv2d(x, weights[i], biases[i], padding=weights[i].size(2) // 2))

    branches = [conv(x, 0), conv(conv(x, 1), 2), conv(conv(x, 3), 4), conv(F.max_pool2d(x, 3, 1, 1), 5)]
    return torch.cat(branches, 1)


@each_dtype
def test_inception(dtype: torch.dtype) -> None:
    for n, (height, width, kernel5) in enumerate(itertools.product(range(1, 10), range(1, 10), (3, 5))):
        # Its backward computes the reductions again, in bfloat16 across other kinks than float32's.
        args = inception_args((2, 5, height, width), kernel5, dtype, grad=n % 8 == 0 and dtype == torch.float32)
        plain = lambda *a: ops.inception(*a, backend="native")  # noqa: E731
        assert compare(plain, eager_inception, args, dtype, (height, width, kernel5))
        args = mapped(Tensor.detach, args, Tensor)
        packed = lambda x, w, b: ops.inception(x, *ops.pack_inception(w, b, like=x))  # noqa: E731
        assert compare(packed, eager_inception, args, dtype, ("packed", height, width, kernel5))


@needs_triton
def test_inception_in_triton() -> None:
    for height, width in ((1, 1), (1, 3), (2, 2), (4, 1)):
        args = inception_args((1, 3, height, width), 3, torch.float32, grad=True)
        assert compare(lambda *a: ops.inception(*a, backend="triton"), eager_inception, args, torch.float32, height)


def norm(*vectors: Tensor, training: bool) -> BatchNormArgs:
    return BatchNormArgs(*vectors, training=training, momentum=0.1, eps=1e-3)


def eager_norm(x: Tensor, bn: BatchNormArgs) -> Tensor:
    """With running statistics of its own, which it may change."""
    mean, var = bn.running_mean.clone(), bn.running_var.clone()  # type: ignore[union-attr]
    return F.batch_norm(x, mean, var, bn.weight, bn.bias, bn.training, 0.1, bn.eps)


def pointwise(c: int, shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> Iterator[tuple[str, Any, Any, Any]]:
    """What has no window: name, op, eager and arguments; parameters and statistics are float32 in any case."""

    def x(channels: int = c) -> Tensor:
        return tensor(shape[0], channels, *shape[1:], dtype=dtype, grad=grad)

    def vectors(channels: int = c) -> list[Tensor]:
        return [
            tensor(channels, grad=grad),
            tensor(channels, grad=grad),
            torch.randn(channels),
            torch.rand(channels) + 0.5,
        ]

    yield "add_relu", ops.add_relu, lambda a, b: torch.relu(a + b), (x(), x())
    other = c % 4 + 1
    yield (
        "concat_bias_relu",
        lambda a, b, bias, **k: ops.concat_bias_relu([a, b], bias, **k),
        lambda a, b, bias: torch.relu(torch.cat([a, b], 1) + bias.view(1, -1, 1, 1)),
        (x(), x(other), tensor(c + other, grad=grad)),
    )
    for training in (False, True):
        how = "training" if training else "eval"

        def bn(v: list[Tensor], training: bool = training) -> BatchNormArgs:
            return norm(*v, training=training)

        yield (
            f"bn_relu {how}",
            lambda a, v, bn=bn, **k: ops.bn_relu(a, bn(v), **k),
            lambda a, v, bn=bn: torch.relu(eager_norm(a, bn(v))),
            (x(), vectors()),
        )
        yield (
            f"bn_add_relu {how}",
            lambda a, v, r, bn=bn, **k: ops.bn_add_relu(a, bn(v), r, **k),
            lambda a, v, r, bn=bn: torch.relu(eager_norm(a, bn(v)) + r),
            (x(), vectors(), x()),
        )
        yield (
            f"bn_add_relu of two {how}",
            lambda a, v, r, w, bn=bn, **k: ops.bn_add_relu(a, bn(v), r, bn(w), **k),
            lambda a, v, r, w, bn=bn: torch.relu(eager_norm(a, bn(v)) + eager_norm(r, bn(w))),
            (x(), vectors(), x(), vectors()),
        )
        yield (
            f"bn_relu_concat {how}",
            lambda a, v, b, w, bn=bn, **k: ops.bn_relu_concat([a, b], [bn(v), bn(w)], **k),
            lambda a, v, b, w, bn=bn: torch.relu(torch.cat([eager_norm(a, bn(v)), eager_norm(b, bn(w))], 1)),
            (x(), vectors(), x(other), vectors(other)),
        )
        weight = (torch.randn(5, c, 3, 3) * (9 * c) ** -0.5).to(dtype).requires_grad_(grad)
        yield (
            f"bn_relu_conv {how}",
            lambda a, v, w, bn=bn, **k: ops.bn_relu_conv(a, bn(v), w, stride=2, padding=1, **k),
            lambda a, v, w, bn=bn: F.conv2d(torch.relu(eager_norm(a, bn(v))), w, stride=2, padding=1),
            (x(), vectors(), weight),
        )


@each_dtype
@pytest.mark.parametrize("channels", range(1, 10))
def test_ops_without_a_window(channels: int, dtype: torch.dtype) -> None:
    """Of one image of one pixel, which has no variance, BatchNorm in training refuses."""
    refused = set()
    for n, (images, height, width) in enumerate(itertools.product((1, 2), range(1, 6), range(1, 6))):
        # In training the gradient of two values is all cancellation; in bfloat16 it may lie across ReLU's kink.
        grad = n % 5 == 4 and dtype == torch.float32
        for name, op, eager, args in pointwise(channels, (images, height, width), dtype, grad):
            actual = lambda *a, op=op: op(*a, backend="native")  # noqa: E731
            what = (name, images, channels, height, width)
            if not compare(actual, eager, args, dtype, what):
                refused.add((name, images, height, width))
    assert all(size == [1, 1, 1] and "training" in name for name, *size in refused) and refused


@needs_triton
def test_ops_without_a_window_in_triton() -> None:
    for channels, height, width in ((1, 1, 1), (3, 1, 4), (9, 3, 2)):
        for name, op, eager, args in pointwise(channels, (2, height, width), torch.float32, height > 1):
            actual = lambda *a, op=op: op(*a, backend="triton")  # noqa: E731
            assert compare(actual, eager, args, torch.float32, (name, channels, height, width))


@torch.no_grad()
def test_googlenet_of_small_images() -> None:
    """Its pools, in ceil_mode, meet images that are smaller than their windows."""
    from torchvision.models import googlenet

    model = googlenet(weights=None, init_weights=False, aux_logits=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.randn(8, 3, 66, 66))  # statistics of its own, or little of the image is left in the last layer
    model.eval()
    images = [torch.randn(1, 3, side, side) for side in range(15, 67)]
    eager = [model(x) for x in images]
    assert eager[0].std() > 0.1 and not torch.allclose(eager[0], eager[-1], atol=0.1)
    fused_cnn.fuse_(model, strict=True)
    for x, expected in zip(images, eager, strict=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4, msg=lambda m, x=x: f"{x.shape}: {m}")
