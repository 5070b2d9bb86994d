"""The real input: photographs that scikit-image ships, and torchvision's networks with statistics taken from them.

Nothing is downloaded. Weights are random, so the BatchNorm statistics are made real: gamma and beta are random, and the
running mean and variance are those of the photographs and of noise. The last layer is centred on them, so that the
scores tell photographs apart.
"""

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .errors import RequestError, require

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _photograph_file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    skimage = importlib.util.find_spec("skimage")
    if skimage is None or skimage.origin is None:
        raise RequestError("the photographs are scikit-image's, which is not installed: `pip install scikit-image`")
    for file in (Path(skimage.origin).parent / "data" / f"{name}{suffix}" for suffix in (".png", ".jpg")):
        if file.is_file():
            return file
    raise RequestError(f"--image {name!r} is neither a file nor one of scikit-image's {', '.join(PHOTOGRAPHS)}")


def photographs(batch: int, size: int, names: Sequence[str] = PHOTOGRAPHS) -> Tensor:
    """(batch, 3, size, size), channels_last: the middle squares of photographs, normalised as ImageNet's are; fewer
    photographs than that come again, mirrored and shifted."""
    pillow, numpy = require("PIL.Image", "`pip install pillow`"), require("numpy", "`pip install numpy`")
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (IMAGENET_MEAN, IMAGENET_STD))
    single = []
    for name in names:
        try:
            picture = pillow.open(_photograph_file(name)).convert("RGB")
        except OSError as error:
            raise RequestError(f"--image {name!r} cannot be read as a picture: {error}") from error
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.resize((size, size), box=(left, top, left + side, top + side))
        single.append((torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255 - mean) / std)
    images = []
    for i in range(batch):
        image, again = single[i % len(single)], i // len(single)
        images.append((image.flip(2) if again % 2 else image).roll(7 * again, 1))
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


def network(name: str, images: Tensor) -> nn.Module:
    """torchvision's architecture of that name, float32, in eval, with seeded weights and statistics of `images`."""
    torchvision = require("torchvision", "`make venv` installs it, or see examples/torchvision_shim.py")
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        near = [k for k in known if k.startswith(name[:6])]
        raise RequestError(f"torchvision has no model {name!r}; it has {', '.join(near or known)}")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options)
    model = model.to(images.device, memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            make_statistics_real(model, images)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"{name} does not run on {images.size(2)} x {images.size(3)} pixels: {error}") from error
    return model.eval()


def make_statistics_real(model: nn.Module, images: Tensor, beta: float = 0.0) -> None:
    """Give every BatchNorm random gamma and beta (around `beta`: the larger, the fewer activations does ReLU bend) and
    the statistics of `images` and noise; centre the last layer."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(beta, 0.2)
    few = images[:4]
    both = torch.cat([few, few.flip(3)])
    noise = (scale * torch.randn(1, device=few.device) * torch.randn_like(few) for scale in (0.0, 0.3, 1.0))
    update_bn((both + more.repeat(2, 1, 1, 1) for more in noise), model)
    model.eval()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        return
    last = linear[-1]
    nn.init.normal_(last.weight, std=last.in_features**-0.5)
    scores = model(few)
    spread = (scores - scores.mean(0)).std().clamp_min(1e-3)
    last.weight.mul_(2 / spread)
    last.bias.copy_(-(scores - last.bias).mean(0) * (2 / spread))


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in which dropout lets everything through, so that two runs of a training step can be compared."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
