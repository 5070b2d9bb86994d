"""Whatever is done to a fused model, in whatever order, it does what the eager model does: hypothesis looks for an
order in which it does not."""

import copy
import os
import pickle
from typing import Any

import torch
from conftest import DEVICE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_changes import new, note, part_of
from torch import Tensor, nn

from fused_cnn import fuse_, refresh, unfuse_

# Errors relative to the whole output, for a dozen layers. In bfloat16 each layer rounds its result to 8 bits, eager's
# three times in a block, so the comparison finds only what is grossly wrong, as a skipped change is: float32 is where
# the numbers are held to.
BOUNDS = {torch.float32: 3e-4, torch.float64: 1e-7, torch.bfloat16: 0.15}
# A ReLU at zero passes a gradient in one arithmetic and not in the other.
GRADIENT_BOUNDS = {torch.float32: 0.03, torch.float64: 1e-5, torch.bfloat16: 0.5}
MODELS = ("torchvision", "timm", "inception", "own")
RELUS = {"torchvision": "layer1.0.relu", "timm": "layer1.0.act1", "own": "1.0.relu"}
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "SGD, foreach": (torch.optim.SGD, {"lr": 0.01, "foreach": True}),
    "SGD, fused": (torch.optim.SGD, {"lr": 0.01, "fused": True}),
    # Adam's first steps are the gradients' signs, which rounding decides for gradients that are zero but for it; a
    # large eps makes them proportional to the gradients.
    "Adam": (torch.optim.Adam, {"lr": 0.05, "eps": 1.0}),
    "Adam, foreach": (torch.optim.Adam, {"lr": 0.05, "eps": 1.0, "foreach": True}),
    "Adam, fused": (torch.optim.Adam, {"lr": 0.05, "eps": 1.0, "fused": True}),
}


def relative(a: Tensor, b: Tensor, least: float = 1e-12) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype, f"{a.shape}, {a.dtype} and {b.shape}, {b.dtype}"
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(least)).item()


class Twins(RuleBasedStateMachine):
    """A fused model and an eager one, to which the same is done."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: nn.Module
        self.eager: nn.Module

    @initialize(name=st.sampled_from(MODELS), fuses=st.booleans())
    def build(self, name: str, fuses: bool) -> None:
        self.name, self.dtype, self.handles, self.logs = name, torch.float32, [], ([], [])  # type: ignore[var-annotated]
        self.eager, self.fused = new(name), new(name)
        self.averages: Any = None
        self.relus: Any = None
        self.calls = 0
        if fuses:
            fuse_(self.fused)

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.fused, self.eager

    def x(self, number: int) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return torch.randn(number, 3, 32, 32, generator=generator).to(DEVICE, self.dtype)

    def is_comparable(self) -> bool:
        """In training and bfloat16 BatchNorm makes much of little, and what it makes stays in the weights."""
        return not (self.eager.training and self.dtype == torch.bfloat16)

    def agree(self, mine: Tensor, theirs: Tensor, bounds: dict[torch.dtype, float] = BOUNDS, where: str = "") -> None:
        error = relative(mine, theirs)
        assert error <= bounds[self.dtype if theirs.dtype != torch.bfloat16 else theirs.dtype], f"{where}: {error}"

    @rule(backend=st.sampled_from([None, None, "reference"]))
    def fuse(self, backend: str | None) -> None:
        fuse_(self.fused, backend=backend)

    @rule()
    def unfuse(self) -> None:
        unfuse_(self.fused)

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        for model in self.both():
            model.train(mode)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def convert(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        for model in self.both():
            model.to(dtype)
        self.averages = None

    @rule(memory_format=st.sampled_from([torch.channels_last, torch.contiguous_format]))
    def lay_out(self, memory_format: torch.memory_format) -> None:
        for model in self.both():
            model.to(memory_format=memory_format)

    @rule(assign=st.booleans(), factor=st.sampled_from([0.9, 1.1]))
    def load(self, assign: bool, factor: float) -> None:
        """The eager model's state, so that the twins are the same again in every bit."""
        # Layers' factors multiply, so only the first convolution's weight gets one.
        state = {k: v.clone() for k, v in self.eager.state_dict().items()}
        key = next(k for k in state if k.endswith(("conv1.weight", "0.weight")))
        state[key] *= factor
        for model in self.both():
            model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)

    @rule(number=st.sampled_from([1, 4, 5]), calls=st.sampled_from([1, 2, 18]))
    def forward(self, number: int, calls: int) -> None:
        number = max(number, 4) if self.eager.training else number
        x = self.x(number)
        with torch.no_grad():
            for _ in range(0 if self.eager.training else calls - 1):
                self.fused(x)  # until its weights are folded
            self.logs[0].clear()
            mine, theirs = self.fused(x), self.eager(x)
        if self.is_comparable():
            self.agree(mine, theirs, where="out")
        else:
            self.synchronise()

    @precondition(lambda self: self.dtype == torch.float32)
    @rule(grad=st.booleans())
    def forward_in_autocast(self, grad: bool) -> None:
        x = self.x(4)
        with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(grad):
            mine, theirs = self.fused(x), self.eager(x)
        assert mine.dtype == theirs.dtype
        if not self.eager.training:
            assert relative(mine.detach(), theirs.detach()) <= BOUNDS[torch.bfloat16]
        for log in self.logs:
            log.clear()  # of bfloat16's precision
        self.synchronise(compares=not self.eager.training)

    @rule()
    def inference(self) -> None:
        if not self.eager.training:
            x = self.x(2)
            with torch.inference_mode():
                self.agree(self.fused(x), self.eager(x), where="out")

    def warm(self) -> None:
        """Call the fused model until its weights are folded."""
        if not self.eager.training:
            with torch.no_grad():
                for _ in range(18):
                    self.fused(self.x(2))
        self.logs[0].clear()

    def gradients(self) -> None:
        x = self.x(6)
        found = []
        for model in self.both():
            model.zero_grad(set_to_none=True)
            own = x.clone().requires_grad_()
            out = model(own)
            (out.tanh() * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
            found.append({"x": own.grad} | {k: p.grad for k, p in model.named_parameters()})
        mine, theirs = found
        assert list(mine) == list(theirs)
        largest = max(g.double().norm().item() for g in theirs.values() if g is not None)
        for key, g in theirs.items():
            assert (g is None) == (mine[key] is None), key
            if g is not None and self.is_comparable():
                # A bias before BatchNorm has a gradient of nothing but rounding, and counts by the others' size.
                error = relative(mine[key], g, 1e-2 * largest)
                assert error <= GRADIENT_BOUNDS[self.dtype], f"{key}: {error}"

    @rule()
    def backward(self) -> None:
        self.gradients()
        self.synchronise()

    @rule(name=st.sampled_from(sorted(OPTIMIZERS)), steps=st.integers(1, 2))
    def optimize(self, name: str, steps: int) -> None:
        kind, options = OPTIMIZERS[name]
        optimizers = [kind(model.parameters(), **options) for model in self.both()]
        for _ in range(steps):
            self.gradients()
            self.warm()
            for log in self.logs:
                log.clear()
            for optimizer in optimizers:
                optimizer.step()
        x = self.x(4)
        if not self.eager.training:
            with torch.no_grad():
                self.agree(self.fused(x), self.eager(x), where="out after the step")
        self.synchronise()

    def synchronise(self, *, compares: bool = True) -> None:
        """Compare the states and have the same again, lest rounding add up over the steps."""
        if compares and self.is_comparable():
            self.states_agree()
        with torch.no_grad():
            mine = self.fused.state_dict(keep_vars=True)
            for key, value in self.eager.state_dict(keep_vars=True).items():
                if not torch.equal(mine[key], value):
                    mine[key].copy_(value)

    @precondition(lambda self: self.dtype == torch.float32)
    @rule()
    def average(self) -> None:
        if self.averages is None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
            self.averages = [torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=average) for m in self.both()]
        for averaged, model in zip(self.averages, self.both(), strict=True):
            averaged.update_parameters(model)
        x = self.x(4)
        with torch.no_grad():
            mine, theirs = (averaged.eval()(x) for averaged in self.averages)
        self.agree(mine, theirs, where="averaged")

    @precondition(lambda self: self.averages is not None)
    @rule()
    def swap_in_the_average(self) -> None:
        for averaged, model in zip(self.averages, self.both(), strict=True):
            with torch.no_grad():
                for p, q in zip(averaged.module.parameters(), model.parameters(), strict=True):
                    q.copy_(p)

    @precondition(lambda self: len(self.handles) < 6)
    @rule(part=st.sampled_from(["block", "conv", "bn", "stage", "relu", "pool"]))
    def hook(self, part: str) -> None:
        for model, log in zip(self.both(), self.logs, strict=True):
            try:
                module = part_of(model, self.name, part)
            except KeyError:  # not every model has each
                return
            handle = module.register_forward_hook(lambda m, i, out, log=log: note(log, part, out))
            self.handles.append(handle)

    @precondition(lambda self: self.handles)
    @rule()
    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @precondition(lambda self: self.name in RELUS)
    @rule()
    def replace_an_activation(self) -> None:
        parent, _, attribute = RELUS[self.name].rpartition(".")
        blocks = [model.get_submodule(parent) for model in self.both()]
        if self.relus is None:
            self.relus = [getattr(block, attribute) for block in blocks]
            for block in blocks:
                setattr(block, attribute, nn.Identity())
        else:
            for block, relu in zip(blocks, self.relus, strict=True):
                setattr(block, attribute, relu)
            self.relus = None

    @precondition(lambda self: not self.handles and self.relus is None)
    @rule(pickles=st.booleans())
    def go_on_with_a_copy(self, pickles: bool) -> None:
        old = self.both()
        self.fused, self.eager = (
            pickle.loads(pickle.dumps(model)) if pickles else copy.deepcopy(model) for model in old
        )
        if not self.eager.training:
            with torch.no_grad():
                for p in old[0].parameters():  # nobody's any more
                    p.zero_()
        self.averages = None

    @precondition(lambda self: not self.handles and self.dtype != torch.bfloat16)
    @rule(backend=st.sampled_from(["eager", "aot_eager"]), rare=st.integers(0, 9))
    def compile(self, backend: str, rare: int) -> None:
        if rare:  # it takes seconds
            return
        torch._dynamo.reset()
        compiled, x = torch.compile(self.fused, backend=backend, dynamic=False), self.x(4)
        with torch.no_grad():
            self.agree(compiled(x), self.eager(x), where="compiled")

    @rule()
    def write_unseen_and_refresh(self) -> None:
        for model in self.both():
            next(p for k, p in model.named_parameters() if p.dim() == 4 and "." in k).data.mul_(1.1)
        refresh(self.fused)

    def states_agree(self) -> None:
        if not hasattr(self, "fused"):
            return
        mine, theirs = self.fused.state_dict(), self.eager.state_dict()
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            if value.is_floating_point() and self.is_comparable():
                self.agree(mine[key], value, where=key)
            else:
                assert mine[key].dtype == value.dtype and mine[key].shape == value.shape
        assert [m.training for m in self.fused.modules()] == [m.training for m in self.eager.modules()]

    def outputs_agree(self) -> None:
        """Behind every rule, and with folded weights before the next one."""
        if hasattr(self, "fused") and not self.eager.training:
            x = self.x(2)
            with torch.no_grad():
                self.agree(self.fused(x), self.eager(x), where="out")

    def hooks_saw_the_same(self) -> None:
        if not hasattr(self, "fused"):
            return
        seen, expected = self.logs
        assert [label for label, _ in seen] == [label for label, _ in expected]
        for (label, mine), (_, theirs) in zip(seen, expected, strict=True) if self.is_comparable() else ():
            self.agree(mine, theirs, where=f"what a hook on {label} saw")
        seen.clear(), expected.clear()

    @invariant()
    def twins_are_alike(self) -> None:
        """In this order, whatever the order of invariants is: what hooks saw of one rule is compared, and forgotten,
        before the next one, which may change the dtype or call one twin more often."""
        self.states_agree()
        self.outputs_agree()
        self.hooks_saw_the_same()


def test_any_order_of_changes_keeps_the_twins_alike() -> None:
    examples = int(os.environ.get("FUSED_CNN_EXAMPLES", "40"))
    run_state_machine_as_test(
        Twins,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            derandomize=examples <= 40,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
