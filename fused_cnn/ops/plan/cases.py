"""What a plan's steps cost. It has no cases of its own: its steps are other ops', and tests/test_plan.py runs whole
networks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..._trees import tensors
from .._cases import OpCases
from .._cost import Arguments, Cost, engine_conv, tensor_bytes
from ..conv.cases import stage_cost
from ..inception.cases import packed_cost
from .op import Kind, Step, decode, results_of, step_flops


class StepCost(NamedTuple):
    """What one step launches, reads and writes, and the operations of its products, of which Winograd's form spares
    some."""

    launches: int
    read: int
    written: int
    flops: int
    flops_saved: int


def step_cost(step: Step, values: Sequence[Tensor], out: Tensor, constants: Sequence[Tensor]) -> StepCost:
    """`values` are tensors, with or without memory, of the program's values' shapes."""
    x, first = values[step.reads[0]], step.constants[0]
    packed = constants[first : first + step.constants[1]]
    read, written, flops = sum(tensor_bytes(values[i]) for i in step.reads), tensor_bytes(out), 0
    cost = Cost()
    if step.kind is Kind.CONVOLUTION:
        shape, window = step.numbers[:4], list(pairwise(step.numbers[4:10]))[::2]
        cost = engine_conv(x, shape, *window)[1]
    elif step.kind is Kind.STAGE:
        names = ("geometry", "lengths", "shortcut", "projects")
        cost = stage_cost({"x": x, **dict(zip(names, step.stage(), strict=True))}, out)
        read = cost.reads["x"] * tensor_bytes(x)
    elif step.kind is Kind.INCEPTION:
        cost = packed_cost({"x": x, "packed": packed, "channels": step.numbers[:6], "kernels": step.numbers[6:]}, out)
        read = cost.reads["x"] * tensor_bytes(x)
    elif step.kind is Kind.CONCATENATION:  # convolutions write into it
        return StepCost(0, 0, 0, 0, 0)
    flops = step_flops(step, values, out)
    again = cost.scratch + cost.rewrites * written
    return StepCost(cost.launches, read + cost.reads_more + again, written + again, flops, cost.flops_saved)


def plan_cost(args: Arguments, results: Sequence[Tensor] | None) -> Cost:
    """The sum of its steps'; what lies between them is written and read inside."""
    inputs, constants = args["inputs"], args["constants"]
    steps = list(decode(args["program"]))
    values = results_of(steps, [x.to("meta") for x in inputs])
    made = values[len(inputs) :]
    costs = [step_cost(step, values, out, constants) for step, out in zip(steps, made, strict=True)]
    # What is given to be written is counted as such.
    given = sum(tensor_bytes(t) for name in ("outs", "arena", "seconds") for t in tensors(args.get(name)))
    scratch = max(0, sum(c.written for c in costs) - sum(map(tensor_bytes, results or ())) - given)
    return Cost(
        sum(c.launches for c in costs),
        dict.fromkeys(("inputs", "constants", "outs", "arena", "seconds"), 0),
        reads_more=sum(c.read for c in costs) - scratch,
        scratch=scratch,
        flops_saved=sum(c.flops_saved for c in costs),
    )


COSTS = {"run_plan": plan_cost, "run_plan_into": plan_cost}
CASES: list[OpCases] = []
