"""ResNet's residual blocks (arXiv 1512.03385, figures 2 and 5) by torchvision's names, and stages of them."""

from __future__ import annotations

from functools import reduce
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .._layout import asks_for_channels_last, in_channels_last
from ..ops import BatchNormArgs, bn_add_relu, pack_residual_block
from ..ops._conv import autocast, on_16_bytes, packable, runs_packed
from ..ops.conv.stage import sum_of
from .cache import Form, Kind
from .calls import is_traced
from .fold import FoldedBlock, FoldedPair, OneOp, Pair, fold, pair_problem, skip_problem, wants_gradient
from .module import FusedBlock, Replaced, Understanding, block_problem
from .traced import traced_conv, traced_stage


class FoldedStage(NamedTuple):
    """What runs all blocks, and the blocks' own forms, of which it is made."""

    op: OneOp
    forms: list[Form]


class ResidualBlock(FusedBlock):
    """What both blocks share: their arguments, and how they run.

    A foreign block's children may have other names: `fused_acts` are its ReLUs, and where `fused_absent` says so there
    may be parts that this block does not compute, as long as they are None or nn.Identity.
    """

    fused_num_convs: ClassVar[int]
    fused_acts: ClassVar[tuple[str, ...]] = ("relu",)
    fused_absent: ClassVar[tuple[str, ...]] = ()
    fused_reads = (*FusedBlock.fused_reads, "residual", "downsample")
    residual: bool

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        *,
        residual: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._fused_add_layers(inplanes, planes, stride, groups, base_width, dilation)
        self.downsample = downsample
        self.residual, self.backend = residual, backend

    def _fused_add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> None:
        raise NotImplementedError

    def fused_adds_shortcut(self) -> bool:
        """Whether there is one: a foreign block has it always, whatever else its owner calls `residual`."""
        return self._fused_swapped_from is not None or self.residual

    def fused_plain_forward(self, x: Tensor) -> Tensor:
        y, relu = x, self._modules["relu"]
        assert relu is not None
        for i, (conv, bn) in enumerate(self.fused_convs()):
            assert bn is not None
            y = bn(conv(relu(y) if i else y))
        shortcut = self._fused_shortcut(x)
        return relu(y if shortcut is None else y + shortcut.to(y.dtype))  # as where the sum is written in place

    def fused_problem(self) -> str | None:
        for name in self.fused_absent:
            part = getattr(self, name, None)
            if part is not None and type(part) is not nn.Identity:
                return f"has {name} ({type(part).__name__})"
        children = self._modules
        for i in range(1, self.fused_num_convs + 1):
            names = (f"conv{i}", f"bn{i}")
            problem = pair_problem(children.get(names[0]), children.get(names[1]), names)
            if problem:
                return problem
        # What stands for an absent part is not called either; nor is `downsample`, where the projection is computed.
        ways = ((self.fused_acts, nn.ReLU), (self._fused_identities(), nn.Identity))
        for name, kind in ((name, kind) for names, kind in ways for name in names):
            problem = skip_problem(children.get(name), kind)
            if problem:
                return f"{name} {problem}"
        return None

    def _fused_identities(self) -> list[str]:
        return [name for name in self.fused_absent if name in self._modules]

    def fused_features(self) -> tuple[str, ...]:
        downsample: Any = self.downsample
        if not self.fused_adds_shortcut() or skip_problem(downsample, nn.Sequential) or len(downsample) != 2:
            return ()
        return ("projection",) if pair_problem(downsample[0], downsample[1], ("0", "1")) is None else ()

    def fused_skipped(self) -> list[nn.Module]:
        names = [f"{kind}{i}" for i in range(1, self.fused_num_convs + 1) for kind in ("conv", "bn")]
        found = [self._modules.get(name) for name in (*names, *self.fused_acts, *self._fused_identities())]
        if self._fused_has("projection"):
            downsample: Any = self.downsample
            found += [downsample, *downsample]
        return [m for m in found if m is not None]

    def fused_regarded(self) -> list[nn.Module]:
        downsample, found = self.downsample, self.fused_skipped()
        if isinstance(downsample, nn.Module) and not self._fused_has("projection"):
            found += downsample.modules()
        return found

    def fused_convs(self) -> list[Pair]:
        """conv1 and bn1, conv2 and bn2, ..."""
        children: Any = self._modules
        return [(children[f"conv{i}"], children[f"bn{i}"]) for i in range(1, self.fused_num_convs + 1)]

    def fused_projection(self) -> Pair | None:
        """The shortcut's convolution and BatchNorm, where it is those two and nothing else."""
        return tuple(self.downsample) if self.fused_has("projection") else None  # type: ignore[return-value, arg-type]

    def fused_pairs(self) -> list[Pair]:
        downsample: Any = self.downsample
        # As the modules are now: what `fused_has` remembers may be of what was there before.
        return [*self.fused_convs(), tuple(downsample)] if self._fused_has("projection") else self.fused_convs()

    def fused_settings(self) -> Any:
        return self.backend, self.fused_adds_shortcut(), self.fused_has("projection"), self.downsample is None

    def fused_is_one_op(self, x: Tensor) -> bool:
        """Whether a native op takes the whole block, with inputs such as x."""
        return self._fused_fits_one_op() and runs_packed(autocast(x)[0], "residual_stage_packed_fwd", self.backend)

    def fused_is_one_node(self, x: Tensor) -> bool:
        """The same in a graph; on a GPU it has convolutions."""
        return self._fused_fits_one_op() and packable(autocast(x)[0], "conv_bias_relu_fwd", self.backend)

    def _fused_fits_one_op(self) -> bool:
        adds_another = self.fused_adds_shortcut() and self.downsample is not None and not self.fused_has("projection")
        return not adds_another and all(conv.groups == 1 for conv, _ in self.fused_pairs())

    def fused_gives_channels_last(self) -> bool:
        """Whether the result is channels_last however x lies; the sum is where the convolutions before it are."""
        return any(asks_for_channels_last(conv.weight) for conv, _ in self.fused_convs())

    def fused_fold(self, x: Tensor) -> OneOp | FoldedBlock:
        (like,), convs, projection = autocast(x), self.fused_convs(), self.fused_projection()
        folded = [fold(*pair) for pair in convs]
        shortcut = None if projection is None else fold(*projection)
        if self.fused_is_one_op(x):
            how: Any = {"shortcut": self.fused_adds_shortcut(), "like": like, "backend": self.backend}
            packed = pack_residual_block(folded, shortcut, **how)
            assert packed is not None
            return OneOp(packed, self.fused_gives_channels_last())
        projected = None
        if projection is not None and shortcut is not None:
            # Its bias is added with the last convolution's: without one the library's result needs no pass behind it.
            folded[-1] = folded[-1]._replace(bias=sum_of(folded[-1].bias, shortcut.bias))
            projected = FoldedPair.of(projection[0], shortcut._replace(bias=None), like, self.backend)
        pairs = zip(convs, folded, strict=True)
        return FoldedBlock([FoldedPair.of(conv, one, like, self.backend) for (conv, _), one in pairs], projected)

    def fused_run_folded(self, x: Tensor, folded: OneOp | FoldedBlock) -> Tensor:
        if isinstance(folded, OneOp):
            return folded.run(x)
        convs, projection = folded
        own = () if projection is not None or self.downsample is None else self.downsample.parameters()
        if wants_gradient(x, own):  # the shortcut's, of which nobody else asks
            return self.fused_run_unfolded(x)
        y = x
        for conv in convs[:-1]:
            y = conv.run(y, relu=True, backend=self.backend)
        shortcut = (
            self._fused_shortcut(x) if projection is None else projection.run(x, relu=False, backend=self.backend)
        )
        return convs[-1].run(y, shortcut, relu=True, backend=self.backend)

    def fused_run_traced(self, x: Tensor) -> Tensor:
        convs, projection = self.fused_convs(), self.fused_projection()
        if self.fused_is_one_node(x):
            (x,) = autocast(x)
            x = in_channels_last(x) if self.fused_gives_channels_last() else x
            return traced_stage(x, [convs], projection, shortcut=self.fused_adds_shortcut())
        y = x
        for conv, bn in convs[:-1]:
            y = traced_conv(y, conv, bn, relu=True, backend=self.backend)
        shortcut = (
            self._fused_shortcut(x)
            if projection is None
            else traced_conv(x, *projection, relu=False, backend=self.backend)
        )
        return traced_conv(y, *convs[-1], shortcut, relu=True, backend=self.backend)

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        """Raw convolutions, BatchNorm and ReLU fused between them, and the last BatchNorm with the sum and its ReLU."""
        convs, projection = self.fused_convs(), self.fused_projection()
        y, last = self.fused_conv_chain(convs, x), convs[-1][1]
        assert last is not None
        if projection is not None:
            conv, bn = projection  # both BatchNorms in the pass that adds
            assert bn is not None
            args, shortcut = BatchNormArgs.of(last), conv(on_16_bytes(x))  # in the order in which they count passes
            return bn_add_relu(y, args, shortcut, BatchNormArgs.of(bn), backend=self.backend)
        shortcut = self._fused_shortcut(x)
        if shortcut is None:
            return self.fused_bn_act(y, last)
        return bn_add_relu(y, BatchNormArgs.of(last), shortcut.to(y.dtype), backend=self.backend)

    def _fused_shortcut(self, x: Tensor) -> Tensor | None:
        """What is added where there is no projection: x, what else `downsample` makes of it, or nothing."""
        if not self.fused_adds_shortcut():
            return None
        return x if self.downsample is None else self.downsample(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        inplanes, planes: channels of the input and of the result.
        stride: of the first convolution.
        downsample: the shortcut's projection, or None for the identity.
        groups, base_width, dilation: must be 1, 64 and 1.
        residual: False leaves the shortcut out: the plain net's pair of layers (section 4.1).
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, planes, H / stride, W / stride).
    """

    fused_num_convs, expansion = 2, 1

    def _fused_add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> None:
        if (groups, base_width, dilation) != (1, 64, 1):
            got = f"{groups}, {base_width} and {dilation}"
            raise ValueError(f"BasicBlock takes groups=1, base_width=64 and dilation=1, got {got}")
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)


class Bottleneck(ResidualBlock):
    """1x1 reduction, 3x3 (with the stride, as torchvision has it), 1x1 expansion by 4, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of the 3x3 convolution at base_width=64 and groups=1; the result has 4 * planes.
        stride, dilation: of the 3x3 convolution.
        downsample: the shortcut's projection, or None for the identity.
        groups, base_width: of the 3x3 convolution (ResNeXt, arXiv 1611.05431; wide ResNet, arXiv 1605.07146).
        residual: False leaves the shortcut out.
        backend: "reference", "native", or None for the best at hand.

    Input (N, inplanes, H, W) -> output (N, 4 * planes, H / stride, W / stride).
    """

    fused_num_convs, expansion = 3, 4

    def _fused_add_layers(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int
    ) -> None:
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)


class ResidualStage(FusedBlock, nn.Sequential):
    """Residual blocks one after the other, as nn.Sequential has them; in eval without gradients one op where possible.

    Args:
        blocks: BasicBlock or Bottleneck each.
        backend: "reference", "native", or None for the best at hand.
    """

    fused_is_leaf = False  # its blocks are
    fused_replaces: ClassVar[Replaced] = {"forward": frozenset()}

    def __init__(self, *blocks: nn.Module, backend: str | None = None) -> None:
        super().__init__(*blocks)
        self.backend = backend

    def fused_plain_forward(self, input: Tensor) -> Tensor:
        return nn.Sequential.forward(self, input)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Sequential names it
        if not isinstance(input, Tensor):
            return self.fused_plain_forward(input)
        known = None if is_traced(input) else self._fused_owner.known
        if known is not None and wants_gradient(input, known.tensors):
            return self.fused_plain_forward(input)
        return super().forward(input)

    def fused_problem(self) -> str | None:
        for i, (name, block) in enumerate(self._modules.items()):
            if not isinstance(block, ResidualBlock):
                return f"{name} is {type(block).__name__}, not a residual block"
            problem = block_problem(block) or block.fused_known().problem
            if problem:
                return f"{name} {problem}"
            if i > 0 and (
                not block.fused_adds_shortcut() or block.fused_has("projection") or block.downsample is not None
            ):
                return f"{name} does not add its own input"
            if any(conv.groups != 1 for conv, _ in block.fused_pairs()):
                return f"{name} has a convolution in groups"
        return None if self._modules else "is empty"

    def fused_pairs(self) -> list[Pair]:
        return [pair for block in self._fused_blocks() for pair in block.fused_pairs()]

    def fused_settings(self) -> Any:
        return self.backend, [block.fused_settings() for block in self._fused_blocks()]

    def _fused_waits(self, kind: Kind) -> bool:
        owners = [block._fused_owner for block in self._modules.values() if isinstance(block, ResidualBlock)]
        return any(owner.waiting(kind) is not None for owner in owners) or super()._fused_waits(kind)

    def _fused_form(self, kind: Kind, x: Tensor, known: Understanding) -> Form | None:
        return None if self._fused_ready_forms(x) is None else super()._fused_form(kind, x, known)

    def _fused_ready_forms(self, x: Tensor) -> list[Form] | None:
        """The blocks' own forms, where each has one that the op takes."""
        forms = []
        for block in self._fused_blocks():  # a block that occurs twice runs twice
            form = block.fused_ready(x)
            if form is None or not isinstance(form.value, OneOp):
                return None
            forms.append(form)
        return forms

    def fused_fold(self, x: Tensor) -> FoldedStage | None:
        forms = self._fused_ready_forms(x)
        for form in forms or () if x.is_cuda else ():
            form.join()  # another stream may still be making it
        return None if forms is None else FoldedStage(reduce(OneOp.then, [f.value for f in forms]), forms)

    def fused_check(self, form: Form, x: Tensor) -> None:
        for block, part in zip(self._fused_blocks(), form.value.forms, strict=True):
            block.fused_check(part, x)

    def _fused_run_form(self, x: Tensor, form: Form) -> Tensor:
        out = super()._fused_run_form(x, form)
        for part in form.value.forms:  # of whose memory the stage's is made
            part.uses += 1
            if form.captured or not form.streams <= part.streams:
                part.captured |= form.captured
                part.streams |= form.streams
        return out

    def fused_run_folded(self, x: Tensor, folded: FoldedStage) -> Tensor:
        return folded.op.run(x)

    def fused_run_traced(self, x: Tensor) -> Tensor:
        blocks, backend = self._fused_blocks(), self.backend
        first = blocks[0]
        if not all(b.fused_is_one_node(x) and b.backend == backend for b in blocks):
            return self.fused_plain_forward(x)
        (x,) = autocast(x)
        x = in_channels_last(x) if any(block.fused_gives_channels_last() for block in blocks) else x
        return traced_stage(
            x, [b.fused_convs() for b in blocks], first.fused_projection(), shortcut=first.fused_adds_shortcut()
        )

    def fused_run_unfolded(self, x: Tensor) -> Tensor:
        return self.fused_plain_forward(x)

    def _fused_blocks(self) -> list[ResidualBlock]:
        return list(self._modules.values())  # type: ignore[arg-type]
