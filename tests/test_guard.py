"""scripts/guard.py sees each way in which a number can become worse."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def guard() -> Any:
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("guard", ROOT / "scripts" / "guard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "guard.json").read_text())
    return found


def test_the_same_numbers_are_fine_and_the_table_is_written_as_it_is_read(guard: Any, table: dict[str, Any]) -> None:
    assert guard.compare(table, table) == ([], [])
    assert json.loads(guard.written(table)) == table


def test_a_model_that_moves_more_is_worse_and_one_that_moves_less_is_better(guard: Any, table: dict[str, Any]) -> None:
    now = copy.deepcopy(table)
    now["models"]["resnet50 fused inference"]["traffic"] += 1
    now["models"]["googlenet fused inference"]["launches"] -= 1
    worse, better = guard.compare(table, now)
    assert len(worse) == 1 and worse[0].startswith("resnet50 fused inference: traffic ")
    assert len(better) == 1 and better[0].startswith("googlenet fused inference: launches ")


def test_a_kernel_that_spills_a_new_one_and_a_lost_one_are_seen(guard: Any, table: dict[str, Any]) -> None:
    now = copy.deepcopy(table)
    compiler = next(c for c in now["kernels"] if c.startswith("nvcc"))
    rows = now["kernels"][compiler]
    spills, lost = list(rows)[:2]
    rows[spills]["spilled"] += 8
    rows["new: kernel, sm_80"] = rows.pop(lost)
    worse, _ = guard.compare(table, now)
    expected = (f"{spills}: spilled 0 -> 8", f"{lost}: in the table, but gone", "new: kernel, sm_80: not in the table")
    assert sorted(worse) == sorted(f"{compiler}, {line}" for line in expected)


def test_other_compilers_and_architectures_are_not_compared(guard: Any, table: dict[str, Any]) -> None:
    now = copy.deepcopy(table)
    now["kernels"] = {
        "nvcc 99.0": {},
        **{c: {k: v for k, v in r.items() if k.endswith("sm_80")} for c, r in table["kernels"].items()},
    }
    assert guard.compare(table, now) == ([], ["not compared: the table has no nvcc 99.0"])


def test_instances_of_a_kernel_are_one_row_with_the_largest_numbers(guard: Any) -> None:
    costs = {"registers": 10, "spilled": 0, "stack": 0, "shared": 64}
    kernel = {"source": "room_cuda", "name": "kernel<float>", "arch": "sm_80", **costs}
    check = {
        "nvcc": "13.0",
        "triton": "3.9.0",
        "kernels": [kernel, {**kernel, "name": "kernel<double>", "registers": 20}],
    }
    assert guard.kernels([check]) == {"nvcc 13.0": {"room_cuda: kernel, sm_80": {**costs, "registers": 20}}}
