"""Building says in one line what is missing, and importing is quick, writes nothing and leaves the GPU alone."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

from fused_cnn import _builds, _library, _sources

ROOT = Path(__file__).resolve().parents[1]
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
# After a change by the test.
RUN = f"import runpy, sys; sys.argv = {list(BUILD)}; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that no test builds in the project's own folder."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "fused_cnn").mkdir()
    (tmp_path / "fused_cnn" / "__init__.py").write_text("")
    for name in ("_sources.py", "_builds.py"):
        shutil.copy(ROOT / "fused_cnn" / name, tmp_path / "fused_cnn")
    return tmp_path


def build(tree: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, *(before or BUILD)]
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "FORCE_CUDA", "CUDA_HOME")
    }
    return subprocess.run(script, cwd=tree, env=kept | environment, capture_output=True, text=True, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_compiler_is_named(tree: Path) -> None:
    line = last_line(build(tree, PATH="/nonexistent", FORCE_CUDA="0"))
    assert line.startswith("fused_cnn: no C++ compiler found") and "apt-get install g++" in line


def test_a_compiler_that_fails_says_what_is_needed(tree: Path) -> None:
    bad = tree / "cxx"
    bad.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo old 1.0 && exit 0\necho "unknown option -std=c++20" >&2; exit 1\n'
    )
    bad.chmod(0o755)
    line = last_line(build(tree, CXX=str(bad), FORCE_CUDA="0", MAX_JOBS="1"))
    assert line.startswith("fused_cnn: compiling csrc/") and "a C++20 compiler" in line


def test_an_old_torch_is_named(tree: Path) -> None:
    old = tree / "old" / "torch"
    (old / "include").mkdir(parents=True)
    (old / "version.py").write_text("__version__ = '2.4.1'\n")
    script = f"import sys; sys.path.insert(0, {str(old.parent)!r})"
    line = last_line(build(tree, "-c", f"{script}; {RUN}", FORCE_CUDA="0"))
    assert line.startswith("fused_cnn: torch 2.4.1 is too old: install torch>=2.10")


def test_required_cuda_without_nvcc_is_named(tree: Path) -> None:
    line = last_line(build(tree, "-c", f"import shutil; shutil.which = lambda *a, **k: None; {RUN}", FORCE_CUDA="1"))
    assert line.startswith("fused_cnn: FORCE_CUDA=1, but nvcc was not found")


@pytest.mark.parametrize("archs", ["sm_80", "8", "8.0;ninety", "9.0a+PTX+PTX"])
def test_a_wrong_arch_list_is_named(tree: Path, archs: str) -> None:
    nvcc = tree / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n")
    nvcc.chmod(0o755)
    shutil.rmtree(tree / "csrc")  # nothing to compile: the list is what is looked at
    (tree / "csrc").mkdir()
    cxx = tree / "cxx"
    cxx.write_text('#!/bin/sh\nfor a; do [ "$last" = -o ] && : > "$a"; last=$a; done; echo c++ 14.0\n')
    cxx.chmod(0o755)
    line = last_line(build(tree, CUDA_HOME=str(tree), CXX=str(cxx), TORCH_CUDA_ARCH_LIST=archs))
    assert line.startswith("fused_cnn: TORCH_CUDA_ARCH_LIST has ") and "expected all, or entries such as 8.0" in line


WITHOUT_CUTLASS = """
import pathlib
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda p: "cutlass_library" not in str(p) and is_file(p)
"""
FEW = ("conv/cuda_add_relu.cu", "conv/cuda.cu", "cuda/gemm/sm80.cu", "cuda/gemm/sm90a_128x128.cu", "conv/cpu.cpp")


@pytest.fixture
def fake_tools(tree: Path) -> dict[str, str]:
    """Compilers that write empty files and note how they were called, in the tree's `calls`; and a few sources alone,
    to be quick."""
    shutil.rmtree(tree / "csrc")
    for name in (*FEW, "build_facts.cpp"):
        (tree / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "csrc" / name, tree / "csrc" / name)
    writes = 'for a; do [ "$last" = -o ] && : > "$a"; last=$a; done'
    script = f'#!/bin/sh\necho "$@" >> calls\n{writes}\necho "release 13.0, V13.0.1"\n'
    for name in ("cxx", "bin/nvcc"):
        path = tree / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    return {"CUDA_HOME": str(tree), "CXX": str(tree / "cxx")}


@pytest.mark.parametrize(("limit", "jobs"), [(None, 3), ("max\n", 3), (str(11 << 30), 2)])
def test_compilers_share_the_memory_that_can_be_had(tree: Path, limit: str | None, jobs: int) -> None:
    """What the page cache would give back counts, and a container's limit does."""
    script = (
        "import os, pathlib, runpy, setuptools\n"
        "setuptools.setup = lambda **_: None\n"
        "os.sched_getaffinity = lambda _: range(64)\n"
        "read, is_file = pathlib.Path.read_text, pathlib.Path.is_file\n"
        f"said = {{'/proc/meminfo': 'MemFree: 100 kB\\nMemAvailable: {14 << 20} kB\\n',\n"
        f"    '/sys/fs/cgroup/memory.max': {limit!r},\n"
        f"    '/sys/fs/cgroup/memory.stat': 'anon {1 << 30}\\nfile {9 << 30}\\n'}}\n"
        "pathlib.Path.read_text = lambda p, *a, **k: said.get(str(p)) or read(p, *a, **k)\n"
        "pathlib.Path.is_file = lambda p: said[str(p)] is not None if str(p) in said else is_file(p)\n"
        "print(runpy.run_path('setup.py')['max_jobs'](4.5))\n"
    )
    done = build(tree, "-c", script, FORCE_CUDA="0")
    assert done.returncode == 0 and done.stdout.split() == [str(jobs)], done.stderr


def test_an_old_setuptools_is_named(tree: Path) -> None:
    line = last_line(build(tree, "-c", f"import setuptools; setuptools.__version__ = '76.1.0'; {RUN}", FORCE_CUDA="0"))
    assert line.startswith("fused_cnn: setuptools 76.1.0 is too old") and "pip install 'setuptools>=77'" in line


def archs_built(tree: Path, tools: dict[str, str], **environment: str) -> list[str]:
    """The architectures that a room's kernels are compiled for."""
    (tree / "calls").unlink(missing_ok=True)
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = build(tree, **tools, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (call,) = nvcc_calls(tree, "csrc/conv/cuda_add_relu.cu")
    return re.findall(r"code=((?:sm|compute)_\w+)", call)


def with_gpu(tree: Path, *capabilities: str) -> dict[str, str]:
    """An environment whose nvidia-smi names these GPUs."""
    smi = tree / "smi" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f"#!/bin/sh\nprintf '{''.join(c + chr(92) + 'n' for c in capabilities)}'\n")
    smi.chmod(0o755)
    return {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}"}


def test_without_a_word_the_build_is_for_the_gpu_at_hand_or_for_one_of_each_generation(
    tree: Path, fake_tools: dict[str, str]
) -> None:
    assert archs_built(tree, fake_tools, **with_gpu(tree)) == ["sm_80", "sm_90a", "sm_100", "compute_100"]
    assert archs_built(tree, fake_tools, **with_gpu(tree, "9.0", "9.0")) == ["sm_90a"]
    assert archs_built(tree, fake_tools, **with_gpu(tree, "8.6", "12.0")) == ["sm_86", "sm_120"]
    every = ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert archs_built(tree, fake_tools, **with_gpu(tree, "9.0"), TORCH_CUDA_ARCH_LIST="all") == every


def test_a_gpu_that_nvcc_does_not_know_is_none_to_build_for(tree: Path, fake_tools: dict[str, str]) -> None:
    nvcc = tree / "bin" / "nvcc"
    nvcc.write_text(
        nvcc.read_text() + "[ $1 = --list-gpu-arch ] && printf 'compute_80\\ncompute_90\\ncompute_120\\n'; true\n"
    )
    assert archs_built(tree, fake_tools, **with_gpu(tree, "6.1", "9.0")) == ["sm_90a"]
    assert archs_built(tree, fake_tools, **with_gpu(tree, "6.1")) == ["sm_80", "sm_90a", "sm_100", "compute_100"]


def pretend(tree: Path, **facts: str) -> None:
    """A CUDA library that a build left: what it says of itself."""
    (tree / "fused_cnn" / "_C_cuda.so").write_bytes(
        b"\x7fELF fused_cnn build facts: " + json.dumps(facts).encode() + b"\0"
    )


def test_a_second_build_keeps_the_architectures_of_the_first(tree: Path, fake_tools: dict[str, str]) -> None:
    """`make test` behind a `make demo` that was given a list must not compile everything again."""
    both = ["sm_80", "sm_90a"]
    for gpus, expected in (((), both), (("8.6",), both), (("10.0",), ["sm_100"])):  # sm_80 runs on 8.6, neither on 10.0
        pretend(tree, cuda_archs="8.0;9.0a")
        assert archs_built(tree, fake_tools, **with_gpu(tree, *gpus)) == expected


def test_a_library_built_elsewhere_of_these_sources_is_kept_and_one_of_others_is_not(
    tree: Path, fake_tools: dict[str, str]
) -> None:
    recipe = hashlib.sha256((tree / "setup.py").read_bytes()).hexdigest()[:16]
    sources = run_path(str(tree / "fused_cnn" / "_sources.py"))["library_hash"]("cuda")
    carried = {
        "sources": sources,
        "recipe": recipe,
        "cuda_archs": "9.0a",
        "cutlass": "",
        "cuda": "12.9",
        "machine": platform.machine(),
    }
    as_good = ({}, {"cuda_archs": "8.0;9.0a"}, {"cuda_archs": "9.0a 10.0+PTX"})  # more architectures do no harm
    others = ({"sources": "0"}, {"recipe": "0"}, {"machine": "pdp11"}, {"cuda": "14.0"})
    others += ({"cuda_archs": "8.0"}, {"cuda_archs": "9.0"}, {"cuda_archs": "8.0;9.0a+PTX"})
    for changed, kept in (*((other, True) for other in as_good), *((other, False) for other in others)):
        shutil.rmtree(tree / "build", ignore_errors=True)
        pretend(tree, **(carried | changed))
        done = build(tree, "-c", f"{WITHOUT_CUTLASS}\n{RUN}", TORCH_CUDA_ARCH_LIST="9.0a", **fake_tools)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("_C_cuda.so was built elsewhere, of these sources: kept" in done.stdout) == kept
        assert (_builds.facts_in(tree / "fused_cnn" / "_C_cuda.so") == carried | changed) == kept


def test_nothing_stays_of_a_source_that_went(tree: Path, fake_tools: dict[str, str]) -> None:
    archs_built(tree, fake_tools, TORCH_CUDA_ARCH_LIST="9.0a")
    made = tree / "build" / "_C_cuda"
    assert (made / "conv_cuda_add_relu.o").exists()
    (tree / "csrc" / "conv" / "cuda_add_relu.cu").unlink()
    done = build(tree, TORCH_CUDA_ARCH_LIST="9.0a", **fake_tools)
    assert done.returncode == 0 and (made / "conv_cuda.o").exists(), done.stdout + done.stderr
    assert not list(made.glob("conv_cuda_add_relu.*"))


def test_a_changed_schema_is_compiled_and_makes_another_library(tree: Path, fake_tools: dict[str, str]) -> None:
    shutil.copy(ROOT / "csrc" / "schemas.cpp", tree / "csrc")
    op, found = tree / "fused_cnn" / "ops" / "room" / "op.py", []
    op.parent.mkdir(parents=True)
    for argument in ("Tensor x", "Tensor y"):
        op.write_text(f'import torch\ndefine(\n    "f({argument}) "\n    "-> Tensor",\n    None,\n)\n')
        done = build(tree, FORCE_CUDA="0", **fake_tools)
        assert done.returncode == 0, done.stdout + done.stderr
        call = [line for line in (tree / "calls").read_text().splitlines() if "-c csrc/schemas.cpp" in line][-1]
        assert f'-DFUSED_CNN_SCHEMAS="f({argument}) -> Tensor", ' in call
        found.append(run_path(str(tree / "fused_cnn" / "_sources.py"))["library_hash"]("cpu"))
    assert found[0] != found[1]


def test_the_library_has_the_schema_of_every_op() -> None:
    schemas = {schema.partition("(")[0]: schema for schema in _sources.schemas()}
    assert sorted(schemas) == _library.op_names()
    for name, schema in schemas.items():
        assert str(torch._C.parse_schema(f"fused_cnn::{schema}")) == str(_library.kernel(name, "native")._schema)
        assert not _library.cpu.facts or schema.encode() in _library.cpu.file.read_bytes()


def nvcc_calls(tree: Path, file: str) -> list[str]:
    return [call for call in (tree / "calls").read_text().splitlines() if f"-c {file}" in call]


@pytest.mark.parametrize(
    ("archs", "hopper", "others"),
    [
        ("8.0;9.0a", ["sm_90a"], ["sm_80"]),
        ("9.0a", ["sm_90a"], []),
        ("8.0;12.0+PTX", [], ["sm_80", "sm_120", "compute_120"]),
    ],
)
def test_products_are_built_for_their_own_architectures(
    tree: Path, fake_tools: dict[str, str], archs: str, hopper: list[str], others: list[str]
) -> None:
    headers = tree / "site" / "cutlass_library" / "source" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (headers / "version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    done = build(tree, PYTHONPATH=str(tree / "site"), TORCH_CUDA_ARCH_LIST=archs, **fake_tools)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, expected in (("sm90a_128x128", hopper), ("sm80", others)):
        calls = nvcc_calls(tree, f"csrc/cuda/gemm/{name}.cu")
        assert len(calls) == bool(expected)
        assert all(f"code={code}" in call for call in calls for code in expected)
    (room,) = nvcc_calls(tree, "csrc/conv/cuda.cu")
    assert (
        f"-DFUSED_CNN_GEMM_SM90A={int(bool(hopper))}" in room and f"-DFUSED_CNN_GEMM_SM80={int(bool(others))}" in room
    )


def test_without_cutlass_the_rest_is_built_and_a_line_says_what_is_missing(
    tree: Path, fake_tools: dict[str, str]
) -> None:
    done = build(tree, "-c", f"{WITHOUT_CUTLASS}\n{RUN}", TORCH_CUDA_ARCH_LIST="9.0a", **fake_tools)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "CUTLASS's headers were not found" in done.stdout and "`pip install --no-deps nvidia-cutlass==" in done.stdout
    )
    assert not nvcc_calls(tree, "csrc/cuda/gemm/sm90a_128x128.cu")
    (room,) = nvcc_calls(tree, "csrc/conv/cuda.cu")
    assert "-DFUSED_CNN_GEMM_SM90A=0" in room


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('fused_cnn build facts: {"ops": ""}\0', "(invalid ELF header|file too short)"),
        ("of 2025", "b.so is of another version of fused_cnn"),
        (None, "b.so is not there"),
    ],
)
def test_a_library_that_does_not_load_is_one_line(tmp_path: Path, text: str | None, error: str) -> None:
    if text is not None:
        (tmp_path / "b.so").write_text(text)
    library = _library.NativeLibrary(tmp_path / "b.so", "cuda")
    library.load()
    assert library.loaded is None and re.search(error, library.error) and "\n" not in library.error


@pytest.mark.skipif(not _library.cuda.file.exists(), reason="no nvcc at build time")
def test_the_cuda_library_needs_nothing_that_a_cpu_build_of_torch_lacks() -> None:
    library = _library.NativeLibrary(_library.cuda.file, "cuda")
    library.load()
    assert library.error == ""
    for op in library.facts["ops"].split():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_cnn::{op}", "CUDA"), op


def test_the_cpu_library_registers_what_its_facts_say() -> None:
    for op in _library.cpu.facts["ops"].split():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_cnn::{op}", "CPU"), op


ASKED_IF_THERE = {
    *("PyDict_GetItemWithError", "PyDict_Next", "PyDict_Size", "PyErr_Clear", "PyObject_GetAttr", "PyObject_Type"),
    *("PyBool_FromLong", "PyByteArray_AsString", "PyBytes_AsString", "PyBytes_FromStringAndSize", "PyCFunction_NewEx"),
    *("PyTuple_GetItem", "PyTuple_Size", "Py_DecRef", "Py_IsInitialized"),
    *("_ZNK2at10TensorBase8_versionEv", "_ZN2at13globalContextEv", "_ZNK2at7Context16userEnabledCuDNNEv"),
    *("_ZNK2at7Context18deterministicCuDNNEv", "_ZNK2at7Context23deterministicAlgorithmsEv"),
    "_ZNK2at7Context14allowTF32CuDNNESt8optionalINS_9Float32OpEE",
}


def test_a_library_needs_no_python() -> None:
    """One file serves every Python, and every PyTorch: of both it may want what is the same in all of them alone."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("binutils is not installed")
    for library in (_library.cpu, _library.cuda):
        if library.file.exists():
            listed = subprocess.run(
                [tool, "-D", "--undefined-only", library.file], capture_output=True, text=True, check=True
            ).stdout
            wanted = re.findall(r"(?m)^ +([Uw]) ([^\s@]+)$", listed)  # what is versioned is the C library's
            strange = [(k, n) for k, n in wanted if re.match(r"Py|_ZNK?[0-9]*(c10|2at|5torch)", n)]
            # csrc/unchanged.cpp and define_ops.cpp ask the interpreter that is there, by its stable interface, and do
            # without it.
            strange = [n for kind, n in strange if kind == "U" or n not in ASKED_IF_THERE]
            assert wanted and not strange, f"{library.file.name} wants {strange}"


IMPORT = """
import sys, time, torch
start = time.perf_counter()
import fused_cnn
seconds = time.perf_counter() - start
for name in ("typer", "rich", "triton", "torchvision", "timm", "transformers", "matplotlib"):
    assert name not in sys.modules, name
assert not torch.cuda.is_initialized()
print(seconds)
"""


def test_import_is_quick_and_light(tmp_path: Path) -> None:
    """The best of ten: other processes share the machine."""
    seconds = []
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if min(seconds) < 0.3:
            return
    raise AssertionError(f"import fused_cnn took {min(seconds):.2f} s beyond torch's own import")


def test_import_writes_no_file(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment = os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(p for p in (ROOT / "fused_cnn").rglob("*") if "__pycache__" not in p.parts)
    subprocess.run([sys.executable, "-c", "import fused_cnn"], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
    assert sorted(p for p in (ROOT / "fused_cnn").rglob("*") if "__pycache__" not in p.parts) == before
