"""A process of its own for work that may end its process: a GPU's lost context, a crash, memory that runs out."""

import gc
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from .results import Row

T = TypeVar("T")
PATIENCE = 10  # seconds that a process has for its own end before it is killed


class WorkFailed(Exception):
    """What was called in another process raised an exception, or ended the process; the message says which."""


class Worker(AbstractContextManager["Worker"]):
    """Calls functions in another process, one at a time; to be used in a `with` statement.

    Calls of one `room` share a process, which is replaced when one of them fails: what it leaves behind (a CUDA context
    that is lost, a half-captured graph) reaches no other call.
    """

    def __init__(self) -> None:
        self._room = ""
        self._process: Any = None
        self._pipe: Connection

    def call(self, room: str, function: Callable[..., T], *args: Any) -> T:
        """function(*args), all of which can be pickled. Raises WorkFailed where it raised or its process ended."""
        if room != self._room:
            self.close()
        if self._process is None:
            context = get_context("spawn")  # a forked process could not use CUDA
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()))
            self._process.start()
            theirs.close()
            self._room = room
        try:
            self._pipe.send((function, args))
            done, value, usable = self._pipe.recv()
        except (EOFError, ConnectionError):  # the other end is gone, and with it the process
            self._process.join(PATIENCE)
            code = self._process.exitcode
            killed = code is not None and code < 0
            value = f"was ended by {signal.Signals(-code).name}" if killed else f"ended with exit code {code}"
            done, value, usable = False, f"its process {value}", False
        except BaseException:
            self._process.kill()
            raise
        if not usable:
            self.close()
        if not done:
            raise WorkFailed(value)
        return value

    def row(self, labels: Row, room: str, function: Callable[..., Row], *args: Any) -> Row:
        """The labels with what a call returns; of one that fails, or loses its process, with the `error`."""
        try:
            return {**labels, **self.call(room, function, *args)}
        except WorkFailed as error:
            return {**labels, "error": str(error)}

    def close(self, *_: object) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        self._process = None

    __exit__ = close


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _serve(pipe: Connection, threads: int) -> None:
    """The other process: answers calls until its caller has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the caller hears, too
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for eager, fused, peers and the ceiling alike
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            done, value = True, function(*args)
        except Exception as error:
            traceback.print_exc()
            done, value = False, described(error)
        del function, args
        pipe.send((done, value, done and _memory_is_free()))


def _memory_is_free() -> bool:
    """Frees what the last call held; False where the device is lost."""
    gc.collect()
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
