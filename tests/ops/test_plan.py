"""run_plan: programs against the same steps in plain PyTorch, and the arena in which their activations lie."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_cnn import _library
from fused_cnn.ops import FoldedConv, inception, pack_conv, pack_inception, pack_residual_block
from fused_cnn.ops._cases import Maker
from fused_cnn.ops.inception.op import weight_shapes
from fused_cnn.ops.plan.op import Kind, Step, arena_bytes, decode, encode, results_of

pytestmark = pytest.mark.skipif(not _library.has_kernel("run_plan", "native", "cpu"), reason="not built")
GUARD = 255  # as floats, four of them are NaN


class Drawn:
    """A program in the making, and what it should give: in float64."""

    def __init__(self, *inputs: Tensor) -> None:
        x = inputs[0]
        self.inputs, self.values = list(inputs), [t.double() for t in inputs]
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []
        self.maker = Maker(x.dtype, seed=1, grad=False)

    def add(self, step: Step, value: Tensor) -> None:
        self.steps.append(step)
        self.values.append(value)

    def convolution(self, read: int, out: int, kernel: int, stride: int, residual: int | None, relu: bool) -> None:
        x = self.values[read]
        weight, bias = self.maker.weight(out, x.size(1), kernel, kernel), self.maker.vector(out)
        y = F.conv2d(x, weight.double(), bias.double(), stride, kernel // 2)
        if residual is not None:
            y = y + self.values[residual]
        packed, _ = pack_conv(weight, bias, like=self.inputs[0], stride=stride)
        numbers = (*weight.shape, *[stride] * 2, *[kernel // 2] * 2, 1, 1, int(relu))
        reads = (read,) if residual is None else (read, residual)
        self.add(Step(Kind.CONVOLUTION, reads, (len(self.constants), 1), numbers), y.relu() if relu else y)
        self.constants.append(packed.data)

    def pool(self, read: int, stride: int) -> None:
        y = F.max_pool2d(self.values[read], 3, stride, 1)
        self.add(Step(Kind.MAX_POOL, (read,), numbers=(3, 3, stride, stride, 1, 1, 1, 1, 0)), y)

    def average(self, read: int) -> None:
        self.add(Step(Kind.AVERAGE, (read,)), self.values[read].mean((2, 3), keepdim=True))

    def concatenation(self, reads: Sequence[int]) -> None:
        self.add(Step(Kind.CONCATENATION, tuple(reads)), torch.cat([self.values[i] for i in reads], 1))

    def stage(self, read: int, blocks: int, width: int, out: int) -> None:
        """Of blocks of a 1x1 and a 3x3 convolution; the first one's shortcut is projected."""
        stage, y = None, self.values[read]
        for block in range(blocks):
            shapes = [(width, y.size(1), 1, 1), (out, width, 3, 3), (out, y.size(1), 1, 1)]
            weights = [self.maker.weight(*shape) for shape in shapes[: 2 + (block == 0)]]
            folded = [FoldedConv(w, None, 1, w.size(2) // 2) for w in weights]
            projection = folded.pop() if block == 0 else None
            packed = pack_residual_block(folded, projection, shortcut=True, like=self.inputs[0])
            stage = packed if stage is None else stage.then(packed)
            shortcut = F.conv2d(y, weights[2].double()) if block == 0 else y
            between = F.conv2d(y, weights[0].double()).relu()
            y = (F.conv2d(between, weights[1].double(), None, 1, 1) + shortcut).relu()
        numbers = (blocks, int(stage.shortcut), int(stage.projects), *stage.lengths, *stage.geometry)
        self.add(Step(Kind.STAGE, (read,), (len(self.constants), len(stage.data)), numbers), y)
        self.constants += stage.data

    def inception(self, read: int, channels: Sequence[int]) -> None:
        shapes = weight_shapes(self.values[read].size(1), channels, (3, 5))
        weights, biases = [self.maker.weight(*s) for s in shapes], [self.maker.vector(s[0]) for s in shapes]
        packed, _ = pack_inception(weights, biases, like=self.inputs[0])
        arguments = [[t.double() for t in tensors] for tensors in (weights, biases)]
        y = inception(self.values[read], *arguments, backend="reference")
        self.add(Step(Kind.INCEPTION, (read,), (len(self.constants), 4), (*channels, 3, 5)), y)
        self.constants += packed.data

    def run(self, inputs: list[Tensor], results: list[int]) -> list[Tensor]:
        return torch.ops.fused_cnn.run_plan(inputs, self.constants, encode(self.steps), results)

    def alike(self, read: int) -> list[int]:
        """The values as high and wide."""
        return [i for i, v in enumerate(self.values) if v.shape[2:] == self.values[read].shape[2:]]


def draw_program(data: Any, inputs: Sequence[Tensor]) -> Drawn:
    drawn = Drawn(*inputs)
    for _ in range(data.draw(st.integers(1, 14))):
        newest = len(drawn.values) - 1
        read = data.draw(st.integers(max(0, newest - 2), newest))  # of what lies further back little would be read
        kinds = ["conv", "conv", "residual", "pool", "average", "stage", "inception", "cat", "cat", "cat"]
        kind = data.draw(st.sampled_from(kinds))
        if kind in ("conv", "residual"):
            kernel, stride = data.draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2)]))
            out, residual = data.draw(st.integers(1, 40)), None
            if kind == "residual":
                side = tuple((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in drawn.values[read].shape[2:])
                fits = [i for i, v in enumerate(drawn.values) if tuple(v.shape[2:]) == side]
                residual = data.draw(st.sampled_from(fits)) if fits else None
                out = out if residual is None else drawn.values[residual].size(1)
            drawn.convolution(read, out, kernel, stride, residual, data.draw(st.booleans()))
        elif kind == "pool":
            drawn.pool(read, data.draw(st.integers(1, 2)))
        elif kind == "average":
            drawn.average(read)
        elif kind == "stage":
            drawn.stage(read, data.draw(st.integers(1, 2)), *data.draw(st.tuples(*[st.integers(1, 20)] * 2)))
        elif kind == "inception":
            drawn.inception(read, data.draw(st.tuples(*[st.integers(1, 20)] * 6)))
        else:
            drawn.concatenation(data.draw(st.lists(st.sampled_from(drawn.alike(read)), min_size=1, max_size=4)))
    return drawn


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_program_gives_what_its_steps_give_and_leaves_what_is_beside_the_arena_alone(data: Any) -> None:
    """Convolutions before a concatenation write into it, whose memory must be free as early as the first of them; a
    value that is read twice must stay as long as it is read."""
    batch, side = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 9))
    inputs = []
    for _ in range(data.draw(st.integers(1, 2))):
        layout = data.draw(st.sampled_from(["channels_last", "contiguous", "slice"]))
        inputs.append(
            Maker(torch.float32, layout, grad=False).activation(batch, data.draw(st.integers(1, 20)), side, side)
        )
    drawn = draw_program(data, inputs)
    program = encode(drawn.steps)
    assert list(decode(program)) == drawn.steps
    newest, first = len(drawn.values) - 1, len(inputs)
    results = [newest, *data.draw(st.lists(st.integers(first, max(first, newest - 1)), max_size=newest > first + 2))]
    size, without_overlap = arena_bytes(inputs, program, results)
    assert size <= without_overlap
    memory = torch.full((size + 192,), GUARD, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + 64
    arena = memory[start : start + size]
    shapes = [drawn.values[i].shape for i in results]
    outs = [torch.full(shape, torch.nan).contiguous(memory_format=torch.channels_last) for shape in shapes]
    torch.ops.fused_cnn.run_plan_into(inputs, drawn.constants, program, results, outs, arena, None)
    for out, i in zip(outs, results, strict=True):
        truth = drawn.values[i]
        # Chains of float32 sums of up to 360 products each, relative to the largest; a wrong address is off by as much.
        assert out.shape == truth.shape
        assert (out - truth).abs().max() <= 1e-4 * truth.abs().max().clamp_min(1e-3), (i, drawn.steps)
    assert bool((memory[:start] == GUARD).all() and (memory[start + size :] == GUARD).all())
    again = drawn.run(inputs, results)  # in memory of its own
    assert all(map(torch.equal, outs, again))
    without_memory = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in inputs]
    like = results_of(drawn.steps, without_memory)
    assert [out.stride() for out in again] == [like[i].stride() for i in results]


def chain(x: Tensor, widths: Sequence[int]) -> Drawn:
    drawn = Drawn(x)
    for width in widths:
        drawn.convolution(len(drawn.values) - 1, width, 3, 1, None, True)
    return drawn


def test_a_chain_takes_the_memory_of_two_activations_and_a_concatenation_that_of_one() -> None:
    x = Maker(torch.float32, grad=False).activation(2, 16, 8, 8)
    one = 2 * 8 * 8 * 16 * 4
    drawn = chain(x, [16] * 6)
    assert arena_bytes([x], encode(drawn.steps), [6]) == (2 * one, 5 * one)
    branches = chain(x, [16])
    for _ in range(3):
        branches.convolution(1, 16, 1, 1, None, True)
    branches.concatenation([2, 3, 4])
    branches.average(5)
    assert arena_bytes([x], encode(branches.steps), [6]) == (4 * one, 4 * one)  # their input, and all three as one


def into(inputs: list[Tensor], drawn: Drawn, results: list[int], **given: Any) -> list[Tensor]:
    """run_plan_into, with what is not given as it should be."""
    program = encode(drawn.steps)
    outs = [out.contiguous(memory_format=torch.channels_last) for out in drawn.run(inputs, results)]
    memory = torch.empty(arena_bytes(inputs, program, results)[0] + 64, dtype=torch.uint8)
    given = {"outs": outs, "arena": memory[-memory.data_ptr() % 64 :], "seconds": None, **given}
    torch.ops.fused_cnn.run_plan_into(inputs, drawn.constants, program, results, *given.values())
    return given["outs"]


def test_each_step_says_what_it_took() -> None:
    x = Maker(torch.float32, grad=False).activation(2, 16, 8, 8)
    drawn = chain(x, [16] * 3)
    seconds = torch.full((3,), -1.0, dtype=torch.float64)
    into([x], drawn, [3], seconds=seconds)
    assert bool((seconds > 0).all() and (seconds < 10).all())


def test_an_empty_batch_gives_empty_results() -> None:
    drawn = chain(torch.zeros(1, 16, 8, 8), [16, 24])
    seconds = torch.ones(2, dtype=torch.float64)
    into([torch.zeros(0, 16, 8, 8)], drawn, [2], seconds=seconds)
    assert not seconds.any()
    (out,) = torch.ops.fused_cnn.run_plan([torch.zeros(0, 16, 8, 8)], drawn.constants, encode(drawn.steps), [2])
    assert out.shape == (0, 24, 8, 8)


def wrong_programs() -> dict[str, tuple[list[int], list[int], str]]:
    steps = chain(torch.zeros(1, 16, 8, 8), [16, 24]).steps
    good = encode(steps)
    first, second = steps

    def encoded(step: Step) -> list[int]:
        return encode([first, step])

    return {
        "cut off": (good[:-1], [2], "ends within a step"),
        "unknown": ([*good, 17], [2], "kind 17"),
        "forward": (encoded(second._replace(reads=(2,))), [2], "reads value 2 of 2"),
        "negative": (encoded(second._replace(reads=(-1,))), [2], "reads value -1"),
        "constant": (encoded(second._replace(constants=(2, 1))), [2], "there are 2"),
        "channels": (encoded(second._replace(numbers=(24, 17, *second.numbers[2:]))), [2], "meets 16 channels"),
        "weight": (encoded(second._replace(numbers=(25, 16, 5, 5, *second.numbers[4:]))), [2], "packed must be"),
        "residual": (encoded(second._replace(reads=(1, 1))), [2], "its result's shape"),
        "result": (good, [3], "result 3"),
        "input": (good, [0], "result 0"),
        "twice": (good, [2, 2], "named once"),
        "stage": ([*good, Kind.STAGE, 2, 0, 2**40, 0, 0], [2], "ends within a step"),
        "lengths": ([*good, Kind.STAGE, 2, 0, 2, 0, 0, 2**62, 2**62], [2], "at least 1 convolution"),
        "concatenation": ([*good, Kind.CONCATENATION, 0], [2], "a value at least"),
        "large": ([*good, *(n for v in range(2, 62) for n in (Kind.CONCATENATION, 2, v, v))], [2], "is too large"),
        "pool": ([*good, Kind.MAX_POOL, 2, 3, 3, 1, 1, 9, 9, 1, 1, 0], [2], "at most half the kernel"),
    }


@pytest.mark.parametrize("name", wrong_programs())
def test_a_wrong_program_is_an_error_before_memory_is_touched(name: str) -> None:
    program, results, message = wrong_programs()[name]
    x = torch.zeros(1, 16, 8, 8)
    constants = chain(x, [16, 24]).constants
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_cnn.run_plan([x], constants, program, results)
    if name not in ("constant", "weight"):  # which no constants tell
        with pytest.raises(ValueError, match=message):
            arena_bytes([x], program, results)


def test_inputs_outs_arena_and_seconds_are_checked() -> None:
    x, other = torch.zeros(1, 16, 8, 8), torch.zeros(2, 16, 8, 8)
    drawn = chain(x, [16])
    for inputs, message in (
        ([], "an input at least"),
        ([x[0]], "4 dimensions"),
        ([x, other], "as many images"),
        ([x, x.bfloat16()], "dtype"),
        ([x.double()], "float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            drawn.run(inputs, [len(inputs)])
    assert torch.equal(into([x], drawn, [1])[0], drawn.run([x], [1])[0])
    strided = torch.zeros(1, dtype=torch.float64).expand(2)[::2]
    into([x], drawn, [1], arena=torch.empty(0, dtype=torch.uint8), seconds=strided)  # then it has one of its own
    assert strided[0] > 0
    memory = torch.empty(1 << 14, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 64 :]
    for wrong, message in (
        ({"arena": torch.zeros(64)}, "arena"),
        ({"arena": torch.zeros(129, dtype=torch.uint8)[1:]}, "arena"),
        ({"seconds": torch.zeros(2, dtype=torch.float64)}, "seconds"),
        ({"seconds": torch.zeros(1)}, "seconds"),
        ({"outs": []}, "as many outs"),
        ({"outs": [x, x]}, "as many outs"),
        ({"outs": [other]}, "the result's shape"),
        ({"outs": [x]}, "channels_last"),
        ({"outs": [x.bfloat16()]}, "dtype"),
        ({"outs": [memory[:4096].view(torch.float32).view(1, 8, 8, 16).permute(0, 3, 1, 2)], "arena": memory}, "share"),
    ):
        with pytest.raises(RuntimeError, match=message):
            into([x], drawn, [1], **wrong)


def test_the_average_is_exact_to_the_last_place_however_many_pixels() -> None:
    """Sums of sixty-four pixels are a float's, sums of these a double's."""
    for side, dtype in ((1, torch.float32), (7, torch.float32), (97, torch.float32), (7, torch.bfloat16)):
        x = Maker(dtype, grad=False).activation(3, 300, side, side)
        (out,) = torch.ops.fused_cnn.run_plan([x], [], encode([Step(Kind.AVERAGE, (0,))]), [1])
        truth = x.double().mean((2, 3), keepdim=True)
        unit = torch.finfo(dtype).eps
        # Of each sum of 64 a float's rounding per term at most, of terms of size one; and one rounding at the end.
        assert bool(((out - truth).abs() <= unit * truth.abs() + 64 * torch.finfo(torch.float32).eps).all())
