"""What one call of an op costs: the kernels it launches, and how often it reads and writes each tensor.

The rule: an op is one kernel that reads every tensor argument once and writes every result once. ATen's own tags say
which ops are pointwise or reductions, and their aliases say which are views (free). The rooms say what this package's
ops cost (COSTS in their cases.py). What follows here is the rest: ops known to follow the rule, and ops that make
several passes. An op that is in none of these is unknown, and the counter names it. Overlapping windows, a row of a
softmax and a tile of a matrix product are read from memory once: caches serve the repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._trees import tensors
from ..ops._cases import rooms
from ..ops._cost import Arguments, Cost, one_pass
from ..ops._flops import conv_flops

if TYPE_CHECKING:
    from torch._ops import OpOverload

# fmt: off
# Memory is reserved or its description changed; no element is touched.
_ALLOCATE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_",
    "set_", "is_same_size",
}
# Results are written; arguments give only a shape, or are overwritten unread.
_WRITE_ONLY = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    "arange", "scalar_tensor", "rand", "randn", "randint", "rand_like", "randn_like", "fill_", "zero_",
    "bernoulli_", "normal_", "uniform_", "random_",
}
_FOLLOW_THE_RULE = {
    "addmm", "mm", "bmm", "baddbmm", "dot", "linear",
    "cat", "stack", "copy_", "_to_copy", "constant_pad_nd", "select_backward", "slice_backward",
    "index_select", "gather", "split_with_sizes_copy", "topk", "sort", "max", "min", "equal", "var_mean",
    "_local_scalar_dense",
    "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward",
    "avg_pool3d", "avg_pool3d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward",
    "native_dropout", "native_dropout_backward", "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update", "hardswish", "hardswish_backward",
    "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data",
    "nll_loss_forward", "nll_loss_backward",
    "cudnn_convolution_relu", "cudnn_convolution_add_relu", "mkldnn_max_pool2d",
    "mkldnn_reorder_conv2d_weight", "to_mkldnn", "_to_dense",
}
# fmt: on


def _convolution(args: Arguments, result: Any) -> Cost:
    # cuDNN's convolution takes no bias: PyTorch adds it in a second kernel.
    return Cost(2, rewrites=1) if args["bias"] is not None and args["input"].is_cuda else Cost()


def _convolution_backward(args: Arguments, result: Any) -> Cost:
    wants_x, wants_weight, wants_bias = args["output_mask"]
    kernels = wants_x + wants_weight + wants_bias  # one for each gradient, and each reads grad_output
    return Cost(kernels, {"grad_output": kernels, "input": int(wants_weight), "weight": int(wants_x)})


def _batch_norm(args: Arguments, result: Any) -> Cost:
    if not args.get("training", args.get("train", True)):
        return Cost()
    # Statistics, then normalisation. On a GPU Welford's statistics take one pass; PyTorch's CPU kernel takes two, mean
    # and variance.
    return Cost(2, {"input": 2 if args["input"].is_cuda else 3})


def _batch_norm_backward(args: Arguments, result: Any) -> Cost:
    # The sums over grad_out and grad_out * x, then grad_x; with running statistics grad_x needs x no more.
    grad = "grad_out" if "grad_out" in args else "grad_output"
    return Cost(2, {grad: 2, "input": 2 if args.get("train", args.get("update", True)) else 1})


_SEVERAL_PASSES: dict[str, Callable[[Arguments, Any], Cost]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "cudnn_batch_norm"), _batch_norm
    ),
    **dict.fromkeys(
        ("native_batch_norm_backward", "batch_norm_backward", "cudnn_batch_norm_backward"), _batch_norm_backward
    ),
}


def _onednn_convolution(args: Arguments, result: Tensor) -> Cost:
    return Cost(flops=conv_flops(result, args["W"].shape))


FUSED_COSTS: dict[str, Callable[[Arguments, Any], Cost]] = {
    **{f"fused_cnn::{name}": cost for room in rooms() for name, cost in room.COSTS.items()},
    "mkldnn::_convolution_pointwise": _onednn_convolution,
    "mkldnn::_convolution_pointwise_": _onednn_convolution,
    "mkldnn::_reorder_convolution_weight": one_pass,
    "mkldnn::_linear_pointwise": lambda args, out: Cost(flops=2 * out.numel() * args["X"].size(-1)),
    "mkldnn::_reorder_linear_weight": one_pass,
}


def _name(op: OpOverload) -> str:
    """`add` for ATen's, `namespace::name` for others; Triton's namespace has the native one's ops."""
    namespace, _, name = op._schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace.removesuffix('_triton')}::{name}"


def cost_of(op: OpOverload, args: Arguments, result: Any) -> Cost | None:
    """The cost of this call, or None where the op is not known; `args` are its arguments by name."""
    name, returns = _name(op), op._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or name in _ALLOCATE or torch.Tag.inplace_view in op.tags or op.namespace in ("prim", "profiler"):
        return Cost(launches=0)
    if name.startswith("_foreach_"):  # on the CPU a loop over the tensors, on a GPU one kernel for many
        return Cost(1 if args["self"][0].is_cuda else len(args["self"]))
    stated = _SEVERAL_PASSES.get(name) or FUSED_COSTS.get(name)
    if stated is not None:
        return stated(args, result)
    tagged = torch.Tag.pointwise in op.tags or torch.Tag.reduction in op.tags
    return Cost() if tagged or name in _FOLLOW_THE_RULE or name in _WRITE_ONLY else None


def read_arguments(op: OpOverload, args: Arguments) -> dict[str, Any]:
    """The arguments whose elements are read: not a fill's, and not where a result goes."""
    name = _name(op)
    if name in _WRITE_ONLY:
        return {}
    unread = {a.name for a in op._schema.arguments if a.is_out or (name, a.name) == ("copy_", "self")}
    return {key: value for key, value in args.items() if key not in unread}


def written_tensors(op: OpOverload, args: Arguments, result: Any) -> list[Tensor]:
    """The tensors that the call wrote: new results and changed arguments, each once."""
    changed = [args.get(a.name) for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = {id(t): t for t in tensors((changed, result))}
    return list(found.values())
