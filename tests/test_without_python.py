"""An optimised network as a graph of torch.export's, and as a package that a C++ program runs in a process without
Python (examples/run_package.cpp)."""

import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fused_cnn import _library, models, optimize
from fused_cnn.nn import BasicBlock
from fused_cnn.plan.export import exported, package

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ("-std=c++20", "-O0", f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include")
LINK = (f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-ltorch_cpu", "-lc10", "-ldl")

pytestmark = pytest.mark.skipif(_library.cpu.loaded is None, reason="not built")


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.ResNet(BasicBlock, (1, 1), num_classes=10, planes=(16, 32)).eval()


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


class Deployed(NamedTuple):
    program: Path
    package: Path
    inputs: Path
    results: Path

    def run(self, *libraries: Path) -> subprocess.CompletedProcess[str]:
        """In an empty environment, which names no Python and no folder to look for libraries in."""
        command = [*self, *libraries]
        return subprocess.run(command, env={}, cwd=self.program.parent, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    if CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("deployed")
    made = Deployed(*(folder / name for name in ("run_package", "network.pt2", "inputs.pt", "results.pt")))
    command = [CXX, *FLAGS, ROOT / "examples" / "run_package.cpp", "-o", made.program, *LINK]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as compiler:  # beside AOTInductor's
        fast = optimize(network(), images())
        assert package(fast, made.package) == str(made.package)
        torch.save([images()], made.inputs)
        torch.save([fast(images())], made.results)
        _, wrong = compiler.communicate()
    assert compiler.returncode == 0, wrong
    return made


def test_a_package_runs_in_a_process_without_python(deployed: Deployed) -> None:
    tool = shutil.which("ldd")
    for file in (deployed.program, _library.cpu.file) if tool else ():
        needed = subprocess.run([str(tool), file], capture_output=True, text=True, check=True).stdout
        names = [line.split()[0] for line in needed.splitlines()]
        assert "libtorch_cpu.so" in names and not any("python" in name for name in names)
    done = deployed.run(_library.cpu.file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("result 0: 20 elements, which differ by 0.0e+00")


def test_without_the_library_it_says_which_op_is_missing(deployed: Deployed) -> None:
    done = deployed.run()
    assert done.returncode == 1 and "Could not find schema for fused_cnn::run_plan" in done.stderr, done.stderr


def test_weights_packed_for_another_instruction_set_are_refused(deployed: Deployed, tmp_path: Path) -> None:
    """Shown by a library that names another one and brings the real library."""
    source, other = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text('extern "C" const char* fused_cnn_cpu_level() { return "another"; }\n')
    real = f"-Wl,--no-as-needed,{_library.cpu.file}"
    subprocess.run([str(CXX), "-shared", "-fPIC", source, real, "-o", other], check=True)
    done = deployed.run(other)
    wrong = f"its weights are packed for {_library.cpu_level()}, and this processor has another"
    assert done.returncode == 1 and wrong in done.stderr, done.stderr


def test_another_result_than_the_saved_one_is_seen(deployed: Deployed, tmp_path: Path) -> None:
    torch.save([torch.load(deployed.results)[0] * 1.001], tmp_path / "results.pt")
    done = deployed._replace(results=tmp_path / "results.pt").run(_library.cpu.file)
    assert done.returncode == 1 and "another than the saved one" in done.stderr, done.stderr


class Between(nn.Module):
    """What no program knows lies between two, and is part of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.second = network()
        self.slope = nn.Parameter(torch.rand(8))
        self.second.conv1 = nn.Conv2d(8, 16, 3, stride=2, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | Sequence[Tensor]]:
        x = torch.prelu(self.first(x), self.slope) + y
        return {"scores": self.second(x), "others": [x.sin(), y]}


@torch.no_grad()
def test_an_exported_plan_gives_what_the_network_gives() -> None:
    model, inputs = Between().eval(), (images(), torch.rand(2, 8, 1, 1))
    fast = optimize(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):  # which is no part of the plan
        program = exported(fast)
    expected = model(*inputs)
    for weight in model.parameters():  # the program's are its own
        weight.zero_()
    fast.refresh()
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for module in (program.module(), torch.export.load(saved).module()):
        torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_program_is_constants_and_one_op() -> None:
    program = exported(optimize(network(), images()))
    ours = [node for node in program.graph.nodes if "fused_cnn" in str(node.target)]
    assert [str(node.target) for node in ours] == ["fused_cnn.run_plan.default"]
    assert {t.dtype for t in program.state_dict.values()} == {torch.uint8}  # packed, and no weight beside them


def test_what_has_no_plan_is_not_exported() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum())

    with pytest.raises(ValueError, match=r"exported: the example's shape has no plan: .*gives the host a value"):
        exported(optimize(Reads(), images()))
