"""Files of pictures to pixels, in processes of their own: a file may be broken, huge, or the death of who opens it."""

import asyncio
import contextlib
import io
import multiprocessing
import queue
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.exceptions import HTTPException

MAX_PIXELS = 50_000_000  # of a picture: a file of a few kilobytes can claim gigabytes of them


def decode(file: bytes, size: int) -> bytes:
    """The middle square of a picture, as size x size pixels of three bytes."""
    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "PNG")) as opened:
            opened.draft("RGB", (size, size))  # of a large JPEG, only the frequencies that its small form shows
            return ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (size, size)).tobytes()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise HTTPException(413, f"the picture has more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise HTTPException(415, "neither a JPEG nor a PNG file") from error
    except Exception as error:  # Pillow's decoders raise what they meet, such as OSError, ValueError, SyntaxError
        raise HTTPException(422, f"the picture cannot be decoded: {error}") from error


def decode_until_closed(pipe: Connection, size: int) -> None:
    """What a decoding process does until the service closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the service still answers what it has
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with contextlib.suppress(EOFError, OSError):
        while True:
            file = pipe.recv_bytes()
            try:
                pipe.send(decode(file, size))
            except HTTPException as error:
                pipe.send((error.status_code, error.detail))


class Decoders:
    """Processes that decode. Each has a pipe of its own, so that one that dies loses its own file alone, which another
    one then gets. (ProcessPoolExecutor's processes share one: what is killed half-way through a result blocks all.)"""

    def __init__(self, size: int, processes: int) -> None:
        self.size, self.lost = size, 0
        self.threads = ThreadPoolExecutor(processes)  # each waits for one process
        self.idle: queue.SimpleQueue[tuple[BaseProcess, Connection]] = queue.SimpleQueue()
        for _ in range(processes):
            self.idle.put(self.start())

    def start(self) -> tuple[BaseProcess, Connection]:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the model's threads' locks
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=decode_until_closed, args=(theirs, self.size), daemon=True)
        process.start()
        theirs.close()  # so that the process alone holds it, and its end is seen here
        return process, ours

    async def decode(self, file: bytes) -> bytes:
        answer = await asyncio.get_running_loop().run_in_executor(self.threads, self.ask, file)
        if isinstance(answer, bytes):
            return answer
        raise HTTPException(*answer)

    def ask(self, file: bytes) -> bytes | tuple[int, str]:
        process, pipe = self.idle.get()
        try:
            for _ in range(2):
                try:
                    pipe.send_bytes(file)
                    return pipe.recv()
                except (EOFError, OSError):
                    self.lost += 1
                    pipe.close()
                    process.join()
                    process, pipe = self.start()
        finally:
            self.idle.put((process, pipe))
        return 422, "two processes died of decoding this file"

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            process, pipe = self.idle.get()
            pipe.close()
            process.join()
