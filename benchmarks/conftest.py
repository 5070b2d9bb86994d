"""What both suites share: which rows are measured, how long that takes, and one timing routine.

A benchmark checks its numbers and times all its variants in interleaved rounds, in another process, as `fused-cnn
bench` does. Of that pytest-benchmark's columns show the fused variant's median, with the quartiles as Min and Max, and
its JSON file has the whole result for `fused-cnn report`.

By default the telling rows alone are run, within MINUTES: both networks' inference and training step, at the largest
batch and in the first dtype, and of each op the two layers that differ most, at the first batch. `--full` runs every
row. torch.compile is timed for networks alone.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from fused_cnn.bench.benches import BATCHES, DTYPES, Bench, measured, op_benches
from fused_cnn.bench.ceilings import Ceilings
from fused_cnn.bench.ceilings import measure as measure_ceilings
from fused_cnn.bench.facts import facts_of_run
from fused_cnn.bench.network_benches import MODELS, network_benches
from fused_cnn.bench.results import table_of
from fused_cnn.bench.worker import Worker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MINUTES = 10  # that the telling rows may take
COMPILERS = ("compile",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="measure every row, not the telling ones alone")
    parser.addoption("--seconds", type=float, default=0.5, help="how long to time each row")


def rows(*, full: bool) -> list[Bench]:
    """Networks first, then ops."""
    dtypes, batches = DTYPES[DEVICE], BATCHES[DEVICE]
    if full:
        networks = network_benches(MODELS, dtypes, batches, device=DEVICE, compilers=COMPILERS)
        return [*networks, *op_benches(dtypes, batches, device=DEVICE)]
    networks = network_benches(MODELS, dtypes[:1], [max(batches)], device=DEVICE, compilers=COMPILERS)
    return [*networks, *op_benches(dtypes, batches[:1], device=DEVICE, telling=True)]


def table(bench: Bench) -> str:
    """The table of `fused-cnn report` that the row goes to; rows of one table take about as long as each other."""
    return table_of(bench.labels)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = {"test_network": "model", "test_op": "op"}[metafunc.function.__name__]
    benches = [bench for bench in rows(full=metafunc.config.getoption("--full")) if bench.kind == kind]
    metafunc.parametrize("bench", benches, ids=[bench.name for bench in benches])


class Progress:
    """A plugin: knows what is to be run and what it took, and says so on the terminal before every row and at both
    ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.full = bool(config.getoption("--full"))
        self.start = time.monotonic()
        self.ahead: Counter[str] = Counter()
        self.taken: dict[str, list[float]] = {}
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ahead = Counter(table(item.callspec.params["bench"]) for item in session.items)  # type: ignore[attr-defined]
        more = sum(self.more().values())
        which = f"the telling rows, in at most {MINUTES} minutes; {more} more with --full" if more else "every row"
        self.say(f"{len(session.items)} rows: {which}")

    def pytest_runtest_logstart(self) -> None:
        text = f"rows to go: {sum(self.ahead.values())}; {_minutes(time.monotonic() - self.start)} so far"
        if all(of in self.taken for of in +self.ahead):
            text += f", about {_minutes(self.estimate(self.ahead))} left"
        self.say(text)

    def pytest_terminal_summary(self) -> None:
        for line in self.summary() if self.rows else ():
            self.say(line)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """The result as `fused-cnn bench` saves it, failed rows among them."""
        counts = {"left_out": sum(self.ahead.values()), "more_with_full": dict(self.more())}
        output_json["fused_cnn"] = {"kind": "bench", "backend": "auto", **self.facts, **counts, "rows": self.rows}

    def say(self, text: str) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(text)

    def estimate(self, ahead: Counter[str]) -> float:
        """Seconds that so many rows of each table take, by those measured; a table without any counts as the mean of
        all."""
        every = [seconds for taken in self.taken.values() for seconds in taken]
        return sum(n * statistics.mean(self.taken.get(of, every)) for of, n in ahead.items())

    def fits(self, bench: Bench) -> bool:
        """Whether the row ends within MINUTES, by the longest of its kind so far."""
        alike = [max(taken) for of, taken in self.taken.items() if (of == "ops") == (bench.kind == "op")]
        return self.full or time.monotonic() - self.start + max(alike, default=0.0) < 60 * MINUTES

    def note(self, bench: Bench, row: dict[str, Any], seconds: float) -> None:
        """Keep a row, and what it took."""
        self.rows.append(row)
        self.taken.setdefault(table(bench), []).append(seconds)
        self.ahead[table(bench)] -= 1

    def more(self) -> Counter[str]:
        """How many rows of each table --full would add."""
        return Counter() if self.full else Counter(map(table, rows(full=True))) - Counter(map(table, rows(full=False)))

    def summary(self) -> Iterator[str]:
        left_out, more = sum(self.ahead.values()), self.more()
        if left_out:
            yield f"{left_out} of these rows were not measured: they would have gone past {MINUTES} minutes"
        if more:
            whole = self.estimate(Counter(map(table, rows(full=True))))
            yield f"left out: {sum(more.values())} more rows; all of them, with --full, take {_minutes(whole)} or more"


class Clock:
    """A timer for pytest-benchmark that tells what has been measured elsewhere: `pass_by` is its time going by."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


CLOCK = Clock()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(config), "progress")


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Progress:
    found: Progress = request.config.pluginmanager.get_plugin("progress")
    return found


@pytest.fixture(scope="session")
def ceilings(worker: Worker, progress: Progress) -> Ceilings:
    found = worker.call("ceilings", measure_ceilings, DEVICE, DTYPES[DEVICE])
    progress.facts = {**facts_of_run(DEVICE), "ceilings": asdict(found)}
    return found


@pytest.fixture
def measure(
    benchmark: Any, worker: Worker, ceilings: Ceilings, progress: Progress, request: pytest.FixtureRequest
) -> Callable[[Bench], None]:
    seconds = request.config.getoption("--seconds")

    def run(bench: Bench) -> None:
        if not progress.fits(bench):
            pytest.skip(f"would go past {MINUTES} minutes")
        start = time.monotonic()
        row = measured(worker, bench, seconds, ceilings)
        progress.note(bench, row, time.monotonic() - start)
        if "error" in row:
            pytest.fail(row["error"], pytrace=False)
        benchmark.group = bench.labels.get("op") or bench.labels["model"]
        benchmark.extra_info.update({name: row[name]["fused"] for name in ("gb_per_s", "share_of_limit")})
        times = [row["times"]["fused"][quartile] for quartile in ("low", "median", "high")]
        benchmark.pedantic(CLOCK.pass_by, args=(iter(times),), rounds=len(times))

    return run
