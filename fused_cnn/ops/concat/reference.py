"""cat([relu(b_i + bias_i)], dim=1) in plain PyTorch: the definition that every backend is compared with; and its
gradients, for where these are differentiated again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import vector_dtype
from ..._layout import in_result_format
from ..conv.reference import relu_bwd


def concat_bias_relu(branches: Sequence[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    outs = list(branches)
    if bias is not None:
        parts = bias.to(branches[0].dtype).split([b.size(1) for b in branches])
        outs = [b + part.view(1, -1, 1, 1) for b, part in zip(branches, parts, strict=True)]
    if relu:
        outs = [torch.relu(out) for out in outs]
    return in_result_format(torch.cat(outs, dim=1), branches[0])


def concat_bias_relu_bwd(
    grad_out: Tensor, out: Tensor | None, channels: Sequence[int], bias: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    grad = relu_bwd(grad_out, out)
    grad_bias = grad.sum((0, 2, 3), dtype=vector_dtype(grad)) if bias else None
    return grad.split(channels, 1), grad_bias
