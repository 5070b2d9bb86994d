"""The error for what cannot be done as it was asked for, and the import of packages that only some work needs."""

import importlib
from types import ModuleType


class RequestError(Exception):
    """What was asked for cannot be done: a wrong name, a file that is no result, a missing package; in one line."""


def require(module: str, install: str) -> ModuleType:
    """Import a package that not everything needs; a missing one is a one-line error that says how to get it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision beside another build of torch raises RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"this command needs {module.partition('.')[0]}: {reason}; {install}") from error
