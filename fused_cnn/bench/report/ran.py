"""What has run on a GPU: for each op, backend, dtype and architecture the GPU, the day, and whether it is stale.

Evidence is a test run on a GPU (tests/conftest.py writes what passed and what failed) or a benchmark that checked its
numbers first. A run of the tests that left some out says `without` what.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ... import _library, _sources
from ...testing import all_cases
from ..results import Result
from .tables import Cells, Table

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = {"native": ("float64", "float32", "float16", "bfloat16"), "triton": ("float32", "float16", "bfloat16")}
NEVER = "never run on a GPU"
Key = tuple[str, str, str, str]  # op, backend, dtype, architecture


class Run(NamedTuple):
    """One kernel's latest evidence."""

    device: str
    date: str
    source: str
    passed: bool


def evidence(results: Iterable[Result]) -> dict[Key, Run]:
    """The latest run of each kernel among saved results."""
    rooms = {cases.name: cases.room for cases in all_cases()}
    found: dict[Key, Run] = {}
    for result in sorted(results, key=lambda r: r["date"]):
        if result["device"] != "cuda":
            continue
        tested = result["kind"] == "tests"
        if tested:
            ran = [(r["op"], r["backend"], r["dtype"], r["passed"]) for r in result["ran"]]
        elif result["kind"] == "bench" and result.get("checked", True):
            rows = [row for row in result["rows"] if row["kind"] == "op"]
            ran = [(row["op"], b, row["dtype"], True) for row in rows for b in DTYPES if b in row.get("times", {})]
        else:
            continue
        for op, backend, dtype, passed in ran:
            device = result["device_name"].partition(",")[0]
            sources = result["sources"][backend]
            source = sources[rooms[op] if rooms[op] in sources else op]  # saved when the room had the op's own name
            key = (op, backend, dtype, result["arch"])
            before = found.get(key)
            # A failed test stands until that test passes: neither a run that left it out, nor a benchmark of these
            # sources, clears it.
            if before is not None and ("without" in result or (not tested and before.source == source)):
                passed = passed and before.passed
            found[key] = Run(device, result["date"][:10], source, passed)
    return found


def table(results: Iterable[Result]) -> Table:
    """A row for each op, backend and group of dtypes in one state; architectures without evidence share a column."""
    runs = evidence(results)
    seen = sorted({architecture for *_, architecture in runs})
    others = [a for a in ARCHITECTURES if a not in seen]
    now = _sources.hashes("cuda")
    rows: list[Cells] = []
    for cases in all_cases():
        for backend, dtypes in DTYPES.items():
            # Native kernels count whether or not they were built here.
            native = backend == "native" and any((_sources.CSRC / cases.room).glob("*.cu"))
            if not native and not _library.has_kernel(cases.decides, backend, "cuda"):
                continue
            states: dict[tuple[str, ...], list[str]] = {}
            for dtype in dtypes:
                of_dtype = [_state(runs.get((cases.name, backend, dtype, a)), now[backend][cases.room]) for a in seen]
                states.setdefault((*of_dtype, NEVER), []).append(dtype)
            rows += [[cases.name, backend, ", ".join(of), *cells] for cells, of in states.items()]
    return ["op", "backend", "dtypes", *seen, ", ".join(others)], rows


def _state(run: Run | None, now: str | None) -> str:
    if run is None:
        return NEVER
    text = f"{run.device}, {run.date}, `{run.source[:8]}`"
    if run.source != now:
        return f"*stale*{'' if run.passed else ', failed'}: {text}"
    return text if run.passed else f"**fails**: {text}"
