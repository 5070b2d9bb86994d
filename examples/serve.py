"""A small HTTP service: POST a JPEG or PNG file to /classify, and get the five likeliest classes as JSON.

    python examples/serve.py --variant optimized --network resnet50
    curl --data-binary @photograph.jpg http://127.0.0.1:8000/classify

A file goes to another process, which decodes it (decoders.py). Pictures that arrive within a few milliseconds of each
other become one batch, up to the largest size that the model was prepared for. The model runs in a thread of its own,
so that the event loop always answers: /metrics for Prometheus, /healthz for whoever starts and stops the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum
from typing import Annotated

import typer
import uvicorn
from batches import Answer, Batches, Classifier
from decoders import Decoders
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

BATCH_SIZES = (1, 2, 4, 8)
OUTSTANDING = 64  # requests at a time, which bounds the memory that files take; further ones are told to come again
MAX_BYTES = 10 * 2**20  # of a file
BODY_SECONDS = 30  # in which a file must have arrived


class Variant(str, Enum):
    eager = "eager"
    fused = "fused"
    optimized = "optimized"


def make_classifier(variant: Variant, network: str, size: int) -> Classifier:
    """What turns decoded pictures into answers: put your own model here. This one has seeded weights."""
    import torch  # not above: every decoding process imports this file, and needs no torch

    import fused_cnn
    from fused_cnn.bench import networks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    example = networks.photographs(4, size).to(device)
    model: Callable[[torch.Tensor], torch.Tensor] = networks.network(network, example)
    if variant is Variant.fused:
        fused_cnn.fuse_(model)
    elif variant is Variant.optimized:
        model = fused_cnn.optimize(model, example, batch_sizes=BATCH_SIZES, pad_batches=True)
    mean, std = (torch.tensor(of).view(3, 1, 1).to(device) for of in (networks.IMAGENET_MEAN, networks.IMAGENET_STD))

    @torch.no_grad()
    def classify(pictures: Sequence[bytes]) -> list[Answer]:
        pixels = torch.frombuffer(bytearray().join(pictures), dtype=torch.uint8).view(-1, size, size, 3)
        images = (pixels.to(device).permute(0, 3, 1, 2) / 255 - mean) / std  # channels_last, as the pixels lie
        best = model(images).softmax(1).topk(5)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[{"class": c, "probability": p} for c, p in zip(*pair, strict=True)] for pair in pairs]

    for n in BATCH_SIZES:  # what a first call makes is made before the first request
        classify([bytes(size * size * 3)] * n)
    return classify


class Metrics:
    """What /metrics tells, in Prometheus's text format; the rate and the quantiles are the last minute's."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.answered: deque[tuple[float, float]] = deque(maxlen=10_000)  # when, and after how many seconds
        self.seconds = 0.0

    def count_answer(self, started: float) -> None:
        now = time.monotonic()
        self.statuses[200] += 1
        self.answered.append((now, now - started))
        self.seconds += now - started

    def text(self, batches: Counter[int], outstanding: int, decoders_lost: int) -> str:
        now, images, count = time.monotonic(), self.statuses[200], batches.total()
        recent = [(when, seconds) for when, seconds in self.answered if when > now - 60]
        seconds = sorted(seconds for _, seconds in recent)
        rate = len(recent) / (now - recent[0][0] + recent[0][1]) if recent else 0.0
        quantiles = {f'{{quantile="{q}"}}': seconds[int(q * len(seconds))] for q in (0.5, 0.99) if seconds}
        up_to = {f'_bucket{{le="{n}"}}': sum(batches[i] for i in range(n + 1)) for n in BATCH_SIZES}
        pictures = sum(n * times for n, times in batches.items())
        families: list[tuple[str, str, dict[str, float]]] = [
            ("requests_total", "counter", {f'{{status="{s}"}}': n for s, n in sorted(self.statuses.items())}),
            ("images_total", "counter", {"": images}),
            ("images_per_second", "gauge", {"": rate}),
            ("latency_seconds", "summary", {**quantiles, "_sum": self.seconds, "_count": images}),
            ("batch_size", "histogram", {**up_to, '_bucket{le="+Inf"}': count, "_sum": pictures, "_count": count}),
            ("outstanding_requests", "gauge", {"": outstanding}),
            ("decoders_lost_total", "counter", {"": decoders_lost}),
        ]
        lines = []
        for name, kind, samples in families:
            lines.append(f"# TYPE serve_{name} {kind}")
            lines += [f"serve_{name}{suffix} {value:.10g}" for suffix, value in samples.items()]
        return "\n".join((*lines, ""))


async def body(request: Request) -> bytes:
    """The file that a request brings."""
    too_large = HTTPException(413, f"the file has more than {MAX_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    file = bytearray()
    async for chunk in request.stream():
        file += chunk
        if len(file) > MAX_BYTES:  # it did not say beforehand
            raise too_large
    if not file:
        raise HTTPException(400, "the body is empty; it must be a JPEG or PNG file")
    return bytes(file)


async def received(request: Request) -> bytes:
    """The file, or why there is none; who sends it slowly must not hold a place for ever."""
    try:
        return await asyncio.wait_for(body(request), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"the file did not arrive within {BODY_SECONDS} seconds") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client closed the connection before its file had arrived") from error


def application(classify: Classifier, decoders: Decoders) -> Starlette:
    """The service around any function from decoded pictures to answers."""
    metrics = Metrics()
    batches = Batches(classify, BATCH_SIZES[-1])
    outstanding = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.create_task(batches.run())
        yield  # until all requests that were accepted are answered
        loop.cancel()

    async def answer(request: Request) -> Response:
        nonlocal outstanding
        started = time.monotonic()
        if outstanding >= OUTSTANDING:
            raise HTTPException(503, f"{OUTSTANDING} requests are outstanding; come again", {"Retry-After": "1"})
        outstanding += 1
        try:
            best = await batches.answer(await decoders.decode(await received(request)))
        finally:
            outstanding -= 1
        metrics.count_answer(started)
        return JSONResponse({"top": best})

    async def show_metrics(request: Request) -> Response:
        text = metrics.text(batches.sizes, outstanding, decoders.lost)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def healthy(request: Request) -> Response:
        return JSONResponse({"healthy": True, "decoders": [p.pid for p in multiprocessing.active_children()]})

    async def refused(request: Request, error: Exception) -> Response:
        refusal = error if isinstance(error, HTTPException) else HTTPException(500, "the service failed")
        metrics.statuses[refusal.status_code] += 1
        return JSONResponse({"error": refusal.detail}, refusal.status_code, refusal.headers)

    return Starlette(
        routes=[
            Route("/classify", answer, methods=["POST"]),
            Route("/metrics", show_metrics),
            Route("/healthz", healthy),
        ],
        exception_handlers={HTTPException: refused, Exception: refused},
        lifespan=lifespan,
    )


def main(
    variant: Annotated[Variant, typer.Option(help="How the network runs.")] = Variant.optimized,
    network: Annotated[str, typer.Option(help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the network's images.")] = 224,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="0 for any free one.")] = 8000,
    processes: Annotated[int, typer.Option("--decoders", min=1, help="Processes that decode files.")] = 2,
) -> None:
    """Classify image files that are sent over HTTP, until SIGTERM or Ctrl-C; what was accepted is still answered."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it got once more when it has finished
        signal.signal(number, lambda *_: sys.exit(0))
    with Decoders(size, processes) as decoders:
        app = application(make_classifier(variant, network, size), decoders)
        config = uvicorn.Config(app, host, port, log_level="warning")
        listener = config.bind_socket()
        print(f"serving {network}, {variant.value}, on http://{host}:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    typer.run(main)
