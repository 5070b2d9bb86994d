"""Shared set-up: Triton's interpreter where there is no GPU, torchvision beside a CPU build of torch, NaN-filled and
checked memory."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lost_context import pytest_runtest_call, pytest_runtest_teardown  # noqa: F401  hooks, as if they stood here

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core; tests that are about threads ask for more

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # float32's bounds are those of float32


def _define_torchvision_ops() -> None:
    """torchvision's wheels carry ops for CUDA builds of torch only; beside a CPU build its import wants these two
    declared."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        _define_torchvision_ops.library = library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_define_torchvision_ops()


@pytest.fixture(autouse=True, scope="session")
def small_inputs_are_worth_a_fused_run() -> Iterator[None]:
    """In training on a CPU too, where blocks leave them to PyTorch: most tests' inputs are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_cnn.nn.module.FusedModule._fused_pays", lambda self, x, pairs: True)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ran", type=Path, help="save here which op, backend and dtype ran, and whether it passed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none. Tests that compare an op's backend with float64 say so in their
    report, which reaches the process that writes the file."""
    if DEVICE == "cpu" and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    if params and {"op_cases", "backend", "dtype"} <= params.keys():
        item.user_properties.append(
            ("ran", (params["op_cases"].name, params["backend"], str(params["dtype"]).removeprefix("torch.")))
        )


_ran: dict[tuple[str, str, str], bool] = {}
_lost: list[str] = []  # tests that ended their process, of which xdist alone can tell


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "???":
        _lost.append(report.nodeid)
    for name, value in report.user_properties:
        if name == "ran" and not report.skipped and (report.when == "call" or report.failed):
            key = tuple(value)
            _ran[key] = _ran.get(key, True) and report.passed  # type: ignore[index, arg-type]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--ran")
    if path is None or hasattr(session.config, "workerinput"):
        return
    from fused_cnn.bench.facts import facts_of_run

    ran = [
        {"op": op, "backend": backend, "dtype": dtype, "passed": passed}
        for (op, backend, dtype), passed in sorted(_ran.items())
    ]
    chosen = " and ".join(filter(None, (session.config.option.keyword, session.config.option.markexpr)))
    reasons = [f"tests that are not {chosen!r}"] if chosen else []
    reasons += [f"{len(_lost)} tests that ended their process"] if _lost else []
    cut_off = exitstatus not in (0, 1) or session.shouldstop or session.shouldfail
    reasons += ["tests that were not reached"] if cut_off else []
    without = {"without": ", ".join(reasons)} if reasons else {}  # such a run clears no failure
    path.write_text(json.dumps({"kind": "tests", **facts_of_run(DEVICE), **without, "ran": ran}))


def backends() -> list[str]:
    """The backends that the op tests compare with the reference on this machine."""
    return ["native", "triton"] if importlib.util.find_spec("triton") else ["native"]


@pytest.fixture(autouse=True, scope="session")
def _no_tuning_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was measured on this machine, by its user, decides nothing here."""
    os.environ["FUSED_CNN_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Splits the CPU kernels' work over two threads, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element that a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def checked_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA kernels run on this processor, as a backend "simt": tensors lie in memory whose bounds they are held to,
    filled with NaN before anybody writes."""
    simt_backend = importlib.import_module("simt_backend")
    backends = importlib.import_module("fused_cnn._backends")
    if simt_backend.compiler() is None:
        pytest.skip("g++ is not installed")
    library = simt_backend.install()
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, "simt"))
    library.simt_install(True)
    yield
    library.simt_install(False)


@pytest.fixture(params=("generic", "avx2", "avx512", "avx512_bf16", "amx"))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels for lesser processors, run on this one."""
    from fused_cnn import _library

    best = _library.cpu_level()
    if not _library.set_cpu_level(request.param):
        pytest.skip(f"this processor has {best}, not {request.param}")
    yield request.param
    _library.set_cpu_level(best)
