"""What a stage of scripts/gpu.sh left in its folder, as one compact JSON file, and the names of what failed on standard output:

`stage_result.py FOLDER TARGET STAGE EXIT_CODE SECONDS DRY`, where DRY is 1 for a dry run, else empty
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

MOST = 200  # names of what failed


def main(folder: Path, target: Path, stage: str, code: int, seconds: int, dry: bool) -> None:
    found: dict[str, Any] = {"stage": stage, "exit_code": code, "seconds": seconds, "dry": dry, "failed": []}
    if code in (124, 130, 137):
        found["failed"].append("the stage's time was over")
    for name in ("info", "result"):
        file = folder / f"{name}.json"
        try:
            found[name] = json.loads(file.read_text())
        except (OSError, ValueError) as error:  # never written, or cut off
            found["failed"] += [] if isinstance(error, FileNotFoundError) else [f"{file.name} is not whole: {error}"]
    found["failed"] += _failed(found.get("result", {}))
    if (folder / "junit.xml").exists() and (folder / "junit.xml").stat().st_size:
        suite = xml.parse(folder / "junit.xml").getroot()[0]
        found["tests"] = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        bad = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
        found["failed"] += [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    if (folder / "sanitize").exists():
        rows = [line.split("\t") for line in (folder / "sanitize").read_text().splitlines()]
        found["tools"] = [{"tool": tool, "exit_code": int(rc), "summary": summary.strip("= ")} for tool, rc, summary in rows]
        found["failed"] += [f"{row['tool']}: {row['summary']}" for row in found["tools"] if row["exit_code"]]
    found["tables"] = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("tune-*.json"))}
    if code and not found["failed"]:
        found["failed"].append("the stage's command itself: see the log's end")
    del found["failed"][MOST:]
    target.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    for name in found["failed"]:
        print(f"failed: {name}")
    print(f"gpu.sh: {stage}, exit code {code}, {seconds} s, {target}")


def _failed(result: dict[str, Any]) -> list[str]:
    """Of a compile check, its kernels and what else was wrong; of a benchmark, its rows."""
    names = [f"{k['source']}, {k['name']}, {k['arch']}: {'; '.join(k['faults'])}" for k in result.get("kernels", ()) if k["faults"]]
    rows = [row for row in result.get("rows", ()) if "error" in row]
    return [*names, *result.get("broken", ()), *(f"{row.get('op') or row['model']}, {row['dtype']}: {row['error']}" for row in rows)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), bool(sys.argv[6]))
