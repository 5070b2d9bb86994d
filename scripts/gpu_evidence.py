"""What a meeting with a GPU should bring, in one call of under ten minutes and without network. `scripts/gpu.sh`
starts it:

    scripts/gpu.sh quick OUTDIR [--wheels DIR]      everything: a look at each op, timings, then tests with what is left
    scripts/gpu.sh test,ops OUTDIR [-- ARGUMENTS]   these pieces alone, behind the build; ARGUMENTS go to their commands
    scripts/gpu.sh quick OUTDIR --dry               whatever means something without a GPU, on a small bit of work

Each piece is bounded in time, and none harms another. It ends with a summary of at most 80 lines: what failed, and
where the time goes. OUTDIR then holds at most 8 files: log.txt; summary.json, how each piece ended; tests, networks,
ops and kernels.json, which `fused-cnn report` reads; and what `fused-cnn tune` measured, as fused_cnn/tables/ takes it.
The exit code is 0 where every piece that was asked for ran and was green; rows that one of them had no time for are
counted in the summary.
"""

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpu_runner import NOT_DRY, ROOT, Piece, Runner, read_json, write_json
from gpu_summary import summary, tests

MINUTES = 9.25
SITE = ROOT / "build" / "wheels"  # where wheels are installed to: the machine's own packages stay as they are
# The tests that say most, lest the others take their time.
FIRST = ("test_ops", "test_triton", "test_networks", "test_full_size")
MODELS = ("resnet50", "googlenet")
NETWORKS = (*(argument for model in MODELS for argument in ("--model", model)), "--dtype", "bfloat16")
TINY = ("--model", "resnet18", "--size", "64", "--dtype", "float32", "--batch", "2")
# What decides which candidates run: the tiles of the convolutions, and of the stem with its pool.
CANDIDATES = [f"{network} --batch {n} --backend native" for n in (256, 1) for network in MODELS]
TUNED = [f"{network} --batch {of}" for of in ("256", "256 --train", "32") for network in MODELS]
SANITIZED = ("memcheck native", "racecheck native", "initcheck native", "memcheck triton")


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def cli(*arguments: str) -> list[str]:
    return python("-m", "fused_cnn.cli", *arguments)


def bench(what: str, *arguments: str, seconds: float = 1) -> list[str]:
    return cli("bench", what, *arguments, "--seconds", f"{seconds:g}", "--minutes", "{minutes}", "--out", "{out}")


def profile(*arguments: str, seconds: float = 0.2) -> list[str]:
    return cli("profile", *arguments, "--seconds", f"{seconds:g}", "--minutes", "{minutes}", "--out", "{out}")


def preparation(wheels: Path | None) -> list[Piece]:
    """What every other piece needs."""
    missing = missing_wheels(wheels) if wheels else []
    install = python(
        "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE), *missing
    )
    info = ["bash", "-c", 'nvidia-smi; exec "$@" --json >{folder}/info.json', "info", *cli("info")]
    return [
        *([Piece("wheels", install, 40, dry=install, needed=True)] if missing else []),
        Piece("build", python("setup.py", "--quiet", "build_ext", "--inplace"), 150, needed=True),
        Piece("facts", info, 30, dry=info, needed=True, beside=True),
    ]


def missing_wheels(folder: Path) -> list[str]:
    """The wheels of the folder whose packages neither this Python nor SITE has."""
    named = {str(d.metadata["Name"]) for d in importlib.metadata.distributions(path=[*sys.path, str(SITE)])}
    at_hand = {name.lower().replace("-", "_") for name in named}
    return [str(wheel) for wheel in sorted(folder.glob("*.whl")) if wheel.name.partition("-")[0].lower() not in at_hand]


def first_look() -> list[Piece]:
    """Whether anything is broken, in a minute; and since compiling a network takes half of one, what it makes shall lie
    in torch.compile's cache when it is timed."""
    smoke = python("scripts/small_cases.py", "--smoke", "--backend")
    return [
        Piece("smoke native", [*smoke, "native"], 50, dry=[*smoke, "native", "--op", "add_relu"], beside=True),
        Piece("smoke triton", [*smoke, "triton"], 50, beside=True),
        *(
            Piece(f"compile {of} {model}", compiler(model, variant), 50, beside=True)
            for of, variant in (("eager", "compile"), ("fused", "fused compile"))
            for model in MODELS
        ),
    ]


def compiler(model: str, variant: str) -> list[str]:
    of = ("--model", model, "--dtype", "bfloat16", "--batch", "256", "--pass", "inference", "--variant", variant)
    return ["nice", "-n", "10", "env", "TORCHINDUCTOR_COMPILE_THREADS=4", *profile(*of, seconds=0)]


def timings() -> list[Piece]:
    """Each of these has the machine for itself, and the share that it needs: a Python that imports torch takes 5 s to
    start, twice that where it starts another for a row, as it does for each row of a network; a row takes 10 to 20."""
    # Among several tilings torch.compile keeps the fastest: it chose on a busy machine, and shall choose again.
    forget = ["bash", "-c", 'find "$TORCHINDUCTOR_CACHE_DIR" -name "*.best_config" -delete']
    networks = bench("models", *NETWORKS, "--batch", "256", "--batch", "32", "--batch", "1")
    compiled = bench("inference", *NETWORKS, "--compile", "--batch", "256")
    ops = bench("ops", "--batch", "256", "--dtype", "bfloat16", "--no-check", seconds=0.06)
    one_op = bench("ops", "--batch", "1", "--dtype", "float32", "--op", "add_relu", "--no-check", seconds=0)
    fused = (*NETWORKS, "--variant", "fused")
    kernels = profile("--pass", "inference", "--pass", "training", *fused, "--batch", "256")
    host = profile("--pass", "inference", *fused, "--batch", "1", "--host")
    return [
        Piece("candidates", tuner(CANDIDATES, "bfloat16"), 60, needed=True),
        Piece("networks", networks, 160, "networks", bench("inference", *TINY, seconds=0), needed=True),
        Piece("quiet", forget, 10, needed=True),
        Piece("compiled", compiled, 90, "networks", needed=True),
        Piece("ops", ops, 55, "ops", one_op, needed=True),
        Piece("kernels", kernels, 55, "kernels", needed=True),
        Piece("host inference", host, 30, "kernels", needed=True),
    ]


def correctness() -> list[Piece]:
    """These share the machine: they say what is right, not how fast it is."""
    pytest = ["env", "OMP_WAIT_POLICY=passive", *python("-m", "pytest", "-q", "--tb=short", "-p", "gpu_outcomes")]
    # Layers in full size run in one process, which leaves the others memory.
    pytest += ["--dist", "loadgroup", "--ran", "{out}", "--outcomes", "{folder}/outcomes"]
    workers = max(1, min(len(os.sched_getaffinity(0)) - 3, 13))
    files = sorted(map(str, ROOT.glob("tests/**/test_*.py")), key=lambda name: (Path(name).stem not in FIRST, name))
    few = ["tests/test_ops.py", "-k", "test_forward and add_relu-native-resnet50 and float32"]
    return [
        Piece("test", [*pytest, "-n", str(workers), *files], 200, "tests", [*pytest, *few], needed=True, beside=True),
        *(Piece(f"sanitize {which}", sanitizer(*which.split()), 200, beside=True) for which in SANITIZED),
    ]


# initcheck may not see the stores of cuDNN's kernels. Where it reports PyTorch's own convolution and ReLU, too, its
# reports of our kernels behind a convolution say nothing. The verdict is the last line, even of what is stopped.
UNLESS_BLIND = """trap : INT
"$@" --control
case $? in
    0) "$@"; code=$?; echo "the control was clean: initcheck sees the library's stores here" ;;
    9) code=9; echo "initcheck is blind for the library's stores here: it reports torch.relu of torch.conv2d, too" ;;
    *) code=1; echo "initcheck's control did not run" ;;
esac
exit $code"""


def sanitizer(tool: str, backend: str) -> list[str]:
    work = python("scripts/small_cases.py", "--backend", backend, "--minutes", "{minutes}")
    with_tool = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *work]
    if tool == "initcheck":
        with_tool = ["bash", "-c", UNLESS_BLIND, tool, *with_tool]
    # Without the caching allocator each tensor has bounds of its own.
    return ["nice", "-n", "10", "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *with_tool]


def leftovers() -> list[Piece]:
    """On a quiet machine again, where there is still time."""
    of = ("--pass", "training", "--variant", "fused", "--host")
    host, tiny_host = profile(*of, *NETWORKS, "--batch", "8"), profile(*of, *TINY, seconds=0)
    return [
        Piece("host training", host, 30, "kernels", tiny_host),
        Piece("tune", tuner(TUNED, "bfloat16"), 50, dry=tuner(["resnet18 --size 64"], "float32")),
        Piece("tf32", tuner(CANDIDATES, "float32"), 40),  # as PyTorch's switch for cuDNN stands
    ]


def tuner(networks: Sequence[str], dtype: str) -> list[str]:
    """One network after the other for as long as there is time; the table keeps what has been measured."""
    tune = '"$python" -m fused_cnn.cli tune $network --dtype "$dtype"'
    each = f'for network in "$@"; do {tune} || failed=$?; done; exit "${{failed:-0}}"'
    return ["env", f"python={sys.executable}", f"dtype={dtype}", "bash", "-c", each, "tune", *networks]


def chosen(what: str, more: Sequence[str], wheels: Path | None) -> list[Piece]:
    """Every piece, or those that are asked for by name or by the first word of it, behind those that they need."""
    before, pieces = preparation(wheels), [*first_look(), *timings(), *correctness(), *leftovers()]
    if what == "quick":
        return [*before, *pieces]
    wanted = set(what.split(","))
    known = {name for piece in (*before, *pieces) for name in (piece.name, piece.name.split()[0])}
    if unknown := wanted - known:
        raise ValueError(f"no piece {', '.join(sorted(unknown))}; there are quick, {', '.join(sorted(known))}")
    found = [piece for piece in pieces if wanted & {piece.name, piece.name.split()[0]}]
    return [*before, *(replace(p, command=[*p.command, *more], dry=p.dry and [*p.dry, *more]) for p in found)]


def capabilities() -> str:
    """The GPUs' compute capabilities, such as 9.0; empty without a GPU."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return ";".join(sorted(set(found)))


def environment(dry: bool) -> Mapping[str, str]:
    path = [str(ROOT), str(ROOT / "scripts"), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Where others work, too, as in CI, more would wait for each other.
    threads = {"OMP_NUM_THREADS": "1"} if dry else {}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def save(runner: Runner, what: str, gpus: str) -> list[str]:
    """Write what is known so far beside the results; returns the summary's lines."""
    for path in (runner.folder / "FUSED_CNN").glob("*.json"):  # tables of the tuner
        write_json(runner.outdir / f"{path.stem.rpartition('-')[0]}.json", read_json(path))
    found = tests(runner.folder / "outcomes")
    facts = {"stage": what, "gpus": gpus, "info": read_json(runner.folder / "info.json"), "tests": found}
    write_json(runner.outdir / "summary.json", {**facts, **runner.record()})
    return summary(runner.outcomes, found, runner.outdir)


def main() -> int:
    given, more = sys.argv[1:], []
    if "--" in given:
        given, more = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        "scripts/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help="quick, or pieces by name, with commas between them")
    parser.add_argument("outdir", type=Path)
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels for packages that the machine lacks, nvidia-cutlass among them"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="end after so long")
    parser.add_argument("--dry", action="store_true", help="on a CPU, on a small bit of work")
    options = parser.parse_args(given)
    gpus = capabilities()
    if not gpus and not options.dry:
        parser.error("nvidia-smi shows no GPU here; --dry runs on the CPU")
    if more and options.what == "quick":
        parser.error("ARGUMENTS behind -- are for pieces asked for by name")
    try:
        pieces = chosen(options.what, more, options.wheels and options.wheels.resolve())
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its pieces end with it, and the summary is still made
    with Runner(
        options.outdir.resolve(), 60 * options.minutes, dry=options.dry, environ=environment(options.dry)
    ) as runner:
        runner.say(f"{gpus or 'no GPU'}, {len(pieces)} pieces within {options.minutes:g} minutes")
        interrupted = False
        try:
            runner.run(pieces, after=lambda: save(runner, options.what, gpus))
        except KeyboardInterrupt:
            interrupted = True
        for line in save(runner, options.what, gpus):
            runner.say(line)
    return int(interrupted or not all(outcome.state == "ok" or outcome.why == NOT_DRY for outcome in runner.outcomes))


if __name__ == "__main__":
    sys.exit(main())
