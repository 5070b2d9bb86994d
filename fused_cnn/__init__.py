"""Fused blocks for GoogLeNet- and ResNet-like CNNs: the same weights and the same numbers with less memory traffic."""

from . import nn, ops
from .fuse import FusionReport, fuse_, refresh, unfuse_
from .nn.cache import StaleWeightsError, detect_stale_weights
from .nn.normalization import fold_normalization
from .ops import (
    add_relu,
    bn_add_relu,
    bn_relu,
    bn_relu_concat,
    bn_relu_conv,
    concat_bias_relu,
    conv1x1_bias_relu,
    conv_bias_relu,
    inception,
    max_pool2d,
    stem,
)
from .plan.optimized import OptimizedModel, optimize

__version__ = "0.1.0"
__all__ = [
    "FusionReport",
    "OptimizedModel",
    "StaleWeightsError",
    "add_relu",
    "bn_add_relu",
    "bn_relu",
    "bn_relu_concat",
    "bn_relu_conv",
    "concat_bias_relu",
    "conv1x1_bias_relu",
    "conv_bias_relu",
    "detect_stale_weights",
    "fold_normalization",
    "fuse_",
    "inception",
    "max_pool2d",
    "nn",
    "ops",
    "optimize",
    "refresh",
    "stem",
    "unfuse_",
]
