"""Benchmarks: a row that takes its process with it costs that row alone, and the rows that are run by default are the
telling ones."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_cnn.bench import network_benches, peers
from fused_cnn.bench.benches import Bench, Prepared, extremes, measured
from fused_cnn.bench.ceilings import Ceilings
from fused_cnn.bench.network_benches import NetworkBench
from fused_cnn.bench.results import load
from fused_cnn.bench.worker import Worker, WorkFailed
from fused_cnn.measure import Work
from fused_cnn.testing import all_cases

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = Ceilings(1e10, {"float32": 1e11})


class Sum(Bench):
    """A small piece of work with a peer that does as its name says."""

    kind = "op"
    room = "sums"

    def __init__(self, peer: str, *, captured: bool = False) -> None:
        super().__init__(dtype=torch.float32, device="cpu")
        object.__setattr__(self, "peer", peer)
        object.__setattr__(self, "captured", captured)

    @property
    def labels(self) -> dict[str, Any]:
        return {"op": "sum", "peer": self.peer, "dtype": "float32", "pid": os.getpid()}

    def check(self) -> None:
        pass

    def make(self) -> Prepared:
        work = Prepared({"eager": lambda: torch.ones(3), "fused": lambda: torch.ones(3)}, bytes=12, flops=3)
        if self.captured:
            work.captures = {"peer": self._peer}
        else:
            work.add_peers({"peer": self._peer}, bound=0.1)
        return work

    def _peer(self) -> Work:
        if self.peer == "exits":
            os._exit(7)
        if self.peer == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.peer == "raises":
            raise RuntimeError("Offset increment outside graph capture")
        return lambda: torch.ones(3)


def test_a_peer_that_ends_its_process_costs_one_row() -> None:
    with Worker() as worker:
        first, exits, second, killed = (
            measured(worker, Sum(peer), 0, CEILINGS) for peer in ("adds", "exits", "adds", "is killed")
        )
    assert exits["error"] == "its process ended with exit code 7" and exits["peer"] == "exits" and "times" not in exits
    assert killed["error"] == "its process was ended by SIGKILL"
    assert set(first["times"]) == set(second["times"]) == {"eager", "fused", "peer"}
    assert len({first["pid"], second["pid"], os.getpid()}) == 3  # each in another process, none in this one


def test_calls_of_one_room_share_a_process_until_one_fails() -> None:
    with Worker() as worker:
        first, again = (worker.call("a", os.getpid) for _ in range(2))
        assert worker.call("a", torch.get_num_threads) == torch.get_num_threads()
        with pytest.raises(WorkFailed, match=r"ValueError: .*nonsense"):
            worker.call("a", int, "nonsense")
        assert first == again != worker.call("a", os.getpid) != worker.call("b", os.getpid)


def test_a_row_is_checked_unless_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bench: Bench) -> None:
        raise AssertionError("wrong numbers")

    monkeypatch.setattr(Sum, "check", wrong)
    with pytest.raises(AssertionError, match="wrong numbers"):
        Sum("adds").run(0, CEILINGS)
    assert Sum("adds").run(0, CEILINGS, check=False)["times"]


def test_an_optimized_network_with_wrong_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = NetworkBench(
        model="resnet18", batch=1, direction="inference", size=64, dtype=torch.float32, device="cpu", backend=None
    )
    bench.check()
    monkeypatch.setattr(network_benches, "optimize", lambda model, images, **_: lambda x: 1.01 * model(x))
    with pytest.raises(AssertionError, match=r"resnet18, float32, inference: .*scores, optimized"):
        bench.check()


@pytest.mark.parametrize(("factor", "absent"), [(1.0, set()), (1.01, {"fused package"})])
def test_a_package_is_timed_where_its_numbers_are_right_and_its_folder_removed(
    monkeypatch: pytest.MonkeyPatch, factor: float, absent: set[str]
) -> None:
    files = []
    monkeypatch.setattr(network_benches, "package", lambda model, path: files.append(Path(path)) or model)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda model: lambda x: factor * model(x))
    work = deployed(monkeypatch, "inference").make()
    assert work.variants.keys() == {"eager", "fused", "optimized", *network_benches.DEPLOYED} - absent
    why = work.counted.get("absent", {})
    assert why.keys() == absent and all("off eager's" in reason for reason in why.values())
    assert [file.parent.exists() for file in files] == [False]


def test_what_deploys_a_network_is_not_timed_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deployed(monkeypatch, "training step").make().variants.keys() == {"eager", "fused"}


def deployed(monkeypatch: pytest.MonkeyPatch, direction: str) -> NetworkBench:
    """A small network's bench that is asked for what deploys one, without peers and without a compiler."""
    monkeypatch.setattr(peers, "runtimes", lambda *_: {})
    monkeypatch.setattr(network_benches, "peaks_in_children", lambda _: {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    small = {"model": "resnet18", "batch": 2, "size": 64, "dtype": torch.float32, "device": "cpu"}
    return NetworkBench(**small, direction=direction, compilers=network_benches.DEPLOYED)


def test_a_capture_that_fails_leaves_the_other_variants_times() -> None:
    row = Sum("raises", captured=True).run(0, CEILINGS)
    assert set(row["times"]) == {"eager", "fused"} and row["absent"] == {
        "peer": "RuntimeError: Offset increment outside graph capture"
    }
    assert set(Sum("adds", captured=True).run(0, CEILINGS)["share_of_limit"]) == {"eager", "fused", "peer"}


def test_a_limit_is_a_bound_of_what_is_really_done() -> None:
    ceilings = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e10, "float64": 5e10}, cache=1000)
    assert ceilings.limit(2000, 100, "float32") == (2e-7, "memory")
    assert ceilings.limit(2000, 10**6, "float32") == (1e-5, "products")
    assert ceilings.limit(999, 100, "float32") == (1e-9, "cache")
    assert ceilings.rate("bfloat16") == 1e11 and ceilings.rate("float64") == 5e10
    assert Ceilings(1e10, {"bfloat16": 1e10}).limit(999, 100, "bfloat16") == (999e-10, "memory")  # an old result's


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    """benchmarks/conftest.py."""
    pytest.importorskip("pytest_benchmark")
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_telling_rows_are_few_and_of_every_kind(suite: ModuleType) -> None:
    telling, every = suite.rows(full=False), suite.rows(full=True)
    names = {bench.name for bench in telling}
    assert names < {bench.name for bench in every} and len(names) == len(telling) < len(every) / 5
    ops, networks = ([bench for bench in telling if bench.kind == kind] for kind in ("op", "model"))
    assert {bench.op for bench in ops} == {op_cases.name for op_cases in all_cases()}
    assert set(Counter((b.op, b.dtype, b.direction) for b in ops).values()) == {2} and len({b.dtype for b in ops}) == 2
    assert {(b.model, b.direction) for b in networks} == {
        (m, d) for m in suite.MODELS for d in ("inference", "training step")
    }
    assert all(bench.compilers == ("compile",) for bench in networks) and not any(bench.compilers for bench in ops)


@pytest.mark.parametrize("op_cases", all_cases(), ids=lambda op_cases: op_cases.name)
def test_the_layers_of_the_telling_rows_differ_most(op_cases: Any) -> None:
    real = [case for case in op_cases.cases if case.real]

    def intensity(case: Any) -> float:
        cost = op_cases.cost(case, 4)
        return round(cost.forward_flops / cost.forward_bytes, 2)

    least, most = extremes(op_cases, real)
    assert least != most
    assert intensity(least) == min(map(intensity, real)) and intensity(most) == max(map(intensity, real))


def test_pytest_benchmarks_says_what_it_left_out_and_leaves_a_result(suite: ModuleType, tmp_path: Path) -> None:
    chosen = [bench.name for bench in suite.rows(full=False) if bench.labels.get("op") == "add_relu"][-2:]
    file = tmp_path / "benchmarks.json"
    command = [sys.executable, "-m", "pytest", "--benchmark-only", f"--benchmark-json={file}", "--seconds", "0"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    command += ["-p", "no:cacheprovider", *(f"benchmarks/test_ops.py::test_op[{name}]" for name in chosen)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "2 rows: the telling rows" in done.stdout
        and "rows to go: 1; " in done.stdout
        and "with --full, take " in done.stdout
    )
    document = json.loads(file.read_text())
    result = load(file)
    assert result is not None and result["left_out"] == 0 and result["more_with_full"]["ops"] > 400
    for bench, row in zip(document["benchmarks"], result["rows"], strict=True):
        assert bench["stats"]["median"] == pytest.approx(row["times"]["fused"]["median"])
