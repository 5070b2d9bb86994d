"""Lets `import torchvision` succeed beside a CPU build of torch, for its model architectures.

torchvision's wheels carry compiled ops (nms and others) for CUDA builds of torch only; beside a CPU build
they do not load, and its Python code then fails because it describes two ops that nobody has defined. This
declares those two, when torchvision is first imported. `python torchvision_shim.py` installs it into the
environment that runs it, and only where `import torchvision` fails; at start-up it costs one tiny module,
without torch.
"""

import importlib.abc
import importlib.machinery
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OPS = ("nms", "qnms")
_keep: list[object] = []  # a torch.library.Library undoes its definitions when it is collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Sees the first import of torchvision, declares its ops, and leaves the finding to the others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_ops()
        return None


def declare_ops() -> None:
    """Declare what torchvision's import needs, unless this torch is a CUDA build, whose torchvision brings
    its own.
    """
    import torch

    if torch.backends.cuda.is_built() or torch._C._dispatch_has_kernel("torchvision::nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    _keep.append(library)
    for name in OPS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def hook() -> None:
    """What the environment's .pth file calls at start-up."""
    sys.meta_path.insert(0, _BeforeTorchvision())


def install() -> None:
    """Copy this file into the running environment, with a .pth file that calls `hook`, if torchvision does
    not import.
    """
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    site_packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, site_packages / "torchvision_shim.py")
    (site_packages / "torchvision_shim.pth").write_text("import torchvision_shim; torchvision_shim.hook()\n")
    subprocess.run([sys.executable, "-c", "import torchvision"], check=True)


if __name__ == "__main__":
    install()
