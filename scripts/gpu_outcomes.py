"""pytest plugin (`-p gpu_outcomes --outcomes FILE`): notes each test's outcome at once, a JSON document a line, so that
a run that is cut off still says what passed and what failed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 300  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="note each test's outcome here")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # every report reaches the process that controls the workers
        config.pluginmanager.register(_Outcomes(config.getoption("--outcomes")))


class _Outcomes:
    def __init__(self, path: Path) -> None:
        self.file = open(path, "w", buffering=1)  # noqa: SIM115 - open as long as the run is

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.file.write(
                json.dumps(outcome | ({"message": _message(report.longrepr)} if report.failed else {})) + "\n"
            )


def _message(longrepr: Any) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(longrepr)).split())[:MESSAGE]
