"""The command line `fused-cnn`: one file for each command, each with `--json`.

Exit codes: 0 all is well, 1 the numbers do not agree, 2 what was asked for cannot be done, 3 an error inside fused_cnn.
Every error is one line on standard error; `fused-cnn --traceback COMMAND ...` shows where it came from.
"""

import sys
from typing import Annotated

import typer

from .._backends import BackendUnavailable
from ..bench.errors import RequestError
from .bench import bench
from .info import info
from .optimize import optimize
from .profile import profile
from .report import report
from .summary import summary
from .tune import tune
from .verify import verify

USAGE = 2  # what was asked for cannot be done: a wrong option, a missing package, an unavailable backend
INTERNAL = 3
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Fused blocks for GoogLeNet- and ResNet-like CNNs: same weights, same numbers, less memory traffic."""


for command in (info, summary, verify, optimize, bench, profile, tune, report):
    app.command(help=" ".join(str(command.__doc__).split()))(command)  # its line breaks are the source's alone


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors become one line."""
    try:
        return app(args=arguments or ["--help"], prog_name="fused-cnn", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if "--traceback" in arguments:
            raise
        if hasattr(error, "format_message"):  # what typer raises for a wrong command line
            return _fail(error.format_message(), USAGE)
        if isinstance(error, (RequestError, BackendUnavailable, OSError)):
            return _fail(str(error), USAGE)
        return _fail(f"internal error: {type(error).__name__}: {error}", INTERNAL)


def _fail(message: str, code: int) -> int:
    print(f"fused-cnn: {' '.join(message.split())}", file=sys.stderr)
    return code


def main() -> None:
    """The entry point of the command `fused-cnn`."""
    sys.exit(run(sys.argv[1:]))
