"""The fused ops, one folder each: op.py (the public function), reference.py (the definition of truth), triton.py,
cases.py."""

from .batch_norm.args import BatchNormArgs
from .batch_norm.conv import bn_relu_conv
from .batch_norm.op import bn_add_relu, bn_relu, bn_relu_concat
from .concat.op import concat_bias_relu
from .conv.add_relu import add_relu
from .conv.op import PackedConv, conv1x1_bias_relu, conv_bias_relu, pack_conv
from .conv.stage import FoldedConv, PackedResidualStage, pack_residual_block, residual_stage
from .inception.op import PackedInception, inception, pack_inception
from .max_pool.op import max_pool2d
from .stem.op import stem

__all__ = [
    "BatchNormArgs",
    "FoldedConv",
    "PackedConv",
    "PackedInception",
    "PackedResidualStage",
    "add_relu",
    "bn_add_relu",
    "bn_relu",
    "bn_relu_concat",
    "bn_relu_conv",
    "concat_bias_relu",
    "conv1x1_bias_relu",
    "conv_bias_relu",
    "inception",
    "max_pool2d",
    "pack_conv",
    "pack_inception",
    "pack_residual_block",
    "residual_stage",
    "stem",
]
