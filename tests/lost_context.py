"""Keeps a lost CUDA context from failing the tests after it.

A kernel that reads where it must not ends its process's context: from then on every call fails, for tests that did
nothing wrong. So a test ends with a synchronisation, that an error that comes late is still its own; and where the
context is lost, so does the process: under xdist the worker, which xdist replaces, else the session.
"""

import os
import sys
from collections.abc import Generator

import pytest
import torch

GPU = torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    result = yield
    if GPU:
        torch.cuda.synchronize()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        problem = GPU and _problem()
        if problem:
            line = f"{item.nodeid} lost the CUDA context: {problem}"
            if hasattr(item.config, "workerinput"):
                _say(item, line)
                os._exit(1)
            item.session.shouldstop = f"{line}; with -n the tests after it run in a new process"


def _problem() -> str:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _say(item: pytest.Item, line: str) -> None:
    """On the terminal, past pytest's capturing."""
    with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(line, file=sys.stderr, flush=True)
