"""Drop-in modules over the fused ops, with torchvision's parameter names."""

from .conv_bn_relu import ConvBNReLU
from .inception import Inception
from .max_pool2d import MaxPool2d
from .module import FusedModule
from .residual import BasicBlock, Bottleneck, ResidualStage

__all__ = ["BasicBlock", "Bottleneck", "ConvBNReLU", "FusedModule", "Inception", "MaxPool2d", "ResidualStage"]
