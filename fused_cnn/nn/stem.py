"""Networks whose first layers sit at their top level: a convolution, BatchNorm and ReLU, and a max pool.

In eval on a GPU these are one op, where the pool is ResNet's or GoogLeNet's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops._conv import autocast, on_16_bytes, pair, runs_on_gpu_kernels
from ..ops.stem.reference import POOL
from .calls import is_traced
from .conv_bn_relu import ConvBNReLU
from .fold import FoldedPair, Pair, fold, pair_problem, skip_problem
from .max_pool2d import MaxPool2d
from .module import FusedModule, block_problem
from .traced import traced_conv


class StemmedNetwork(FusedModule):
    """A network that runs relu(bn1(conv1(x))) fused, and `maxpool` with it where it can. Its forward calls `fused_run`,
    and that `fused_behind_pool`."""

    conv1: Any
    bn1: nn.BatchNorm2d
    fused_stem_act: str = "relu"  # the name of the activation behind bn1
    fused_stem_pool: str = "maxpool"

    def fused_behind_pool(self, x: Tensor) -> Any:
        """What the network does with the pool's result."""
        raise NotImplementedError

    def fused_behind_stem(self, x: Tensor) -> Any:
        return self.fused_behind_pool(getattr(self, self.fused_stem_pool)(x))

    def fused_problem(self) -> str | None:
        children, act = self._modules, self.fused_stem_act
        problem = skip_problem(children.get(act), nn.ReLU)
        names = ("conv1", "bn1")
        return pair_problem(children.get("conv1"), children.get("bn1"), names) or (problem and f"{act} {problem}")

    def fused_settings(self) -> Any:
        return self.backend, self._fused_pool()

    def _fused_pool(self) -> dict[str, Any] | None:
        """How the fused op pools, where its convolution and pool are this network's, with nobody watching the pool."""
        pool, (kernel, step, dilation) = self._modules.get(self.fused_stem_pool), POOL
        ((conv, _),) = self.fused_pairs()
        if (
            not isinstance(pool, MaxPool2d)
            or block_problem(pool, MaxPool2d.forward) is not None
            or pool.fused_structure_problem() is not None
            or pool.backend != self.backend
            or conv.groups != 1
            or pair(conv.dilation) != (1, 1)
        ):
            return None
        window = [pool.kernel_size, pool.stride, pool.dilation, pool.padding]
        # Of a list PyTorch's pool reads what is in it at the time.
        if not all(type(n) is int for value in window for n in (value if type(value) is tuple else (value,))):
            return None
        sizes = [pair(value) for value in window]
        if sizes[:3] != [kernel, step, dilation] or sizes[3] not in ((0, 0), (1, 1)):
            return None
        return {"pool_padding": sizes[3][0], "ceil_mode": bool(pool.ceil_mode)}

    def fused_skipped(self) -> list[nn.Module]:
        found = [self._modules.get(name) for name in ("conv1", "bn1", self.fused_stem_act)]
        return [m for m in found if m is not None]

    def fused_regarded(self) -> list[nn.Module]:
        pool = self._modules.get(self.fused_stem_pool)
        return [*self.fused_skipped(), *([pool] if isinstance(pool, MaxPool2d) else [])]

    def fused_pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1)]

    def fused_fold(self, x: Tensor) -> tuple[FoldedPair, dict[str, Any] | None]:
        ((conv, norm),) = self.fused_pairs()
        pool = self._fused_pool() if runs_on_gpu_kernels(x, "stem_fwd", self.backend) else None
        return FoldedPair.of(conv, fold(conv, norm), autocast(x)[0], self.backend), pool

    def fused_run_folded(self, x: Tensor, folded: tuple[FoldedPair, dict[str, Any] | None]) -> Any:
        pair, pool = folded
        if pool is None:
            return self.fused_behind_stem(pair.run(x, relu=True, backend=self.backend))
        return self.fused_behind_pool(pair.run_pooled(x, **pool, backend=self.backend))

    def fused_run_traced(self, x: Tensor) -> Tensor:
        return self.fused_behind_stem(traced_conv(x, self.conv1, self.bn1, relu=True, backend=self.backend))

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        return self.fused_behind_stem(self.fused_bn_act(self.conv1(on_16_bytes(x)), self.bn1))


class BlockStemmedNetwork(StemmedNetwork):
    """A network that begins with a ConvBNReLU, `conv1`, and a pool, as GoogLeNet does. Where the two are no one op, its
    plain forward calls them, and they run fused by themselves."""

    fused_stem_pool = "maxpool1"

    def fused_problem(self) -> str | None:
        conv = self._modules.get("conv1")
        if not isinstance(conv, ConvBNReLU):
            return f"conv1 is {type(conv).__name__}, not ConvBNReLU"
        problem = block_problem(conv) or conv.fused_structure_problem()
        if problem is None and not (conv.backend == self.backend and conv.fused_ends_in_relu()):
            problem = "has another backend, or no ReLU"
        if problem is None:
            return None if self._fused_pool() else f"{self.fused_stem_pool} is another pool than the fused op's"
        return f"conv1 {problem}"

    def fused_skipped(self) -> list[nn.Module]:
        return list(self._modules["conv1"].modules())  # type: ignore[union-attr]

    def fused_pairs(self) -> list[Pair]:
        return self._modules["conv1"].fused_pairs()  # type: ignore[operator, union-attr]

    def fused_run(self, x: Tensor, plain: Callable[[Tensor], Any]) -> Any:
        one_op = isinstance(x, Tensor) and not is_traced(x) and runs_on_gpu_kernels(x, "stem_fwd", self.backend)
        return super().fused_run(x, plain) if one_op else plain(x)

    def _fused_pays(self, x: Tensor, pairs: Sequence[Pair]) -> bool:
        return False  # with batch statistics or gradients
