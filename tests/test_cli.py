"""The command line: exit codes, JSON that parses, errors of one line, and the main job on one small
network.
"""

from __future__ import annotations

import json

import pytest

from fused_cnn import cli


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_info_lists_every_backend_with_its_state(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd, "info", "--json")
    facts = json.loads(text)
    assert code == 0
    assert {(b["backend"], b["device"]) for b in facts["backends"]} == {
        (b, d) for b in ("reference", "native", "triton") for d in ("cpu", "cuda")
    }
    assert all(b["on"] or (b["reason"] and b["hint"]) for b in facts["backends"])
    assert facts["build"]["compiler"] and facts["versions"]["torch"] and facts["devices"]["cpu"]


def test_info_prints_tables(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, errors = run(capfd, "info")
    assert code == 0 and errors == ""
    assert all(word in text for word in ("Backends", "Build", "Versions", "Devices", "Cache"))


def test_no_command_prints_help(capfd: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capfd)
    assert code == 0 and all(name in text for name in ("info", "summary", "verify", "bench", "report"))


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["info", "--nothing"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, text, errors = run(capfd, *arguments)
    assert code == 2 and text == ""
    assert errors.startswith("fused-cnn: ") and errors.count("\n") == 1
