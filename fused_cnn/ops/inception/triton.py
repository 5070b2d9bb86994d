"""inception in Triton, four launches: the three 1x1 convolutions that share x as one GEMM with three destinations, the
two k x k convolutions, and the max pool with its projection; every branch writes into its slice of the output.

x is read by the first GEMM and, nine times from cache, by the pool; the pooled x is never written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._layout import result_format
from .._triton import empty_pixels
from .._triton_conv import Geometry, conv_forward, weight_rows

POINTWISE = Geometry((1, 1))
POOL = Geometry((3, 3), padding=(1, 1), pool=True)


def inception_fwd(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    w1, w3_reduce, w3, w5_reduce, w5, w_pool = weights
    b1, b3_reduce, b3, b5_reduce, b5, b_pool = biases
    height, width = x.shape[2:]
    sizes = [w.size(0) for w in (w1, w3, w5, w_pool)]
    out = empty_pixels(x, sum(sizes), height, width)
    reduced3, reduced5 = (empty_pixels(x, w.size(0), height, width) for w in (w3_reduce, w5_reduce))
    into1, into3, into5, into_pool = out.split(sizes, 1)
    merged = torch.cat([weight_rows(w) for w in (w1, w3_reduce, w5_reduce)])
    merged_bias = torch.cat([b1, b3_reduce, b5_reduce])
    conv_forward(x, merged, merged_bias, None, POINTWISE, True, [into1, reduced3, reduced5])
    for read, weight, bias, into in ((reduced3, w3, b3, into3), (reduced5, w5, b5, into5)):
        pad = weight.size(2) // 2
        geometry = Geometry((weight.size(2), weight.size(2)), padding=(pad, pad))
        conv_forward(read, weight_rows(weight), bias, None, geometry, True, [into])
    conv_forward(x, weight_rows(w_pool), b_pool, None, POOL, True, [into_pool])
    return out.contiguous(memory_format=result_format(x))
