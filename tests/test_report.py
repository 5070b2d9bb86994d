"""The README's tables are those of the saved results, and what is said to have run on a GPU is what results show."""

from pathlib import Path
from typing import Any

import pytest

from fused_cnn import _sources
from fused_cnn.bench.peers import COMPILERS, OURS
from fused_cnn.bench.report import plots, ran, rewritten, tables, tables_of
from fused_cnn.bench.results import load, load_all, newest

ROOT = Path(__file__).resolve().parents[1]
NOW = _sources.hashes("cuda")
FACTS = {"device": "cuda", "device_name": "NVIDIA H200, sm_90, 139 GiB", "arch": "sm_90", "sources": NOW}


@pytest.mark.parametrize("page", ["README.md", "benchmarks/RESULTS.md", "benchmarks/OPS.md", "benchmarks/KERNELS.md"])
def test_pages_hold_what_report_makes_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    new, names = rewritten(text, tables_of(load_all([ROOT / "benchmarks" / "results"])))
    assert names and new == text, "run `make report`"


def run_of_the_tests(date: str, passed: bool = True, sources: Any = NOW) -> dict[str, Any]:
    ran = [{"op": "add_relu", "backend": "native", "dtype": "float16", "passed": passed}]
    return {"kind": "tests", **FACTS, "date": date, "sources": sources, "ran": ran}


def state(*results: dict[str, Any]) -> list[str]:
    """The row of add_relu, native, float16: its state on sm_90 and elsewhere."""
    headings, rows = ran.table(results)
    assert headings[3] == "sm_90" and "sm_90" not in headings[4]
    (row,) = (r for r in rows if r[:2] == ["add_relu", "native"] and "float16" in r[2].split(", "))
    assert row[2] == "float16"  # the other dtypes have not run
    return row[3:]


def test_without_a_gpus_results_nothing_has_run() -> None:
    _, rows = ran.table([{**run_of_the_tests("2026-11-25"), "device": "cpu"}])
    assert len(rows) == 19 and all(row[3:] == [ran.NEVER] for row in rows)


def test_a_run_is_named_with_its_gpu_date_and_source() -> None:
    here, elsewhere = state(run_of_the_tests("2026-11-25T10:00:00"))
    assert here == f"NVIDIA H200, 2026-11-25, `{NOW['native']['conv'][:8]}`" and elsewhere == ran.NEVER


def test_a_changed_source_makes_a_run_stale_until_it_is_run_again() -> None:
    old = run_of_the_tests("2026-11-25", sources={**NOW, "native": {**NOW["native"], "conv": "0123456789abcdef"}})
    assert state(old)[0] == "*stale*: NVIDIA H200, 2026-11-25, `01234567`"
    assert state(run_of_the_tests("2026-11-26"), old)[0].startswith("NVIDIA H200, 2026-11-26")


def test_a_failure_is_named_one() -> None:
    assert state(run_of_the_tests("2026-11-25"), run_of_the_tests("2026-11-26", passed=False))[0].startswith(
        "**fails**: "
    )


def test_what_failed_in_other_sources_is_stale_and_named_a_failure() -> None:
    old = {**NOW, "native": {**NOW["native"], "conv": "0123456789abcdef"}}
    assert (
        state(run_of_the_tests("2026-11-25", passed=False, sources=old))[0]
        == "*stale*, failed: NVIDIA H200, 2026-11-25, `01234567`"
    )


def test_a_run_that_left_tests_out_does_not_clear_a_failure() -> None:
    failed, partly = (
        run_of_the_tests("2026-11-25", passed=False),
        {**run_of_the_tests("2026-11-26"), "without": "the layout offset"},
    )
    assert state(failed, partly)[0].startswith("**fails**: ")
    assert not state(failed, partly, run_of_the_tests("2026-11-27"))[0].startswith("**")
    assert not state(partly)[0].startswith("**")


def test_a_benchmark_does_not_hide_a_failed_test_of_the_same_sources() -> None:
    row = {"kind": "op", "op": "add_relu", "dtype": "float16", "times": {"native": {}}}
    bench = {"kind": "bench", **FACTS, "date": "2026-11-26", "rows": [row]}
    assert state(run_of_the_tests("2026-11-25", passed=False), bench)[0].startswith("**fails**: ")


def test_a_benchmark_is_evidence_because_it_checks_first() -> None:
    labels = {"kind": "op", "op": "add_relu", "case": "c", "batch": 1, "pass": "forward"}
    rows = [
        {**labels, "dtype": "float16", "times": {"native": {}, "eager": {}}},
        {**labels, "dtype": "float32", "error": "wrong"},
    ]
    bench = {"kind": "bench", **FACTS, "date": "2026-11-25", "rows": rows}
    assert state(bench)[0].startswith("NVIDIA H200, 2026-11-25")
    assert all(line[3:] == [ran.NEVER] for line in ran.table([{**bench, "checked": False}])[1])


def test_a_kernels_hash_follows_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "CSRC", tmp_path)
    for file in ("shared/rows.h", "cpu/simd.h", "cuda/launch.cuh", "room/cpu.cpp", "room/cuda.cu", "other/cuda.cu"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    before = {device: _sources.kernel_hash("room", "native", device) for device in ("cpu", "cuda")}
    touched = {
        "room/cuda.cu": {"cuda"}, "cuda/launch.cuh": {"cuda"}, "shared/rows.h": {"cpu", "cuda"},
        "room/cpu.cpp": {"cpu"},
        "cpu/simd.h": {"cpu"}, "other/cuda.cu": set(),
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
    assert [(r["table"], r["date"], len(r["rows"])) for r in found] == [
        ("inference", "2026-11-24", 1),
        ("training", "2026-11-25", 1),
    ]


def row(batch: int, **ms: float) -> dict[str, Any]:
    """A network's inference at so many milliseconds."""
    medians = {name.replace("_", " "): value / 1e3 for name, value in ms.items()}
    times = {name: {"median": t, "low": t, "high": t, "samples": 5} for name, t in medians.items()}
    labels = {
        "kind": "model",
        "model": "resnet50",
        "pass": "inference",
        "dtype": "bfloat16",
        "batch": batch,
        "bytes": 1,
        "flops": 1,
    }
    counted = {"launches": {"eager": 2, "fused": 1}, "peak": {"eager": 2, "fused": 1}, "limit": 1e-3}
    shares = {key: dict.fromkeys(medians, 1.0) for key in ("ratios", "gb_per_s", "tflop_per_s", "share_of_limit")}
    return {**labels, **counted, "times": times, **shares}


def result(date: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    facts = {"kind": "bench", **FACTS, "versions": {"torch": "2.11.0"}, "commit": "0123456789", "date": date}
    return {**facts, "rows": list(rows), **more}


def test_results_of_one_device_and_commit_are_one_in_which_the_later_row_counts() -> None:
    first = result(
        "2026-11-25T10", row(1, eager=4, fused=2, graph=1), row(8, eager=8, fused=4), {**row(32), "error": "lost"}
    )
    then = result("2026-11-25T11", row(1, eager=3, fused=1, compile=2), row(32, eager=9, fused=8))
    (found,) = newest([then, first])
    medians = {r["batch"]: {name: t["median"] * 1e3 for name, t in r["times"].items()} for r in found["rows"]}
    assert medians == {
        1: {"eager": 3, "fused": 1, "compile": 2, "graph": 1},
        8: {"eager": 8, "fused": 4},
        32: {"eager": 9, "fused": 8},
    }
    assert "error" not in found["rows"][2] and set(found["rows"][0]["ratios"]) == set(found["rows"][0]["times"])
    (elsewhere,) = newest([first, {**then, "commit": "another"}])
    assert [r["batch"] for r in elsewhere["rows"]] == [1, 32] and "graph" not in elsewhere["rows"][0]["times"]
    (twice,) = newest([result("2026-11-25", row(1, eager=4, graph=1), row(1, eager=3, compile=2))])  # of two processes
    assert [list(r["times"]) for r in twice["rows"]] == [["eager", "graph", "compile"]]


def test_a_variant_that_fails_later_is_not_shown_with_its_earlier_time() -> None:
    absent = {"graph": "RuntimeError: no capture"}
    old, new = row(1, eager=4, fused=2, graph=1), {**row(1, eager=4, fused=2), "absent": absent}
    text = tables_of([result("2026-11-25T10", old), result("2026-11-25T11", new)])["inference-cuda"]
    assert "CUDA graph ms" not in text
    assert "Not timed in 1 of 1 rows: CUDA graph (RuntimeError: no capture)." in text


def test_the_optimized_network_is_ours_and_has_a_column_where_it_was_timed() -> None:
    rows = [row(1, eager=4, fused=3, graph=2, optimized=1), row(8, eager=8, fused=4)]
    rows[0]["peak"] = {"eager": 2e6, "fused": 3e6, "optimized": 4e6}
    found = tables_of([result("2026-11-25", *rows)])
    text = found["inference-cuda"]
    assert "| 4 | 2 | 3 | 1 |" in text and "0.67x (CUDA graph)" in text and "| 8 |  | 4 |  |" in text
    assert "Fused is slower than its fastest peer in 1 of 2 rows." in text
    assert "Optimized is slower than its fastest peer in 0 of 1 rows." in text
    assert "| 2 -> 3 -> 4 |" in found["memory-inference-cuda"] and "| 2 -> 1 |" in found["memory-inference-cuda"]
    assert "ptimized" not in "".join(tables_of([result("2026-11-25", rows[1])]).values())


def verify_result(*variants: str) -> dict[str, Any]:
    time = {"ratio": 2.0, **{v: {"median": (i + 1) / 1e3} for i, v in enumerate(variants)}}
    traffic = {v: {"bytes": 1e6, "launches": 3} for v in (*variants, "minimum")}
    network = {"fused": [1], "skipped": [], "time": {"eval": time}, "traffic": {"eval": traffic}, "ok": True}
    return {"models": {"resnet50": {**network, "scores": {"error": 1e-6, "eager_error": 1e-6}}}}


def test_verifys_table_has_the_optimized_network_where_it_was_timed() -> None:
    (before, (old,)), (now, (new,)) = (
        tables.verify(verify_result("eager", "fused", *more)) for more in ((), ("optimized",))
    )
    assert "optimized ms" not in before and new[now.index("optimized ms")] == "3.0"
    assert [cell for cell, heading in zip(new, now, strict=True) if heading != "optimized ms"] == old


def test_bars_are_of_what_every_row_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    counted = [{"eager": 3, "fused": 2, "optimized": 2}, {"eager": 3, "fused": 2}]
    rows = [{**row(n, eager=2, fused=1), "traffic": of} for n, of in enumerate(counted, 1)]
    assert plots.traffic(result("2026-11-25", *rows), tmp_path / "traffic.png").exists()


def test_a_table_says_which_rows_it_has() -> None:
    text = tables_of(
        [result("2026-11-25", row(1, eager=4, fused=2), left_out=3, more_with_full={"inference": 5, "ops": 70})]
    )
    assert "3 more rows of this run were not measured." in text["inference-cuda"]
    assert "These are the telling rows; `pytest benchmarks --full` has 5 more." in text["inference-cuda"]


def kernel_row(
    variant: str, ms: float, *kernels: tuple[str, int, float], step: str = "training step"
) -> dict[str, Any]:
    labels = {"model": "resnet50", "batch": 256, "dtype": "bfloat16", "pass": step, "variant": variant}
    busy = sum(us for *_, us in kernels) / 1e3
    counted = {"launches": sum(n for _, n, _ in kernels), "peak": None}
    return {**labels, "ms": ms, "busy_ms": busy, **counted, "kernels": [list(kernel) for kernel in kernels]}


def test_what_deploys_a_fused_network_is_ours_and_has_columns_of_its_own() -> None:
    found = tables_of([result("2026-11-25", row(8, eager=9, onnxruntime=5, fused=4, fused_dynamic=3, fused_package=2))])
    text = found["inference-cuda"]
    assert "| fused ms | dynamic torch.compile of fused ms | AOTInductor package of optimized ms |" in text
    assert "| 9 | 5 | 4 | 3 | 2 |" in text and "1.25x (ONNX Runtime)" in text
    others = "3 dynamic torch.compile of fused, 2 AOTInductor package of optimized"
    assert f"| 9 | 5 (ONNX Runtime) | 4 | wins by 1.25x | {others} |" in found["headlines-cuda"]


def test_the_headline_names_the_fastest_peer_and_who_loses() -> None:
    steps = [kernel_row("eager", 50, ("a", 1, 1e3)), kernel_row("fused", 40, ("a", 1, 1e3))]
    inference = result(
        "2026-11-25",
        row(1, eager=4, fused=2, compile=9),
        row(256, eager=10, fused=9, compile=6, fused_graph=5, optimized=4),
    )
    text = tables_of([inference, {**result("2026-11-26", *steps), "kind": "kernels"}])["headlines-cuda"]
    labels = "| resnet50 | inference | bfloat16, batch 256 | NVIDIA H200 |"
    assert f"{labels} 10 | 6 (torch.compile) | 9 | **loses by 1.50x** | 4 optimized, 5 as a CUDA graph |" in text
    assert "| training step | bfloat16, batch 256 | NVIDIA H200 | 50 | 50 (eager) | 40 | wins by 1.25x |  |" in text


def test_kernels_of_one_name_are_added_and_the_rest_is_counted() -> None:
    product = "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int>"
    few = [(f"kernel_{i}", 1, 10.0) for i in range(tables.MOST)]
    fused = kernel_row("fused", 2, (product + ", 1", 3, 600.0), (product + ", 2", 1, 200.0), *few, step="inference")
    headings, rows = tables.kernels([fused, kernel_row("compile", 1, ("b", 1, 1.0)), {**fused, "variant": "eager"}])
    assert rows[0][headings.index("kernel") :] == ["`device_kernel GemmUniversal`", "4", "0.8", "89%"]
    assert [line[headings.index("launches")] for line in rows if "all others" in line] == ["1"]
    assert {line[headings.index("variant")] for line in rows} == {"fused", "torch.compile"}
    failed = {**kernel_row("fused", 1), "error": "its process was ended by SIGKILL"}
    assert "**failed**: its process was ended by SIGKILL" in tables.steps([failed])[1][0]
    assert tables.kernels([failed])[1] == []


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("void fused_cnn::(anonymous namespace)::bn_reduce_kernel<fused_cnn::bf16_t, true>(fused", "bn_reduce_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::Functor_add<c",
            "vectorized_elementwise_kernel Functor_add",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::Mul",
            "elementwise_kernel Mul",
        ),
        ("Memset (Device)", "Memset (Device)"),
        ("aten::convolution_backward", "aten::convolution_backward"),
        ("triton_poi_fused_add_relu_8", "triton_poi_fused_add_relu_8"),
    ],
)
def test_a_kernels_short_name_still_tells_it(kernel: str, short: str) -> None:
    assert tables.short_name(kernel) == short


def test_every_variant_that_is_timed_has_a_place_in_the_tables() -> None:
    assert set(tables.VARIANTS) >= {*COMPILERS, *OURS} and not set(tables.PEERS) & set(OURS)


def test_results_that_report_does_not_know_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "stage.json"
    file.write_text('{"stage": "build", "dry": "", "result": {"kernels": []}}')
    assert load(file) is None


def test_a_service_under_load_has_a_table() -> None:
    figures = {
        "seconds": [0.5, 1.5],
        "rounds": [2.0],
        "images_per_second": 2.04,
        "mean_batch": 7.69,
        "p50": 0.5,
        "p99": 1.5,
    }
    of = {"network": "resnet50", "clients": 16}
    rows = [{**of, "variant": variant, **figures} for variant in ("eager", "optimized")]
    loaded = result("2026-11-28", *rows, kind="load")
    text = tables_of([loaded, result("2026-11-28", row(1, eager=4, fused=2))])["load-cuda"]
    headings, _, *lines, _, facts = text.splitlines()
    assert headings == "| network | clients | variant | images/s | p50 ms | p99 ms | mean batch | answers |"
    assert lines == [
        f"| resnet50 | 16 | {variant} | 2.0 | 500 | 1500 | 7.7 | 2 |" for variant in ("eager", "optimized")
    ]
    assert "2026-11-28" in facts
