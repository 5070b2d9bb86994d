"""scripts/gpu.sh: what means something without a GPU runs here, on a small bit of work; what fails, hangs or has no
time harms no other."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import DEVICE

import fused_cnn.cli
from fused_cnn.bench.results import load_all
from fused_cnn.testing import all_cases

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import gpu_evidence  # noqa: E402
import gpu_runner  # noqa: E402
import gpu_summary  # noqa: E402
import small_cases  # noqa: E402
from gpu_runner import Outcome, Piece, Runner  # noqa: E402

HANGS = 'trap "" INT; (while :; do echo >>beats; sleep 0.05; done) & sleep 1000'  # and so does what it started
EVIDENCE = ("tests", "networks", "ops", "kernels")


def started(*arguments: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | {"PATH": path}
    )


def gpu_sh(*arguments: str) -> tuple[int, str, str]:
    process = started(*arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def shell(name: str, script: str, seconds: float = 1, **more: Any) -> Piece:
    return Piece(name, ["bash", "-c", script], seconds, **more)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs pieces into tmp_path, in tmp_path / "work", with less patience than for real ones; returns what became of
    them."""
    (tmp_path / "work").mkdir()
    for name, value in {"LEAST": 0.4, "GRACE": 0.3, "FRESH": 0.1, "ROOT": tmp_path / "work"}.items():
        monkeypatch.setattr(gpu_runner, name, value)

    def run(*pieces: Piece, seconds: float = 20, **options: Any) -> list[Outcome]:
        with Runner(tmp_path, seconds, **options) as runner:
            runner.run(pieces)
        return runner.outcomes

    return run


@pytest.mark.skipif(DEVICE == "cuda", reason="there the pieces themselves run, this test in one of them")
def test_a_dry_run_is_green_small_and_no_evidence(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    code, out, err = gpu_sh("quick", str(tmp_path), "--dry")
    assert code == 0, out + err
    found = {path.stem: path for path in tmp_path.iterdir()}
    assert len(found) <= 8 and sum(path.stat().st_size for path in found.values()) < 1 << 20
    said = json.loads(found["summary"].read_text())
    assert {piece["state"] for piece in said["pieces"] if piece["why"] != gpu_runner.NOT_DRY} == {"ok"}
    assert said["info"]["versions"]["torch"] == torch.__version__ and said["tests"]["passed"] > 0
    results = {name: json.loads(found[name].read_text())["result"] for name in EVIDENCE if name in found}
    assert {"op": "add_relu", "backend": "native", "dtype": "float32", "passed": True} in results["tests"]["ran"]
    assert all(results[name]["rows"] for name in ("networks", "ops", "kernels"))
    assert load_all([found[name] for name in ("summary", *results)]) == []
    (table,) = found.keys() - {"log", "summary", *results}
    assert json.loads(found[table].read_text())["choices"]  # of the tuner
    assert "resnet18 2 inference" in out and len(out.splitlines()) < 80 + len(said["pieces"])


def test_what_fails_or_hangs_harms_no_other_and_is_named(run: Any, tmp_path: Path) -> None:
    outcomes = run(
        shell("first", "true"),
        shell("breaks", "echo much; echo 'RuntimeError: it broke'; exit 3"),
        Piece("is not there", ["/no/such/program"], 1),
        shell("hangs", f"echo begun; {HANGS}"),
        shell("last", "echo here"),
        seconds=6,
    )
    assert [o.state for o in outcomes] == ["ok", "failed", "failed", "stopped", "ok"]
    beats = tmp_path / "work" / "beats"
    size = beats.stat().st_size
    time.sleep(0.3)
    assert size == beats.stat().st_size > 0  # what it started was ended, too
    log = (tmp_path / "log.txt").read_text()
    assert "breaks| much\n" in log and "hangs| begun\n" in log and "last| here\n" in log
    lines = gpu_summary.summary(outcomes, {"failures": []}, tmp_path)
    assert lines[0] == "whole and green: first 0 s, last 0 s"
    assert "FAILED: breaks, exit code 3" in lines and "   RuntimeError: it broke" in lines
    assert any(line.startswith("FAILED: is not there, did not start") for line in lines)
    assert any(line.startswith("STOPPED: hangs, its ") for line in lines)


def test_the_deadline_is_kept_and_what_is_left_out_is_named(run: Any, tmp_path: Path) -> None:
    start = time.monotonic()
    outcomes = run(*(shell(f"piece {i}", HANGS, needed=i == 0) for i in range(20)), seconds=4)
    assert time.monotonic() - start < 4 + 4
    # The first ones run, the last are left out.
    assert [o.state for o in outcomes] == sorted((o.state for o in outcomes), reverse=True)
    assert all(o.seconds > 0.6 for o in outcomes if o.state == "stopped")  # as long as anything needs, and the grace
    # It is needed: its second is its own, whatever comes later.
    assert outcomes[0].state == "stopped" and outcomes[0].seconds > 0.9
    assert outcomes[-1] == Outcome("piece 19", why="no time was left")
    (said,) = " ".join(gpu_summary.summary(outcomes, {"failures": []}, tmp_path)).split("left out, no time was left: ")[
        1:
    ]
    assert "piece 19" in said.partition("STOPPED")[0]


def test_pieces_share_the_time_that_is_left(run: Any) -> None:
    outcomes = run(
        shell("early", "true", 50), shell("large", "sleep 100", 4), shell("small", "sleep 100", 1), seconds=7
    )
    assert [o.state for o in outcomes] == ["ok", "stopped", "stopped"]
    assert outcomes[1].seconds > 2 * outcomes[2].seconds > 0.6  # what "early" did not need went to both


def test_what_may_run_beside_others_does_and_a_timing_has_the_machine_for_itself(run: Any) -> None:
    meets = "touch {0}; until test -e {1}; do sleep 0.05; done; (sleep 0.5; touch late) & "
    outcomes = run(
        *(shell(mine, meets.format(mine, other), 9, beside=True) for mine, other in (("a", "b"), ("b", "a"))),
        shell("alone", "sleep 1; test ! -e late"),
    )
    assert {o.name: o.state for o in outcomes} == {"a": "ok", "b": "ok", "alone": "ok"}


def test_results_are_on_disk_while_a_piece_still_runs_and_those_of_one_name_are_one_file(
    run: Any, tmp_path: Path
) -> None:
    on_disk = f"until test -e {tmp_path}/rows.json; do sleep 0.05; done"
    write = """echo '{"kind": "bench", "rows": [%d], "left_out": %d}' >{out}"""
    outcomes = run(
        shell("one", f"{write % (1, 0)}; {on_disk}", result="rows"), shell("two", write % (2, 5), result="rows")
    )
    assert [o.state for o in outcomes] == ["ok", "ok"]
    assert json.loads((tmp_path / "rows.json").read_text()) == {"kind": "bench", "rows": [1, 2], "left_out": 5}
    assert not list(tmp_path.glob("*.partial"))


def test_a_piece_that_says_too_much_is_cut_in_the_log_and_its_end_kept(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "MOST_LOG", 2000)
    run(shell("talks", "seq 100000; echo the end"))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 40000 and "talks| 1\n" in log and "the rest was left out" in log and "talks| the end\n" in log


def test_a_sanitizers_first_error_is_in_the_summary(run: Any, tmp_path: Path) -> None:
    report = "\n".join(
        (
            "========= COMPUTE-SANITIZER",
            "========= Invalid __global__ read of size 16 bytes",
            "=========     at some_kernel+0x10",
            "========= Invalid __shared__ read of size 4 bytes",
            "=========     at other_kernel",
            "========= ERROR SUMMARY: 2 errors",
        )
    )
    outcomes = run(shell("sanitize", f"echo '{report}'; exit 9"))
    assert outcomes[0].said == [
        "Invalid __global__ read of size 16 bytes at some_kernel+0x10",
        "========= ERROR SUMMARY: 2 errors",
    ]


@pytest.mark.parametrize(
    ("control", "cases", "code", "said"),
    [
        (0, 0, 0, "the control was clean"),
        (0, 9, 9, "the control was clean"),
        (9, 0, 9, "initcheck is blind for the library's stores"),
        (1, 0, 1, "initcheck's control did not run"),
    ],
)
def test_what_initcheck_reports_counts_only_where_its_control_is_clean(
    control: int, cases: int, code: int, said: str
) -> None:
    sanitizer = ["bash", "-c", f'[ "$1" = --control ] && exit {control}; echo a report; exit {cases}', "sanitizer"]
    command = ["bash", "-c", gpu_evidence.UNLESS_BLIND, "initcheck", *sanitizer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout.splitlines()[-1].startswith(said)
    assert ("a report" in done.stdout) == (control == 0)


def test_timings_come_before_the_tests_and_have_their_shares_whole() -> None:
    pieces, timings = gpu_evidence.chosen("quick", [], None), gpu_evidence.timings()
    first = pieces.index(timings[0])
    assert pieces[first : first + len(timings)] == timings and pieces[first + len(timings)].name == "test"
    assert all(piece.needed and not piece.beside for piece in timings)
    start = max(piece.seconds for piece in pieces[1:first] if piece.beside)
    # Behind a build there is something left for the tests even where nothing ends before its time.
    assert start <= 60 and start + sum(piece.seconds for piece in timings) < 60 * gpu_evidence.MINUTES - 40


def test_a_summary_has_80_lines_at_most_and_something_of_everything(tmp_path: Path) -> None:
    row = {
        "model": "resnet50",
        "batch": 256,
        "pass": "inference",
        "limit": 0.002,
        "times": {"fused": {"median": 0.0155}},
    }
    kernels = {"variant": "fused", "ms": 15.5, "busy_ms": 15.4, "launches": 96, "kernels": [["product", 36, 11060.0]]}
    files = {
        "networks": [
            {**row, "absent": {"fused graph": "RuntimeError: no capture"}},
            {**row, "error": "AssertionError: wrong"},
        ]
        * 50,
        "ops": [
            {"op": "conv", "case": f"layer{i}", "limit": 1e-6, "times": {"fused": {"median": i * 1e-6}}}
            for i in range(100)
        ],
        "kernels": [{**row, **kernels}, {**row, **kernels, "host": [["a.py:1(f)", 10, 0.001]]}] * 50,
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    outcomes = [Outcome(f"piece {i}", "failed", "exit code 1", 1, 2.0, ["first", "last"]) for i in range(50)]
    failures = [
        {"test": f"tests/test_{i // 2}.py::test_it[case]", "message": "AssertionError: off"} for i in range(100)
    ]
    lines = gpu_summary.summary(outcomes, {"passed": 7, "failed": 100, "failures": failures}, tmp_path)
    assert len(lines) <= 80 and max(map(len, lines)) <= gpu_summary.WIDTH
    text = "\n".join(lines)
    for said in (
        "FAILED: piece 0, exit code 1",
        "tests: 7 passed, 100 failed, 0 skipped",
        "FAILED 2x test_0.py::test_it[case]: AssertionError: off",
        "ABSENT networks, resnet50 256 inference: fused graph: RuntimeError: no capture",
        "11.06 ms 36x product",
        "host, resnet50 256 inference fused: 15.50 ms",
        "lines more, in the files",
    ):
        assert said in text
    (network,) = [line for line in lines if line.startswith("resnet50 256 inference  ")][:1]
    assert network.split()[-6:] == ["-", "15.50", "-", "-", "-", "2.00"]
    assert next(line for line in lines if line.startswith("conv")).startswith("conv layer99 ")  # loses most


def test_tests_outcomes_are_kept_as_they_come_even_of_one_that_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, time\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'what it says'\n"
        "def test_skipped(): pytest.skip('why')\n"
        "def test_ends_its_process(): os._exit(1)\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('in set-up')\n"
        "def test_error(broken): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu_outcomes",
        "-p",
        "no:cacheprovider",
        "--outcomes",
        "outcomes",
        "-n",
        "1",
    ]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run(
        command, cwd=tmp_path, env=kept | {"PYTHONPATH": str(ROOT / "scripts")}, capture_output=True, timeout=120
    )
    outcomes = tmp_path / "outcomes"
    outcomes.write_text(outcomes.read_text() + '{"test": "cut o')  # killed while it wrote
    found = gpu_summary.tests(outcomes)
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 3, "skipped": 1}
    said = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    assert said.keys() == {"test_wrong", "test_ends_its_process", "test_error"}
    assert (
        "what it says" in said["test_wrong"]
        and "crashed" in said["test_ends_its_process"]
        and "in set-up" in said["test_error"]
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="its pieces would be the real ones")
def test_whoever_ends_the_call_ends_its_pieces_and_still_gets_the_summary(tmp_path: Path) -> None:
    process = started("test,tune", str(tmp_path), "--dry")
    assert process.stdout is not None
    for line in process.stdout:
        if "facts: ok" in line:
            break
    time.sleep(1)  # and the tests have begun
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not err
    assert "STOPPED: test, all was interrupted" in out and "left out, all was interrupted: tune" in out
    assert json.loads((tmp_path / "summary.json").read_text())["pieces"][-1]["name"] == "tune"


def test_small_cases_name_what_fails_and_run_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = all_cases()

    @functools.wraps(first.op)
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("it broke")

    monkeypatch.setattr(small_cases, "all_cases", lambda: [replace(first, op=broken), second])
    monkeypatch.setattr(sys, "argv", ["small_cases.py", "--smoke"])
    with pytest.raises(SystemExit, match=f"{first.name}, .*RuntimeError: it broke"):
        small_cases.main()
    assert "small_cases: 4 of 4 calls of native on" in capsys.readouterr().out


def test_the_commands_that_only_a_gpu_runs_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = typer.main.get_command(fused_cnn.cli.app).commands  # type: ignore[attr-defined]
    pieces = gpu_evidence.chosen("quick", [], None)
    given = [[a.replace("{minutes}", "0") for a in piece.command] for piece in pieces]
    ours = [command[command.index("fused_cnn.cli") + 1 :] for command in given if "fused_cnn.cli" in command]
    assert {name for name, *_ in ours} == {"info", "bench", "profile"}
    for name, *options in ours:
        commands[name].make_context(name, options)  # raises where there is no such option
    for tuned in (*gpu_evidence.CANDIDATES, *gpu_evidence.TUNED):
        commands["tune"].make_context("tune", [*tuned.split(), "--dtype", "bfloat16"])
    for command in given:
        if "compute-sanitizer" in command and "native" in command:
            monkeypatch.setattr(sys, "argv", command[command.index("scripts/small_cases.py") :])
            small_cases.main()
            assert "small_cases: 0 of " in capsys.readouterr().out  # its minutes are over


def test_wheels_are_only_those_of_missing_packages_and_pieces_are_found_by_name(tmp_path: Path) -> None:
    for name in ("torch-2.0-cp312-none-any", "no_such_package-1.0-py3-none-any"):
        (tmp_path / f"{name}.whl").touch()
    wheels, *others = gpu_evidence.chosen("sanitize,host training", ["--op", "add_relu"], tmp_path)
    assert [Path(a).name for a in wheels.command if a.endswith(".whl")] == ["no_such_package-1.0-py3-none-any.whl"]
    assert [p.name.split()[0] for p in others] == ["build", "facts", *["sanitize"] * 4, "host"]
    assert all(list(p.command[-2:]) == ["--op", "add_relu"] for p in others[2:]) and "--op" not in others[0].command
    with pytest.raises(ValueError, match=r"no piece polish; there are quick, .*sanitize"):
        gpu_evidence.chosen("test,polish", [], None)


@pytest.mark.parametrize(
    "arguments", [(), ("quick",), ("polish", "out", "--dry"), ("quick", "out", "--dry", "--", "-k", "foo")]
)
def test_wrong_use_prints_how_it_is_used(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, _, err = gpu_sh(*(str(tmp_path / "out") if a == "out" else a for a in arguments))
    assert code == 2 and "usage: scripts/gpu.sh" in err and not list(tmp_path.iterdir())
