"""The service of serve.py under load: eager, fused and optimized, one network, the same JPEG files, in turns.

    python examples/load.py --network resnet50

Starts a service for each variant on this machine, has them answer every file once and compares the answers, then sends
each the same number of requests, round by round, from clients that send the next when they have the last one's answer.
Prints a table, and saves it as JSON and as a plot. It never sends anything to another machine.
"""

import importlib.util
import io
import ipaddress
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import matplotlib.figure
import torch
import typer
from PIL import Image
from serve import OUTSTANDING, Variant

from fused_cnn.bench.facts import facts_of_run

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 60, 60, 60
AGREES = 5e-3  # of a probability: on a GPU the variants' convolutions round differently, to TF32
COLOURS = {"eager": "#9aa5b1", "fused": "#1f77b4", "optimized": "#0b3d66"}


def photographs() -> list[bytes]:
    """JPEG files: those that scikit-image ships, and others of its photographs, encoded here."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "the photographs are scikit-image's: pip install scikit-image"
    folder = Path(spec.origin).parent / "data"
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    for name in ("astronaut", "chelsea", "coffee"):
        encoded = io.BytesIO()
        Image.open(folder / f"{name}.png").convert("RGB").save(encoded, "JPEG", quality=90)
        files.append(encoded.getvalue())
    return files


class Client:
    """A connection that stays open."""

    def __init__(self, host: str, port: int) -> None:
        self.connection = HTTPConnection(host, port, timeout=ANSWER_SECONDS)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        self.connection.request(method, path, body)
        response = self.connection.getresponse()
        return response.status, response.read()

    def classify(self, file: bytes) -> dict[int, float]:
        status, answer = self.ask("POST", "/classify", file)
        if status != 200:
            raise OSError(f"the service answered {status}: {answer.decode()}")
        return {best["class"]: best["probability"] for best in json.loads(answer)["top"]}


@contextmanager
def service(variant: str, network: str, size: int, host: str) -> Iterator[int]:
    """Starts a service; yields its port when it answers, and stops it in the end."""
    options = ["--variant", variant, "--network", network, "--size", str(size), "--host", host, "--port", "0"]
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said:
                raise SystemExit(f"the service of {variant} did not start")
            port, end = int(said.rsplit(":", 1)[1]), time.monotonic() + START_SECONDS
            while True:
                try:
                    Client(host, port).ask("GET", "/healthz")
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise SystemExit(f"the service of {variant} did not start") from None
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()  # it answers what it has, and exits
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def one_round(
    host: str, port: int, files: Sequence[bytes], clients: int, requests: int, seconds: float
) -> tuple[list[float], float]:
    """So many requests, or so many seconds: each answer's time, and how long all took. A lost one is an error."""
    numbers, times = itertools.count(), list[float]()
    start = time.monotonic()

    def one_client() -> None:
        client = Client(host, port)
        while (number := next(numbers)) < requests and time.monotonic() < start + seconds:
            sent = time.perf_counter()
            client.classify(files[number % len(files)])
            times.append(time.perf_counter() - sent)

    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(one_client) for _ in range(clients)]:
            done.result()
    return times, time.monotonic() - start


def batches(host: str, port: int) -> tuple[float, float]:
    """How many pictures the service has answered, in how many batches."""
    lines = Client(host, port).ask("GET", "/metrics")[1].decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return float(found["serve_batch_size_sum"]), float(found["serve_batch_size_count"])


def compare(variant: str, mine: dict[int, float], eager: dict[int, float]) -> None:
    """Refuses an answer that is not eager's; of a class that is not among my five, I say no more than of the fifth."""
    if max(abs(mine.get(c, min(mine.values())) - p) for c, p in eager.items()) > AGREES:
        raise SystemExit(f"{variant} answers otherwise than eager: {mine} instead of {eager}")


def quantile(seconds: Sequence[float], q: float) -> float:
    return sorted(seconds)[int(q * len(seconds))]


def draw(result: dict[str, Any], path: Path) -> None:
    """How many answers had come after so many milliseconds, and images a second, round by round."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    waits, rates = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [row["variant"] for row in result["rows"]]
    for place, (variant, row) in enumerate(zip(names, result["rows"], strict=True)):
        colour, ms = COLOURS[variant], [seconds * 1e3 for seconds in sorted(row["seconds"])]
        share = [(i + 1) / len(ms) for i in range(len(ms))]
        label = f"{variant}: p50 {row['p50'] * 1e3:.0f} ms, p99 {row['p99'] * 1e3:.0f} ms"
        waits.plot(ms, share, color=colour, label=label)
        rates.bar(place, row["images_per_second"], 0.6, color=colour)
        rates.plot([place] * len(row["rounds"]), row["rounds"], "o", color="black", markersize=3)
    waits.set(xlabel="milliseconds from request to answer", ylabel="share of the answers", xlim=0, ylim=(0, 1))
    rates.set_xticks(range(len(names)), names)
    rates.set(ylabel="images a second (bar: median of rounds)")
    for axes in (waits, rates):
        axes.spines[["top", "right"]].set_visible(False)
    of = result["rows"][0]
    title = f"{of['network']}, {of['clients']} clients, {result['device_name']}, {result['date'][:10]}"
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def loopback(host: str) -> str:
    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass
    raise typer.BadParameter(f"load is sent to this machine alone, by a loopback address such as 127.0.0.1, not {host}")


def main(
    network: Annotated[str, typer.Option(help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the network's images.")] = 224,
    clients: Annotated[int, typer.Option(min=1, max=OUTSTANDING, help="Requests at a time.")] = 16,
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="Requests to each variant in a round.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, max=300, help="No request is sent later in a round.")] = 60,
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    host: Annotated[str, typer.Option(callback=loopback, help="A loopback address.")] = "127.0.0.1",
    out: Annotated[Path, typer.Option(help="Where to save the JSON; the plot goes beside it.")] = Path("out/load.json"),
) -> None:
    """Compare eager, fused and optimized behind the same service, under the same load, on this machine."""
    files = photographs()
    found: dict[str, dict[str, Any]] = {v.value: {"seconds": [], "rounds": []} for v in Variant}
    with ExitStack() as stack:
        ports = {variant: stack.enter_context(service(variant, network, size, host)) for variant in found}
        for file in files:
            answers = {variant: Client(host, port).classify(file) for variant, port in ports.items()}
            for variant, answer in answers.items():
                compare(variant, answer, answers["eager"])
        before = {variant: batches(host, port) for variant, port in ports.items()}
        for number in range(rounds):
            for variant in [*found][number % len(found) :] + [*found][: number % len(found)]:
                times, took = one_round(host, ports[variant], files, clients, requests, seconds)
                found[variant]["seconds"] += times
                found[variant]["rounds"].append(len(times) / took)
        for variant, row in found.items():
            pictures, times_run = (b - a for a, b in zip(before[variant], batches(host, ports[variant]), strict=True))
            row |= {"images_per_second": statistics.median(row["rounds"]), "mean_batch": pictures / times_run}
            row |= {"p50": quantile(row["seconds"], 0.5), "p99": quantile(row["seconds"], 0.99)}
    facts = facts_of_run("cuda" if torch.cuda.is_available() else "cpu")
    of = {"network": network, "size": size, "clients": clients}
    rows = [{**of, "variant": variant, **row} for variant, row in found.items()]
    result = {"kind": "load", "rows": rows, **facts}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    draw(result, out)
    print(f"{'':12}{'images/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'mean batch':>12}{'answers':>10}")
    for variant, row in found.items():
        figures = f"{row['images_per_second']:10.1f}{row['p50'] * 1e3:10.1f}{row['p99'] * 1e3:10.1f}"
        counts = f"{row['mean_batch']:12.2f}{len(row['seconds']):10}"
        print(f"{variant:12}{figures}{counts}")
    print(f"saved: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
