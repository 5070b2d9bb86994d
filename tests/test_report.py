"""The README's tables are those of the saved results, and what is said to have run on a GPU is what results show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fused_cnn import _sources
from fused_cnn.cli import _ran
from fused_cnn.cli.report import load_all, newest, rewritten, tables_of

ROOT = Path(__file__).resolve().parents[1]
NOW = _sources.hashes("cuda")
FACTS = {"device": "cuda", "device_name": "NVIDIA H200, sm_90, 139 GiB", "arch": "sm_90", "sources": NOW}


@pytest.mark.parametrize("page", ["README.md", "benchmarks/OPS.md"])
def test_pages_hold_what_report_makes_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    new, names = rewritten(text, tables_of(load_all([ROOT / "benchmarks" / "results"])))
    assert names and new == text, "run `make report`"


def run_of_the_tests(date: str, passed: bool = True, sources: Any = NOW) -> dict[str, Any]:
    ran = [{"op": "add_relu", "backend": "native", "dtype": "float16", "passed": passed}]
    return {"kind": "tests", **FACTS, "date": date, "sources": sources, "ran": ran}


def state(*results: dict[str, Any]) -> list[str]:
    """The row of add_relu, native, float16: its state on sm_90 and elsewhere."""
    headings, rows = _ran.table(results)
    assert headings[3] == "sm_90" and "sm_90" not in headings[4]
    (row,) = (r for r in rows if r[:2] == ["add_relu", "native"] and "float16" in r[2].split(", "))
    assert row[2] == "float16"  # the other dtypes have not run
    return row[3:]


def test_without_a_gpus_results_nothing_has_run() -> None:
    _, rows = _ran.table([{**run_of_the_tests("2026-11-25"), "device": "cpu"}])
    assert len(rows) == 17 and all(row[3:] == [_ran.NEVER] for row in rows)


def test_a_run_is_named_with_its_gpu_date_and_source() -> None:
    here, elsewhere = state(run_of_the_tests("2026-11-25T10:00:00"))
    assert here == f"NVIDIA H200, 2026-11-25, `{NOW['native']['add_relu'][:8]}`" and elsewhere == _ran.NEVER


def test_a_changed_source_makes_a_run_stale_until_it_is_run_again() -> None:
    old = run_of_the_tests("2026-11-25", sources={**NOW, "native": {**NOW["native"], "add_relu": "0123456789abcdef"}})
    assert state(old)[0] == "*stale*: NVIDIA H200, 2026-11-25, `01234567`"
    assert state(run_of_the_tests("2026-11-26"), old)[0].startswith("NVIDIA H200, 2026-11-26")


def test_a_failure_is_named_one() -> None:
    assert state(run_of_the_tests("2026-11-25"), run_of_the_tests("2026-11-26", passed=False))[0].startswith("**fails**: ")


def test_a_benchmark_does_not_hide_a_failed_test_of_the_same_sources() -> None:
    row = {"kind": "op", "op": "add_relu", "dtype": "float16", "times": {"native": {}}}
    bench = {"kind": "bench", **FACTS, "date": "2026-11-26", "rows": [row]}
    assert state(run_of_the_tests("2026-11-25", passed=False), bench)[0].startswith("**fails**: ")


def test_a_benchmark_is_evidence_because_it_checks_first() -> None:
    labels = {"kind": "op", "op": "add_relu", "case": "c", "batch": 1, "pass": "forward"}
    rows = [{**labels, "dtype": "float16", "times": {"native": {}, "eager": {}}}, {**labels, "dtype": "float32", "error": "wrong"}]
    assert state({"kind": "bench", **FACTS, "date": "2026-11-25", "rows": rows})[0].startswith("NVIDIA H200, 2026-11-25")


def test_a_kernels_hash_follows_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "CSRC", tmp_path)
    for file in ("common/rows.h", "common/cpu_vec.h", "common/launch.cuh", "room/cpu.cpp", "room/cuda.cu", "other/cuda.cu"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    before = {device: _sources.kernel_hash("room", "native", device) for device in ("cpu", "cuda")}
    touched = {
        "room/cuda.cu": {"cuda"}, "common/launch.cuh": {"cuda"}, "common/rows.h": {"cpu", "cuda"}, "room/cpu.cpp": {"cpu"},
        "common/cpu_vec.h": {"cpu"}, "other/cuda.cu": set(),
    }  # fmt: skip
    for file, devices in touched.items():
        (tmp_path / file).write_text("changed")
        now = {device: _sources.kernel_hash("room", "native", device) for device in ("cpu", "cuda")}
        assert {d for d in now if now[d] != before[d]} == devices, file
        before = now


def test_of_two_results_the_later_counts() -> None:
    row = {"kind": "op", "pass": "forward"}
    old, new = ({"kind": "bench", "device": "cpu", "date": f"2026-11-{day}", "rows": [row]} for day in (24, 25))
    assert [r["date"] for r in newest([new, old])] == ["2026-11-25"]


def test_inference_and_training_may_come_from_two_results() -> None:
    rows = [{"kind": "model", "pass": what} for what in ("inference", "training step")]
    dated = (("2026-11-24", rows), ("2026-11-25", rows[1:]))
    found = newest([{"kind": "bench", "device": "cuda", "date": date, "rows": of} for date, of in dated])
    assert [(r["table"], r["date"], len(r["rows"])) for r in found] == [("inference", "2026-11-24", 1), ("training", "2026-11-25", 1)]
