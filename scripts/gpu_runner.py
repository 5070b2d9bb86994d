"""Runs pieces of work, one after the other or side by side, and lets none of them harm the others: each has a process
group of its own, which is ended at its bound with all that it started, and all together have a deadline.

What they say goes to one log and what they measure to one JSON file for each kind of result. Both are brought up to
date every second, so that even a kill of this process leaves what was done.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
LEAST = 20.0  # seconds: in less a Python that imports torch, and another for its first row, bring nothing
GRACE = 12.0  # between being asked to end and being ended: pytest waits ten seconds for a worker that hangs
MARGIN = 15.0  # what a benchmark's last row may take beyond the minutes it is given
TICK = 0.1
FRESH = 1.0  # how old a result on disk may be
MOST_LOG = 2 << 20  # bytes of one piece in the log
NOT_DRY, INTERRUPTED = "not in a dry run", "all was interrupted"
# Of compute-sanitizer, whose last line is no more than a number.
FIRST_ERROR = re.compile(r"^=+ (?!COMPUTE-SANITIZER)(.+)\n=+ +(at .+)", re.MULTILINE)


@dataclass(frozen=True)
class Piece:
    """One piece of work.

    In `command` {out} is the file for its result, {folder} a folder for whatever else it leaves, {minutes} how long it
    may take; `dry` is what a dry run does instead, if anything. Those with one `result` add their rows to one file of
    that name. `seconds` is its share of the time; a `needed` piece may take them whole, however little is then left.
    Neighbours that stand `beside` each other run at the same time.
    """

    name: str
    command: Sequence[str]
    seconds: float
    result: str = ""
    dry: Sequence[str] = ()
    needed: bool = False
    beside: bool = False


@dataclass
class Outcome:
    """What became of a piece: "ok", "failed", "stopped" at its bound, or "left out"; `why` in words where it is not
    ok."""

    name: str
    state: str = "left out"
    why: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)  # what tells most, where it is not ok


class _Process:
    """A piece that runs, and how much of what it says is in the log."""

    def __init__(
        self, piece: Piece, command: Sequence[str], seconds: float, folder: Path, environ: Mapping[str, str]
    ) -> None:
        self.piece, self.allowed, self.start = piece, seconds, time.monotonic()
        self.said, self.out = (folder / f"{piece.name}.{end}".replace(" ", "-") for end in ("txt", "json"))
        for name, value in {
            "out": self.out,
            "folder": folder,
            "minutes": f"{max(seconds - MARGIN, 3) / 60:.3f}",
        }.items():
            command = [argument.replace(f"{{{name}}}", str(value)) for argument in command]
        with open(self.said, "wb") as said:
            options: dict[str, Any] = {
                "stdout": said,
                "stderr": subprocess.STDOUT,
                "stdin": subprocess.DEVNULL,
                "cwd": ROOT,
            }
            self.process = subprocess.Popen(command, env=environ, start_new_session=True, **options)
        self.logged = 0
        self.stopped = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> bool:
        """Whether it is over; ends it where its time is."""
        if self.process.poll() is not None:
            self.signal(signal.SIGKILL)  # what it started must not disturb the next piece
            return True
        if self.seconds > self.allowed + GRACE:
            self.signal(signal.SIGKILL)
        elif self.seconds > self.allowed and not self.stopped:
            self.stopped = True
            self.signal(signal.SIGINT)  # pytest, bench and tune keep what they have
        return False

    def copy_to(self, log: BinaryIO, whole: bool) -> None:
        """Add to the log the lines that are not there yet, each behind the piece's name."""
        with open(self.said, "rb") as said:
            said.seek(self.logged)
            new = said.read(max(0, MOST_LOG - self.logged))
        end = len(new) if whole else new.rfind(b"\n") + 1
        self.logged += end
        name = self.piece.name.encode()
        log.writelines(name + b"| " + line + b"\n" for line in new[:end].splitlines())
        if whole and self.said.stat().st_size > self.logged:
            log.write(name + b"| ... the rest was left out; it ended with:\n")
            log.writelines(name + b"| " + line.encode() + b"\n" for line in self._end().splitlines())
        log.flush()

    def _end(self, size: int = 8 << 10) -> str:
        with open(self.said, "rb") as said:
            said.seek(max(0, self.said.stat().st_size - size))
            return said.read().decode(errors="replace")

    def _telling(self) -> list[str]:
        """A sanitizer's first error, and the last line."""
        with open(self.said, errors="replace") as said:
            first = FIRST_ERROR.search(said.read(MOST_LOG))
        lines = [line.strip() for line in self._end().splitlines() if line.strip()]
        return [*([" ".join(first.groups())] if first else []), *lines[-1:]]

    def outcome(self) -> Outcome:
        code = self.process.returncode
        state = "stopped" if self.stopped else "failed" if code else "ok"
        why = {"stopped": f"its {self.allowed:.0f} s were over", "failed": f"exit code {code}", "ok": ""}[state]
        return Outcome(self.piece.name, state, why, code, round(self.seconds, 1), self._telling() if why else [])


class Runner:
    """Runs pieces into a folder until `seconds` are over, and says on standard output how each ended."""

    def __init__(
        self, outdir: Path, seconds: float, *, dry: bool = False, environ: Mapping[str, str] | None = None
    ) -> None:
        self.outdir, self.dry = outdir, dry
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.outcomes: list[Outcome] = []
        self.parts: dict[str, list[Path]] = {}  # of each result, in the order of the pieces
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self._scratch.name)
        self.environ = {**(os.environ if environ is None else environ)}
        for owner in ("FUSED_CNN", "TORCHINDUCTOR"):  # what an earlier run has measured decides nothing
            (self.folder / owner).mkdir()
            self.environ[f"{owner}_CACHE_DIR"] = str(self.folder / owner)
        outdir.mkdir(parents=True, exist_ok=True)
        self._log = open(outdir / "log.txt", "wb")  # noqa: SIM115 - open as long as the runner is

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._scratch.cleanup()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """Print a line, and put it into the log."""
        print(text, flush=True)
        self._log.write(f"{text}\n".encode())
        self._log.flush()

    def run(self, pieces: Sequence[Piece], after: Callable[[], object] = lambda: None) -> None:
        """Run them all, and call `after` behind each; what fails, hangs or has no time left is noted, and the next one
        runs."""
        groups = [list(group) for group in _groups(pieces)]
        try:
            for i, group in enumerate(groups):
                later = sum(max(p.seconds for p in g) for g in groups[i + 1 :])
                longest = max(piece.seconds for piece in group)
                left = self.deadline - time.monotonic() - GRACE
                share = max(left * longest / (longest + later), LEAST, longest if any(p.needed for p in group) else 0)
                if left < LEAST:
                    for piece in group:
                        self._ended(Outcome(piece.name, why="no time was left"))
                else:
                    self._run_group([(piece, min(share, left) * piece.seconds / longest) for piece in group])
                after()
        finally:  # interrupted
            known = {outcome.name for outcome in self.outcomes}
            for piece in pieces:
                if piece.name not in known:
                    self._ended(Outcome(piece.name, why=INTERRUPTED))

    def _run_group(self, pieces: Sequence[tuple[Piece, float]]) -> None:
        running: list[_Process] = []
        try:
            for piece, seconds in pieces:
                self._start(piece, seconds, running)
            fresh = time.monotonic()
            while running:
                time.sleep(TICK)
                over = [process for process in running if process.ended()]
                running = [process for process in running if process not in over]
                if over or time.monotonic() > fresh + FRESH:
                    for process in (*over, *running):
                        process.copy_to(self._log, whole=process in over)
                    self.collect()
                    fresh = time.monotonic()
                for process in over:
                    self._ended(process.outcome())
        finally:  # interrupted, some still run
            for process in running:
                process.signal(signal.SIGKILL)
                process.process.wait()
                process.copy_to(self._log, whole=True)
                self._ended(Outcome(process.piece.name, "stopped", INTERRUPTED, seconds=round(process.seconds, 1)))

    def _start(self, piece: Piece, seconds: float, running: list[_Process]) -> None:
        command = piece.dry if self.dry else piece.command
        if not command:
            self._ended(Outcome(piece.name, why=NOT_DRY))
            return
        try:
            running.append(_Process(piece, command, seconds, self.folder, self.environ))
        except OSError as error:
            self._ended(Outcome(piece.name, "failed", f"did not start: {error}"))
            return
        if piece.result:
            self.parts.setdefault(piece.result, []).append(running[-1].out)

    def _ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        took = f" in {outcome.seconds:.0f} s" if outcome.seconds else ""
        self.say(f"[{self.seconds:4.0f} s] {outcome.name}: {outcome.state}{took}{outcome.why and ', '}{outcome.why}")

    def collect(self) -> None:
        """Bring the results' files in the target folder up to date."""
        for result, parts in self.parts.items():
            documents = [document for document in map(read_json, parts) if document]
            if documents:
                document = merged(documents)
                if self.dry:  # in the form that `fused-cnn report` takes for no evidence
                    document = {"stage": result, "dry": True, "result": document}
                write_json(self.outdir / f"{result}.json", document)

    def record(self) -> dict[str, Any]:
        """How every piece ended, as JSON."""
        return {
            "dry": self.dry,
            "seconds": round(self.seconds, 1),
            "pieces": [asdict(outcome) for outcome in self.outcomes],
        }


def _groups(pieces: Sequence[Piece]) -> Iterator[Iterator[Piece]]:
    """Neighbours that stand beside each other, and every other piece by itself."""
    yield from (group for _, group in itertools.groupby(pieces, lambda p: "beside" if p.beside else p.name))


def merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document with the facts of the first and the rows of all."""
    whole = dict(documents[0])
    for other in documents[1:]:
        whole["rows"] = [*whole["rows"], *other["rows"]]
        whole["left_out"] = whole.get("left_out", 0) + other.get("left_out", 0)
    return whole


def read_json(path: Path) -> Any:
    """What is in the file; None where there is none, or it is just being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, document: Any) -> None:
    """The file is at every moment the old one or the new one, whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)
