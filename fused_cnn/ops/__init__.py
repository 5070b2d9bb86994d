"""The fused ops, one folder each: op.py (the public function), reference.py (the definition of truth), triton.py, cases.py."""

from .add_relu.op import add_relu
from .conv1x1_bias_relu.op import conv1x1_bias_relu
from .conv_bias_relu.op import conv_bias_relu

__all__ = ["add_relu", "conv1x1_bias_relu", "conv_bias_relu"]
