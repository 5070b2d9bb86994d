"""Every op x case x backend x dtype x layout against float64, and what must hold of every op: gradcheck, compile,
reruns."""

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import CONVOLUTIONS, Call, Recorder, call_packed_forms, check_packed, small
from torch import Tensor
from torch.utils import _pytree as pytree

import fused_cnn
from fused_cnn import _library
from fused_cnn._trees import leaves_of
from fused_cnn.ops import conv_bias_relu, pack_conv
from fused_cnn.ops._cases import LAYOUTS, Case, Maker, OpCases
from fused_cnn.testing import FIXED_BOUND, all_cases, compare, judge

ALL_CASES = all_cases()

DTYPES = {
    "native": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    # Triton's interpreter multiplies bfloat16 bit patterns; on a GPU all three are compiled.
    "triton": (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16),
}


CHEAPEST = 2  # real layers of an op that Triton's interpreter takes


def chosen(op_cases: OpCases, backend: str, dtype: torch.dtype, layout: str) -> list[Case]:
    """The cases in the sizes that tests run.

    On a CPU real layers in float16 are at 7 x 7 and in channels_last, because eager's convolutions in it are slow
    there. Triton's interpreter, which is slower, takes the cheapest real layers of those, and every awkward case in
    float32 and channels_last; in float16 and in the other layouts, which differ in casts and before the kernel, it
    takes a third of the awkward cases.
    """
    interpreted = backend == "triton" and DEVICE == "cpu"
    slow = interpreted or (dtype == torch.float16 and DEVICE == "cpu")
    awkward = [small(c) for c in op_cases.cases if not c.real]
    real = [small(c, 7 if slow else 14) for c in op_cases.cases if c.real and (layout == "channels_last" or not slow)]
    if not interpreted:
        return [*real, *awkward]
    real.sort(key=lambda c: sum(vars(op_cases.cost(c, 4)).values()))
    thirds = [awkward[i::3] for i in range(3)]
    if layout == "channels_last":
        return [*real[:CHEAPEST], *(awkward if dtype == torch.float32 else thirds[0])]
    return thirds[LAYOUTS.index(layout) - 1] if dtype == torch.float32 else []


def every_case() -> list[object]:
    params = []
    for op_cases in ALL_CASES:
        for backend in backends():
            if not _library.has_kernel(op_cases.decides, backend, DEVICE):
                continue
            for dtype, layout in itertools.product(DTYPES[backend], LAYOUTS):
                for case in chosen(op_cases, backend, dtype, layout):
                    name = f"{op_cases.name}-{backend}-{case.name}-{str(dtype)[6:]}-{layout}".replace(" ", "_")
                    params.append(pytest.param(op_cases, case, backend, dtype, layout, id=name))
    return params


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize(("op_cases", "case", "backend", "dtype", "layout"), every_case())
def test_forward_and_backward_agree_with_float64(
    op_cases: OpCases, case: Case, backend: str, dtype: torch.dtype, layout: str
) -> None:
    for comparison in compare(op_cases, case, backend, dtype, layout, DEVICE):
        assert comparison.ok, comparison


def test_the_fixed_bound_refuses_what_is_worse_than_a_bad_eager_result_and_nothing_that_is_as_good() -> None:
    """Both may call the same kernel of a library; twice its error is allowed where that is small."""
    truth, dtype = torch.ones(4, dtype=torch.float64), torch.float32
    fixed = FIXED_BOUND[dtype]
    for eager_is_off, is_off, ok in (
        (0.0, fixed / 2, False),
        (0.4 * fixed, 0.7 * fixed, True),
        (0.9 * fixed, 1.1 * fixed, False),
        (100 * fixed, 99 * fixed, True),
        (100 * fixed, 100 * fixed, True),
        (100 * fixed, 101 * fixed, False),
        (float("inf"), fixed / 2, True),
        (float("inf"), 2 * fixed, False),
        (float("inf"), float("inf"), False),
        (float("nan"), float("nan"), False),
    ):
        actual, eager = truth + is_off, truth + eager_is_off
        assert judge("out", actual, eager, truth, factor=2, rounding=16, dtype=dtype).ok == ok, (eager_is_off, is_off)


def smallest(op_cases: OpCases) -> Case:
    real = [c for c in op_cases.cases if c.shape[0] > 0 and c.shape[1] > 1]
    return min(real, key=lambda c: c.shape[0] * c.shape[1] * c.shape[2] * c.shape[3])


each_op = pytest.mark.parametrize("op_cases", ALL_CASES, ids=lambda o: o.name)


@each_op
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck_in_float64(op_cases: OpCases, check: Callable[..., bool]) -> None:
    args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float64, device=DEVICE))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def function(*tensors: Tensor) -> Tensor:
        values = [v.clone() if isinstance(v, Tensor) else v for v in leaves]  # an op may update buffers
        for i, tensor in zip(positions, tensors, strict=True):
            values[i] = tensor
        a, k = pytree.tree_unflatten(values, spec)
        return op_cases.op(*a, **k)

    assert check(function, [leaves[i] for i in positions], fast_mode=True)


@each_op
def test_backward_runs_without_an_autocast_that_its_forward_did_not_have(
    op_cases: OpCases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA such an autocast would reach into the kernels' own convolutions."""
    args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float32, device=DEVICE))
    leaves = leaves_of((args, kwargs))
    out = op_cases.op(*args, **kwargs)
    seen = []

    def watched(kernel: object) -> object:
        def call(*given: object) -> object:
            seen.append(torch.is_autocast_enabled(DEVICE))
            return kernel(*given)  # type: ignore[operator]

        return call

    for key, kernel in list(_library._kernels.items()):
        monkeypatch.setitem(_library._kernels, key, watched(kernel))
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not any(seen)
    assert seen or DEVICE == "cuda"  # where a library runs the op


@each_op
def test_compiles_without_graph_breaks(op_cases: OpCases) -> None:
    def make() -> tuple[tuple, dict]:
        return op_cases.make(smallest(op_cases), Maker(torch.float32, device=DEVICE))

    def run(function: object) -> list[Tensor]:
        args, kwargs = make()
        out = function(args, kwargs)  # type: ignore[operator]
        leaves = leaves_of((args, kwargs))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = run(torch.compile(lambda a, k: op_cases.op(*a, **k), fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(lambda a, k: op_cases.op(*a, **k)), strict=True):
        torch.testing.assert_close(actual, expected)


# Ops whose gradients are, on a GPU, partly PyTorch's own, which repeat themselves where
# torch.use_deterministic_algorithms asks for it.
PYTORCHS_GRADIENTS = ("conv_bias_relu", "inception", "conv1x1_bias_relu")


@each_op
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", [None, "triton"])
def test_reruns_are_bitwise_equal(op_cases: OpCases, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels in any case; what PyTorch computes for them where its own switch says so, which nothing of ours
    refuses."""
    if DEVICE == "cuda" and op_cases.name in PYTORCHS_GRADIENTS:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    if backend not in (None, *backends()) or not (
        backend is None or _library.has_kernel(op_cases.decides, backend, DEVICE)
    ):
        pytest.skip(f"no {backend} kernels here")
    interpreted = backend == "triton" and DEVICE == "cpu"
    real = next(c for c in op_cases.cases if c.real)
    case = small(real, 7) if interpreted else small(real)

    def run() -> list[Tensor]:
        args, kwargs = op_cases.make(case, Maker(torch.float32, device=DEVICE))
        out = op_cases.op(*args, **kwargs, backend=backend)
        leaves = leaves_of((args, kwargs))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    try:
        first = run()
        for _ in range(250 if DEVICE == "cuda" else 1 if interpreted else 5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@each_op
def test_an_expanded_gradient_gives_the_dense_one(op_cases: OpCases) -> None:
    def grads(dense: bool) -> list[Tensor]:
        args, kwargs = op_cases.make(smallest(op_cases), Maker(torch.float64, device=DEVICE))
        out = op_cases.op(*args, **kwargs)
        ones = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
        leaves = leaves_of((args, kwargs))
        return list(torch.autograd.grad(out, leaves, ones.contiguous() if dense else ones))

    for actual, expected in zip(grads(False), grads(True), strict=True):
        assert torch.equal(actual, expected)


# What other ops do on a CPU; tests/test_simt.py holds their fake kernels to their results.
GPU_ONLY = ["max_pool2d_index_bwd", "max_pool2d_index_fwd", "stem_fwd"]


def test_every_registered_op_has_a_native_cpu_kernel() -> None:
    missing = [n for n in _library.op_names() if not _library.has_kernel(n, "native", "cpu")]
    assert missing == GPU_ONLY


def recorded_calls() -> dict[str, Call]:
    """One call of every registered op: each public op forward and backward, and the packed forms that modules use."""
    with Recorder() as recorder:
        for op_cases in ALL_CASES:
            for case in op_cases.cases if op_cases.decides not in GPU_ONLY else ():
                if case.real:
                    args, kwargs = op_cases.make(small(case.batched(2)), Maker(torch.float32))
                    op_cases.op(*args, **kwargs, backend="native").square().sum().backward()
        call_packed_forms(torch.float32)
    return {name: calls[0] for name, calls in recorder.calls.items()}


def test_opcheck_passes_for_every_registered_op() -> None:
    if DEVICE != "cpu":
        pytest.skip("the CPU kernels share schema and fake kernel with CUDA's")
    calls = recorded_calls()
    missing = {f"fused_cnn::{name}" for name in _library.op_names() if name not in GPU_ONLY} - set(calls)
    assert not missing, f"no case calls {sorted(missing)}"
    for call in calls.values():
        torch.library.opcheck(call.op, call.args, call.kwargs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", ["add_relu", "conv1x1_bias_relu", "conv_bias_relu"])
def test_any_strides_and_offsets_give_the_reference_result(name: str, data: st.DataObject) -> None:
    """Inputs cut out of larger storage with random gaps, orders of dimensions and offsets."""

    def strided(shape: tuple[int, ...]) -> Tensor:
        order = data.draw(st.permutations(range(4)))
        gaps = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        offset = data.draw(st.integers(0, 5))
        base = torch.randn([shape[d] + gaps[d] for d in order] + [offset + 1], generator=generator)
        view = base[..., offset].permute([order.index(d) for d in range(4)])
        return view[tuple(slice(g, g + s) for g, s in zip(gaps, shape, strict=True))]

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    n, c, h, w, out = (data.draw(st.integers(1, high)) for high in (3, 19, 9, 9, 19))
    x = strided((n, c, h, w)).to(DEVICE)
    if name == "add_relu":
        residual = strided((n, c, h, w)).to(DEVICE)
        assert torch.equal(fused_cnn.add_relu(x, residual), torch.relu(x + residual))
        return
    k = 1 if name == "conv1x1_bias_relu" else data.draw(st.integers(1, min(h, w, 4)))
    stride = data.draw(st.integers(1, 3))
    weight, bias = strided((out, c, k, k)).to(DEVICE), torch.randn(out, generator=generator).to(DEVICE)
    options = {"stride": stride}
    if name == "conv_bias_relu":
        options |= {"padding": data.draw(st.integers(0, 3))}
    op = getattr(fused_cnn, name)
    expected = op(x.double(), weight.double(), bias.double(), backend="reference", **options)
    residual = strided(tuple(expected.shape)).to(DEVICE)
    expected = op(x.double(), weight.double(), bias.double(), residual.double(), backend="reference", **options)
    torch.testing.assert_close(op(x, weight, bias, residual, **options).double(), expected, rtol=1e-4, atol=1e-4)


X = torch.randn(2, 8, 5, 5)
WRONG = {
    "rank": (
        lambda: fused_cnn.add_relu(X[0], X[0]),
        ValueError,
        r"x must have 4 dimensions \(N, C, H, W\), got shape \(8, 5, 5\)",
    ),
    "integers": (
        lambda: fused_cnn.add_relu(X.long(), X.long()),
        TypeError,
        "must be float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "shape": (
        lambda: fused_cnn.add_relu(X, X[:1]),
        ValueError,
        r"residual must have x's shape \(2, 8, 5, 5\), got \(1, 8, 5, 5\)",
    ),
    "dtype": (
        lambda: fused_cnn.add_relu(X, X.double()),
        TypeError,
        "residual must have x's dtype torch.float32, got torch.float64",
    ),
    "device": (lambda: fused_cnn.add_relu(X, X.to("meta")), ValueError, "residual must be on x's device cpu, got meta"),
    "no output channel": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(0, 8, 3, 3)),
        ValueError,
        r"weight must have an output channel at least, got shape \(0, 8, 3, 3\)",
    ),
    "channels": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(4, 7, 3, 3)),
        ValueError,
        "x has 8 channels; a weight of shape",
    ),
    "not 1x1": (
        lambda: fused_cnn.conv1x1_bias_relu(X, torch.randn(4, 8, 3, 3)),
        ValueError,
        r"weight must be \(out, in, 1, 1\), got",
    ),
    "too small": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(4, 8, 7, 7)),
        ValueError,
        "larger than the padded input",
    ),
    "stride": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(4, 8, 3, 3), stride=0),
        ValueError,
        "stride and dilation must be at least 1",
    ),
    "bias": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(4, 8, 3, 3), torch.randn(5)),
        ValueError,
        r"bias must have shape \(4,\), got \(5,\)",
    ),
    "residual": (
        lambda: fused_cnn.conv_bias_relu(X, torch.randn(4, 8, 3, 3), None, X),
        ValueError,
        r"residual must have the result's shape \(2, 4, 3, 3\), got \(2, 8, 5, 5\)",
    ),
    "six weights": (lambda: fused_cnn.inception(X, [torch.randn(4, 8, 1, 1)], []), ValueError, "must be six each"),
    "backend": (
        lambda: fused_cnn.add_relu(X, X, backend="cuda"),
        ValueError,
        "backend must be one of reference, native, triton",
    ),
    # The registered ops guard themselves too: anyone can call them.
    "raw rank": (lambda: torch.ops.fused_cnn.add_relu_fwd(X[0], X[0]), RuntimeError, "x must have 4 dimensions"),
    "raw shape": (
        lambda: torch.ops.fused_cnn.add_relu_bwd(X, X[:1]),
        RuntimeError,
        "out must have the shape of grad_out",
    ),
    "raw dtype": (
        lambda: torch.ops.fused_cnn.add_relu_fwd(X.int(), X.int()),
        RuntimeError,
        "must be float64, float32, float16 or bfloat16",
    ),
    "raw packed": (
        lambda: torch.ops.fused_cnn.conv_bias_relu_packed_fwd(
            X, torch.zeros(64, dtype=torch.uint8), [4, 8, 3, 3], None, [1, 1], [0, 0], [1, 1], True
        ),
        RuntimeError,
        "packed must be the .* bytes",
    ),
    "raw kernel": (
        lambda: torch.ops.fused_cnn.conv_bias_relu_fwd(
            X, torch.ones(4, 8, 7, 7), None, None, [8, 8], [0, 0], [1, 1], 1, True
        ),
        RuntimeError,
        "larger than the padded input",
    ),
    "packed kernel": (
        lambda: conv_bias_relu(X, *pack_conv(torch.ones(4, 8, 7, 7), None, like=X), stride=8),
        RuntimeError,
        "larger than the padded input",
    ),
    "raw channels": (
        lambda: torch.ops.fused_cnn.conv_bias_relu_fwd(
            X, torch.randn(4, 9, 1, 1), None, None, [1, 1], [0, 0], [1, 1], 1, True
        ),
        RuntimeError,
        "x has 8 channels",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_refused_with_what_was_expected_and_what_came(what: str) -> None:
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()


def test_an_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cnn._backends, "triton_interprets", lambda: False)
    monkeypatch.setattr(fused_cnn._backends, "_found", {})
    with pytest.raises(
        fused_cnn._backends.BackendUnavailable, match=r"cannot run add_relu_fwd on cpu: .* GPUs only; .*"
    ):
        fused_cnn._candidates.resolve("add_relu_fwd", "triton", X)


def test_triton_refuses_float64_rather_than_losing_half_of_it() -> None:
    with pytest.raises(
        fused_cnn._backends.BackendUnavailable, match="add_relu_fwd in float64: its kernels compute in float32"
    ):
        fused_cnn.add_relu(X.double(), X.double(), backend="triton")


@pytest.mark.usefixtures("two_threads", "nan_filled_memory", "level")
def test_every_instruction_set_gives_the_same_results() -> None:
    for op_cases in (o for o in ALL_CASES if o.decides not in GPU_ONLY):
        for case in [c for c in op_cases.cases if not c.real][:6] + [c for c in op_cases.cases if c.real][:1]:
            for dtype in (torch.float32, torch.bfloat16):
                if op_cases in CONVOLUTIONS:
                    check_packed(op_cases, small(case), dtype, "channels_last")
                for comparison in compare(op_cases, small(case), "native", dtype):
                    assert comparison.ok, (op_cases.name, case.name, dtype, comparison)
