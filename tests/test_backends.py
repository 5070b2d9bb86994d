"""Which backend is chosen where something is missing: the next best for "auto", one clear error for an explicit one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_cnn
from fused_cnn import _backends, _builds, _candidates, _library
from fused_cnn._backends import BackendUnavailable
from fused_cnn._tables import Table
from fused_cnn.ops import _conv
from fused_cnn.ops._conv import on_16_bytes

CUDA = torch.device("cuda", 0)
HOPPER = {"ops": "", "sources": "", "cuda": "13.0", "cuda_archs": "9.0a", "cutlass": "4.2.0"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a Hopper GPU, a driver for CUDA 13 and everything built for it; the call takes things away."""
    monkeypatch.setattr(_backends, "_found", {})
    monkeypatch.setattr(_candidates._tables, "_tables", {CUDA: Table()})

    def machine(
        facts: dict[str, str] | None = None, capability: tuple[int, int] = (9, 0), driver: int | None = 13000,
        error: str = "",
        triton: bool = True,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        _backends._found.clear()
        monkeypatch.setattr(_backends, "driver_version", lambda: driver)
        monkeypatch.setattr(_backends._sources, "library_hash", lambda device: "")
        monkeypatch.setattr(_library.cuda, "file", _library.cpu.file)  # one that exists
        monkeypatch.setattr(_library.cuda, "facts", HOPPER | (facts or {}))
        monkeypatch.setattr(_library.cuda, "loaded", None if error else object())
        monkeypatch.setattr(_library.cuda, "error", error)
        for op in _library.op_names():
            monkeypatch.setitem(_library._implemented, (op, "native", "cuda"), not error)
        monkeypatch.setattr(_backends, "_missing_for_triton", lambda: "")
        if not triton:
            monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)

    return machine


def chosen(op: str, dtype: torch.dtype = torch.bfloat16, elements: int = 1 << 24) -> str:
    return _candidates.best(op, CUDA, dtype, *([elements] if op == "add_relu_fwd" else []))


def convolution(kernel: int, dtype: torch.dtype = torch.bfloat16) -> str:
    weight = torch.empty(8, 8, kernel, kernel, device="meta", dtype=dtype)
    return _candidates.best("conv_bias_relu_fwd", CUDA, dtype, weight, (0, 0), 1)


class OnGpu:
    device, dtype = CUDA, torch.bfloat16


def refused(backend: str) -> str:
    """What an explicit backend says of a tensor on the GPU."""
    with pytest.raises(BackendUnavailable) as caught:
        _candidates.resolve("add_relu_fwd", backend, OnGpu())  # type: ignore[arg-type]
    return str(caught.value)


def test_with_all_there_native_kernels_run(gpu: Callable[..., None]) -> None:
    gpu()
    assert chosen("bn_relu_concat_fwd") == "native"
    assert _backends.outlook(None, CUDA) == "native on cuda:0: CUDA kernels"


def test_the_gpus_table_is_read_before_native_kernels_run_by_name_or_compiled(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither call asks the table for a backend, but the CUDA library has its tiles from there."""
    gpu()
    read, graphs = [], []
    monkeypatch.setattr(_candidates._tables, "table", read.append)
    assert _candidates.resolve("concat_bias_relu_fwd", "native", OnGpu()) == "native" and read == [CUDA]  # type: ignore[arg-type]

    assert chosen("add_relu_fwd") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # known by now; torch.compile would use the GPU
    read.clear()

    @torch.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if chosen("add_relu_fwd") == "triton" and chosen("concat_bias_relu_fwd") == "native" else x

    assert compiled(torch.zeros(2)).sum() == 2 and read
    assert [n.op for n in graphs[0].graph.nodes] == ["placeholder", "call_function", "output"]  # asks no GPU anything


def test_a_candidate_that_was_measured_to_be_faster_on_an_architecture_runs_there(gpu: Callable[..., None]) -> None:
    gpu()
    assert chosen("add_relu_fwd") == "triton" and chosen("add_relu_fwd", elements=(1 << 24) - 1) == "native"
    gpu(facts={"cuda_archs": "8.0"}, capability=(8, 0))
    assert chosen("add_relu_fwd") == "native"
    gpu(triton=False)
    assert chosen("add_relu_fwd") == "native"


# what is wrong, and what an explicit native says of it
BROKEN = {
    "another architecture": (
        {"capability": (8, 0)},
        "built for compute capability 9.0a, but the GPU has 8.0: set TORCH_CUDA_ARCH_LIST=8",
    ),
    "an old driver": ({"driver": 12080}, "built with CUDA 13.0, but the driver supports CUDA 12.8"),
    "a library that does not load": (
        {"error": "undefined symbol: x"},
        "the CUDA library does not load: undefined symbol: x",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_build_that_does_not_fit_leaves_the_work_to_triton_and_says_why_when_asked_for(
    gpu: Callable[..., None], what: str
) -> None:
    broken, message = BROKEN[what]
    gpu(**broken)
    assert chosen("add_relu_fwd") == "triton"
    assert chosen("add_relu_fwd", torch.float64) == "reference"  # Triton's kernels compute in float32
    # cuDNN's kernels before Triton's, but for products.
    assert convolution(3) == convolution(1, torch.float32) == "reference" and convolution(1) == "triton"
    assert message in refused("native") and "pip install -e ." in refused("native")
    outlook = _backends.outlook(None, CUDA)
    assert outlook.startswith("triton on cuda:0: Triton kernels; native is off: ") and message in outlook


def test_without_triton_too_pytorch_runs(gpu: Callable[..., None]) -> None:
    gpu(capability=(8, 0), triton=False)
    assert chosen("add_relu_fwd") == "reference"
    assert "Triton is not installed; `pip install triton`" in refused("triton")


def test_a_triton_that_does_not_import_is_off(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtriton.so: wrong ELF class")

    gpu(capability=(8, 0))
    monkeypatch.setattr(_backends.importlib, "import_module", broken)
    assert chosen("add_relu_fwd") == "reference"
    assert "Triton does not import: ImportError: libtriton.so: wrong ELF class" in refused("triton")


def test_without_what_triton_compiles_its_launcher_with_it_is_off(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = _backends._missing_for_triton
    gpu(capability=(8, 0))
    monkeypatch.setattr(_backends, "_missing_for_triton", looks)
    monkeypatch.setattr(_backends.shutil, "which", lambda name: None)
    assert chosen("add_relu_fwd") == "reference"
    assert "Triton compiles its launcher with a C compiler, and there is none" in refused("triton")


def test_without_cutlass_native_runs_and_says_what_is_missing(gpu: Callable[..., None]) -> None:
    gpu({"cutlass": ""})
    assert convolution(1) == "native"
    assert "built without CUTLASS; `pip install --no-deps nvidia-cutlass==" in _backends.outlook(None, CUDA)


def test_a_driver_that_cannot_be_asked_is_trusted(gpu: Callable[..., None]) -> None:
    gpu(driver=None)
    assert chosen("bn_relu_concat_fwd") == "native"


def test_each_gpu_of_a_machine_is_asked_by_itself(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (8, 0))
    assert chosen("bn_relu_concat_fwd") == "native"
    assert _candidates.best("bn_relu_concat_fwd", torch.device("cuda", 1), torch.bfloat16) == "triton"


def test_a_library_of_other_sources_is_said_to_be_one(gpu: Callable[..., None]) -> None:
    gpu({"sources": "0123456789abcdef"})
    assert "built of other sources than csrc/ holds now" in _backends.status("native", CUDA).reason


def test_fuse_says_which_backend_will_run() -> None:
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18(weights=None)
    report = fused_cnn.fuse_(network)
    assert report.runs.startswith("native on cpu: C++ kernels, instruction set ") and report.runs in str(report)
    assert report.runs.endswith("model.to(memory_format=torch.channels_last) makes it faster")
    assert "channels_last" not in fused_cnn.fuse_(fused_cnn.unfuse_(network), backend="reference").runs
    fused_cnn.unfuse_(network).to(memory_format=torch.channels_last)
    assert "channels_last" not in fused_cnn.fuse_(network).runs
    pool = torch.nn.Sequential(torch.nn.Linear(2, 2), fused_cnn.nn.MaxPool2d(2, backend="reference"))
    assert "channels_last" not in fused_cnn.fuse_(pool).runs
    empty = fused_cnn.fuse_(torch.nn.Sequential(torch.nn.ReLU()))
    assert empty.runs == ""  # nowhere yet


BUILT = {"cuda": "13.0", "cuda_archs": "8.0;9.0a;10.0;12.0+PTX"}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
def test_cuda_kernels_run_where_their_architectures_say(capability: tuple[int, int]) -> None:
    assert _builds.mismatch(BUILT, 13000, capability) == ""


def test_a_mismatch_with_driver_or_gpu_is_one_line() -> None:
    assert _builds.mismatch(BUILT, 12080, (9, 0)).startswith("built with CUDA 13.0, but the driver supports CUDA 12.8")
    line = _builds.mismatch(BUILT, 13000, (7, 5))
    assert (
        line == "built for compute capability 8.0;9.0a;10.0;12.0+PTX, but the GPU has 7.5: set TORCH_CUDA_ARCH_LIST=7.5"
    )
    assert _builds.mismatch({"cuda": "13.0", "cuda_archs": "9.0a"}, 13010, (10, 0)) != ""
    assert (
        _builds.mismatch(BUILT, 13000, (13, 0)) == ""
        and _builds.mismatch({**BUILT, "cuda": "13.2"}, 13000, (12, 0)) == ""
    )
    # PTX of a CUDA that is newer than the driver.
    assert _builds.mismatch({**BUILT, "cuda": "13.2"}, 13000, (13, 0)) != ""
    assert _builds.covers("10.0f", (10, 3)) and not _builds.covers("10.0a", (10, 3))
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in _builds.mismatch({"cuda": "13.0", "cuda_archs": "8.0"}, 13000, (9, 0))


@pytest.mark.parametrize(
    ("device", "address", "copied"), [("cuda", 4096, False), ("cuda", 4098, True), ("cpu", 4098, False)]
)
def test_what_the_librarys_gradients_are_given_on_a_gpu_lies_on_16_bytes(
    device: str, address: int, copied: bool
) -> None:
    """Native kernels are held to it by the stand-in for a GPU (tests/simt); this is what Triton's and the modules'
    convolutions ask."""

    class Given:
        def __init__(self) -> None:
            self.device = torch.device(device)

        def data_ptr(self) -> int:
            return address

        def clone(self) -> str:
            return "a copy"

    given = Given()
    assert on_16_bytes(given) == ("a copy" if copied else given)  # type: ignore[arg-type]


def test_a_block_is_packed_for_kernels_that_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for one that gave wrong results on this GPU, which is known once the GPU's table has been read; nor for
    another backend."""
    like: Any = SimpleNamespace(device=torch.device("cuda"))
    key = ("inception_packed_fwd", "native", "cuda")

    def read(backend: str, device: torch.device) -> bool:
        monkeypatch.setitem(_library._implemented, key, verdict)
        return True

    monkeypatch.setattr(_conv, "ready", read)
    monkeypatch.setitem(_library._implemented, key, True)
    for verdict in (False, True):
        assert _conv.runs_packed(like, key[0], None) == _conv.runs_packed(like, key[0], "native") == verdict
        assert not _conv.runs_packed(like, key[0], "triton") and not _conv.runs_packed(like, key[0], "reference")
