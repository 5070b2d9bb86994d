"""concat_bias_relu: out = cat([relu(b_i + bias_i)], dim=1), every branch written straight into its channels of the one
output.

Forward reads each branch and writes the output, once (eager: reads and writes each branch three times). Backward reads
grad_out and out and writes one dense gradient per branch; the bias's gradient is summed on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._candidates import resolve, tunable
from ..._checks import check_branches, check_parameter, vector_dtype
from ..._layout import empty_nchw
from ..._library import define, define_triton, kernel
from .._autograd import kernel_or, needs_grad, on_a_backend
from . import reference


def _fake_bwd(grad_out: Tensor, out: Tensor | None, channels: list[int], bias: bool) -> tuple[list[Tensor], Tensor]:
    like = grad_out if out is None else out
    grads = [empty_nchw(like, c, *like.shape[2:]) for c in channels]
    return grads, grad_out.new_empty(sum(channels) if bias else 0, dtype=vector_dtype(grad_out))


# bias and its gradient are float32, or float64 for float64 branches. Without ReLU, backward takes no `out`; without
# bias, its gradient is empty.
define(
    "concat_bias_relu_fwd(Tensor[] branches, Tensor? bias, bool relu) -> Tensor",
    lambda branches, bias, relu: empty_nchw(branches[0], sum(b.size(1) for b in branches), *branches[0].shape[2:]),
)
define(
    "concat_bias_relu_bwd(Tensor grad_out, Tensor? out, int[] channels, bool bias) "
    "-> (Tensor[] grads, Tensor grad_bias)",
    _fake_bwd,
)
define_triton("concat", "concat_bias_relu_fwd", "concat_bias_relu_bwd")


class _ConcatBiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, relu: bool, bias: Tensor | None, *branches: Tensor) -> Tensor:
        out = kernel("concat_bias_relu_fwd", backend)(branches, bias, relu)
        ctx.save_for_backward(out if relu else None)
        ctx.backend, ctx.channels, ctx.bias = backend, [b.size(1) for b in branches], bias is not None
        return out

    @staticmethod
    @on_a_backend
    def backward(ctx: Any, backend: str, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads, grad_bias = kernel_or(reference.concat_bias_relu_bwd, "concat_bias_relu_bwd", backend)(
            grad_out, *ctx.saved_tensors, ctx.channels, ctx.bias
        )
        return (None, None, grad_bias if ctx.bias else None, *grads)


@tunable
def concat_bias_relu(
    branches: Sequence[Tensor], bias: Tensor | None = None, *, relu: bool = True, backend: str | None = None
) -> Tensor:
    """cat([relu(b_i + bias_i)], dim=1): the end of an Inception block whose convolutions are cuDNN's or oneDNN's.

    The "filter concatenation" of arXiv 1409.4842, section 4, figure 2b, with the bias and the ReLU of the convolutions
    before it.

    Args:
        branches: (N, C_i, H, W), floating point, any strides, one dtype and device.
        bias: (sum of C_i,) for all branches in order, in their dtype or, where that is 16-bit, in float32; None adds
            nothing.
        relu: False concatenates without ReLU.
        backend: "reference", "native", "triton", or None for the best at hand.

    Returns:
        (N, sum of C_i, H, W) in the branches' dtype; channels_last where the first branch's channels are adjacent in
        memory, else contiguous.

    Saved for backward: the result, which the next layer keeps anyway. Nothing is mutated.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not agree; the message names the branch.
        BackendUnavailable: an explicit backend cannot run here.
    """
    check_branches("concat_bias_relu", branches)
    check_parameter("concat_bias_relu", "bias", bias, sum(b.size(1) for b in branches), branches[0])
    backend = resolve("concat_bias_relu_fwd", backend, branches[0])
    if backend == "reference":
        return reference.concat_bias_relu(branches, bias, relu)
    if bias is not None:
        bias = bias.to(vector_dtype(branches[0]))
    if needs_grad(bias, *branches):
        return _ConcatBiasReLU.apply(backend, relu, bias, *branches)
    return kernel("concat_bias_relu_fwd", backend)(branches, bias, relu)
