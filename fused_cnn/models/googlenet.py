"""GoogLeNet in two forms, built from fused blocks.

`googlenet` is torchvision's (BatchNorm with eps 0.001, 3x3 convolutions in the third branch, ceil_mode
pools), with torchvision's parameter names, so its state dicts load as they are. `googlenet_paper` is the
network of arXiv 1409.4842, Table 1 and Figure 3: biases and no BatchNorm, local response normalisation, 5x5
branches, and the two auxiliary classifiers of section 5.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ConvBNReLU, Inception, MaxPool2d
from ..nn.stem import BlockStemmedNetwork

# Table 1 of arXiv 1409.4842: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
INCEPTION_CHANNELS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
BATCH_NORM_EPS = 0.001
AUX_LOSS_WEIGHT = 0.3


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet with auxiliary classifiers returns in training: three tensors (N, num_classes)."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class InceptionAux(nn.Module):
    """An auxiliary classifier (arXiv 1409.4842, section 5).

    Average pool to 4x4, 1x1 convolution to 128, fully connected to 1024, dropout, fully connected. The
    paper's pool is 5x5 with stride 3, which takes 14x14 to 4x4; torchvision's is adaptive: any size will do.
    """

    def __init__(
        self, in_channels: int, num_classes: int, dropout: float, *, batch_norm: bool, backend: str | None
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((4, 4)) if batch_norm else nn.AvgPool2d(5, stride=3)
        self.conv = ConvBNReLU(
            in_channels, 128, 1, bias=not batch_norm, norm=batch_norm, eps=BATCH_NORM_EPS, backend=backend
        )
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(self.dropout(x))


def _lrn() -> nn.LocalResponseNorm:
    # The paper does not state the constants; these are those of the authors' framework's published model
    # (BVLC GoogLeNet).
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


class GoogLeNet(BlockStemmedNetwork):
    """GoogLeNet (arXiv 1409.4842), in torchvision's form or, with `batch_norm=False`, in the paper's.

    Args:
        num_classes: length of the logits.
        aux_logits: make the two auxiliary classifiers, which run in training only.
        transform_input: from ImageNet's normalisation to mean 0.5 and standard deviation 0.5.
        init_weights: torchvision's initialisation. The paper's form always takes Xavier's: it has no
            BatchNorm to rescale small weights.
        dropout: before the last layer; None is 0.2 in torchvision's form and 0.4 in the paper's.
        dropout_aux: in the auxiliary classifiers (0.7 in both).
        batch_norm: False makes the paper's form: LRN, biases, 5x5 convolutions, 3x3 pools, and the auxiliary
            classifiers' 5x5 pool.
        naive: Inception blocks without 1x1 reductions (Figure 2a): wide, and only there to be compared.
        backend: "reference" (plain eager PyTorch), "native", or None for the best at hand.

    Input (N, 3, H, W); output logits (N, num_classes), or GoogLeNetOutputs in training with auxiliary
    classifiers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        dropout: float | None = None,
        dropout_aux: float = 0.7,
        *,
        batch_norm: bool = True,
        naive: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.backend = backend
        form: dict[str, Any] = {"norm": batch_norm, "bias": not batch_norm, "eps": BATCH_NORM_EPS, "backend": backend}

        self.conv1 = ConvBNReLU(3, 64, 7, stride=2, padding=3, **form)
        self.maxpool1 = MaxPool2d(3, stride=2, ceil_mode=True, backend=backend)
        self.norm1 = nn.Identity() if batch_norm else _lrn()
        self.conv2 = ConvBNReLU(64, 64, 1, **form)
        self.conv3 = ConvBNReLU(64, 192, 3, padding=1, **form)
        self.norm2 = nn.Identity() if batch_norm else _lrn()
        self.maxpool2 = MaxPool2d(3, stride=2, ceil_mode=True, backend=backend)

        channels = 192

        def inception(name: str) -> Inception:
            nonlocal channels
            widths = INCEPTION_CHANNELS[name]
            block = Inception(channels, *widths, kernel5=3 if batch_norm else 5, reduce=not naive, **form)
            ch1x1, _, ch3x3, _, ch5x5, pool_proj = widths
            channels = ch1x1 + ch3x3 + ch5x5 + (channels if naive else pool_proj)
            return block

        def aux(in_channels: int) -> InceptionAux | None:
            if not aux_logits:
                return None
            return InceptionAux(in_channels, num_classes, dropout_aux, batch_norm=batch_norm, backend=backend)

        self.inception3a = inception("3a")
        self.inception3b = inception("3b")
        self.maxpool3 = MaxPool2d(3, stride=2, ceil_mode=True, backend=backend)
        self.inception4a = inception("4a")
        channels4a = channels
        self.inception4b = inception("4b")
        self.inception4c = inception("4c")
        self.inception4d = inception("4d")
        channels4d = channels
        self.inception4e = inception("4e")
        # torchvision's weights were trained with a 2x2 pool here.
        self.maxpool4 = MaxPool2d(2 if batch_norm else 3, stride=2, ceil_mode=True, backend=backend)
        self.inception5a = inception("5a")
        self.inception5b = inception("5b")
        self.aux1 = aux(channels4a)
        self.aux2 = aux(channels4d)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        if dropout is None:
            dropout = 0.2 if batch_norm else 0.4
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        if init_weights or not batch_norm:
            self._init_weights(batch_norm)

    def _init_weights(self, batch_norm: bool) -> None:
        for module in self.modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            if batch_norm:
                nn.init.trunc_normal_(module.weight, mean=0.0, std=0.01, a=-2, b=2)
            else:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 0.2 if isinstance(module, nn.Conv2d) else 0.0)

    def _transform(self, x: Tensor) -> Tensor:
        if not self.transform_input:
            return x
        # From (v - mean) / std of ImageNet to (v - 0.5) / 0.5, channel by channel.
        stds, means = (0.229, 0.224, 0.225), (0.485, 0.456, 0.406)
        planes = zip(x.split(1, dim=1), means, stds, strict=True)
        return torch.cat([plane * (std / 0.5) + (mean - 0.5) / 0.5 for plane, mean, std in planes], 1)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        return self.fused_run(self._transform(x), self.fused_plain_forward)

    def fused_plain_forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        """Every child is called."""
        return self.fused_behind_pool(self.maxpool1(self.conv1(x)))

    def fused_behind_pool(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(self.norm1(x)))))
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(self.maxpool3(x))
        aux1 = self.aux1(x) if self.aux1 is not None and self.training else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.aux2 is not None and self.training else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if aux1 is None or aux2 is None:
            return logits
        return GoogLeNetOutputs(logits, aux2, aux1)


def googlenet(**options: Any) -> GoogLeNet:
    """torchvision's GoogLeNet: BatchNorm, and 3x3 convolutions where the paper has 5x5, as in its weights."""
    return GoogLeNet(**options)


def googlenet_paper(**options: Any) -> GoogLeNet:
    """GoogLeNet as arXiv 1409.4842 describes it; the auxiliary classifiers need inputs of 224x224."""
    return GoogLeNet(batch_norm=False, **options)


def googlenet_loss(outputs: Tensor | GoogLeNetOutputs, target: Tensor, aux_weight: float = AUX_LOSS_WEIGHT) -> Tensor:
    """Cross entropy, plus `aux_weight` times each auxiliary classifier's (arXiv 1409.4842, section 5).

    Args:
        outputs: what a GoogLeNet returned: logits (N, C), or in training three tensors of that shape.
        target: (N,) class numbers, int64.

    Returns:
        A scalar, in the logits' dtype.
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, target)
    logits, aux2, aux1 = outputs
    aux = F.cross_entropy(aux1, target) + F.cross_entropy(aux2, target)
    return F.cross_entropy(logits, target) + aux_weight * aux
