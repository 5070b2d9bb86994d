"""examples/serve.py as a real service, a process on a loopback port: real JPEG files, many clients at a time, files
that are none, decoders that are killed, an end in the middle of requests; and what examples/load.py makes of it."""

import asyncio
import contextlib
import io
import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
import typer.testing
from conftest import DEVICE

from fused_cnn.bench import networks

for package in ("starlette", "uvicorn", "torchvision", "PIL", "skimage", "matplotlib"):
    pytest.importorskip(package, reason=f"examples/serve.py needs {package}: pip install -e '.[serve]'")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(EXAMPLES))

import batches  # noqa: E402
import decoders  # noqa: E402
import load  # noqa: E402
import serve  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

NETWORK, SIZE = "resnet18", 64
PATIENCE = 120  # seconds that nothing takes
CLOSE = 5e-3  # of a probability: the service's convolutions may be TF32's


@pytest.fixture(autouse=True, scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where Python keeps no bytecode, each service would compile all of torch once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@dataclass
class Service:
    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: bytes | Iterator[bytes] | None = None) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, encode_chunked=not isinstance(body, bytes))
            response = connection.getresponse()
            return response.status, response.read()

    def classify(self, file: bytes) -> dict[int, float]:
        status, answer = self.ask("POST", "/classify", file)
        assert status == 200, (status, answer)
        return {best["class"]: best["probability"] for best in json.loads(answer)["top"]}

    def metrics(self) -> dict[str, float]:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return {name: float(n) for name, n in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def decoders(self) -> list[int]:
        pids: list[int] = json.loads(self.ask("GET", "/healthz")[1])["decoders"]
        return pids


@contextlib.contextmanager
def started(variant: str) -> Iterator[Service]:
    """A service in a group of processes of its own, which is empty in the end."""
    options = ("--network", NETWORK, "--size", str(SIZE), "--port", "0")
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--variant", variant, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            service = Service(process, int(process.stdout.readline().rsplit(":", 1)[1]))
            until(lambda: answers(service))
            yield service
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the group has the number of its first process


@pytest.fixture(scope="module")
def service_of() -> Iterator[Callable[[str], Service]]:
    """The running service of a variant, which tests share as long as they leave it alive."""
    running: dict[str, Service] = {}
    with contextlib.ExitStack() as stack:

        def service_of(variant: str) -> Service:
            if variant not in running:
                running[variant] = stack.enter_context(started(variant))
            return running[variant]

        yield service_of


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "what was waited for does not come"
        time.sleep(0.02)


def answers(service: Service) -> bool:
    try:
        return service.ask("GET", "/healthz")[0] == 200
    except ConnectionRefusedError:
        return False


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def group(service: Service) -> list[int]:
    """The processes that live in a service's group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(folder.name)) == service.process.pid and lives(int(folder.name)):
                found.append(int(folder.name))
    return found


def encoded(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """scikit-image's JPEG files, those of its photographs, and parts of these: each is another picture."""
    whole = load.photographs()
    parts = []
    for file in whole:
        picture = Image.open(io.BytesIO(file))
        w, h = picture.size
        corners = ((0, 0), (w // 2, 0), (0, h // 2), (w // 2, h // 2))
        parts += [encoded(picture.crop((x, y, x + w // 2, y + h // 2))) for x, y in corners]
    return whole + parts


@pytest.fixture(scope="module")
def direct(files: list[bytes]) -> torch.Tensor:
    """The network's own probabilities, of each file by itself."""
    model = networks.network(NETWORK, networks.photographs(4, SIZE).to(DEVICE))
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (networks.IMAGENET_MEAN, networks.IMAGENET_STD))
    rows = []
    for file in files:
        pixels = torch.frombuffer(bytearray(decoders.decode(file, SIZE)), dtype=torch.uint8).view(SIZE, SIZE, 3)
        with torch.no_grad():
            rows.append(model(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None].to(DEVICE)).softmax(1)[0].cpu())
    return torch.stack(rows)


def is_answer(top: dict[int, float], direct: torch.Tensor) -> bool:
    """Whether these are the five likeliest classes of this row, in their order."""
    given, best = torch.tensor(list(top.values())), direct.topk(5).values
    same = (direct[list(top)] - given).abs().max() < CLOSE and (best - given).abs().max() < CLOSE
    return bool(same) and list(top.values()) == sorted(top.values(), reverse=True)


def send(service: Service, files: Sequence[bytes], clients: int, times: int) -> list[tuple[int, dict[int, float]]]:
    """Every file so many times, from so many clients at a time; the number of the file with each answer."""
    numbers = [i for _ in range(times) for i in range(len(files))]
    with ThreadPoolExecutor(clients) as threads:
        return list(zip(numbers, threads.map(lambda i: service.classify(files[i]), numbers), strict=True))


@pytest.mark.parametrize("variant", ["eager", "fused", "optimized"])
def test_many_clients_at_a_time_each_get_the_models_answer_to_their_own_file(
    variant: str, service_of: Callable[[str], Service], files: list[bytes], direct: torch.Tensor
) -> None:
    service = service_of(variant)
    before = service.metrics()
    found = send(service, files, clients=16, times=3)
    assert all(is_answer(top, direct[i]) for i, top in found)
    assert not any(is_answer(top, direct[(i + 1) % len(files)]) for i, top in found), "files are told apart"
    metrics = service.metrics()
    images, count = (metrics[f"serve_batch_size_{of}"] - before[f"serve_batch_size_{of}"] for of in ("sum", "count"))
    assert images == len(found) == metrics["serve_images_total"] - before["serve_images_total"]
    assert images / count > 1, "batches are formed"
    assert metrics['serve_batch_size_bucket{le="8"}'] == metrics['serve_batch_size_bucket{le="+Inf"}']
    assert 0 < metrics['serve_latency_seconds{quantile="0.5"}'] <= metrics['serve_latency_seconds{quantile="0.99"}']
    assert metrics["serve_images_per_second"] > 0 and metrics["serve_outstanding_requests"] == 0


BOMB = encoded(Image.new("L", (8000, 8000)), "PNG")  # 64 million pixels, in some 60 KB
JPEG = encoded(Image.radial_gradient("L").convert("RGB"))


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "says"),
    [
        ("POST", "/classify", b"GIF89a, or so it says", 415, "neither a JPEG nor a PNG"),
        ("POST", "/classify", encoded(Image.new("RGB", (8, 8)), "GIF"), 415, "neither a JPEG nor a PNG"),
        ("POST", "/classify", JPEG[: len(JPEG) // 2], 422, "cannot be decoded"),
        ("POST", "/classify", JPEG[:20], 415, "neither a JPEG nor a PNG"),
        ("POST", "/classify", b"", 400, "empty"),
        ("POST", "/classify", bytes(serve.MAX_BYTES + 1), 413, "bytes"),
        ("POST", "/classify", [bytes(1 << 20)] * (serve.MAX_BYTES // 2**20 + 1), 413, "bytes"),  # without a length
        ("POST", "/classify", BOMB, 413, "pixels"),
        ("GET", "/classify", None, 405, "Not Allowed"),
        ("POST", "/elsewhere", JPEG, 404, "Not Found"),
    ],
    ids=["text", "gif", "half", "start", "empty", "large", "streamed", "bomb", "method", "path"],
)
def test_what_is_no_file_is_refused_and_the_service_goes_on(
    method: str,
    path: str,
    sent: bytes | list[bytes] | None,
    status: int,
    says: str,
    service_of: Callable[[str], Service],
    files: list[bytes],
    direct: torch.Tensor,
) -> None:
    service = service_of("fused")
    name = f'serve_requests_total{{status="{status}"}}'
    before = service.metrics().get(name, 0)
    got, answer = service.ask(method, path, iter(sent) if isinstance(sent, list) else sent)
    assert got == status and says in json.loads(answer)["error"]
    assert service.metrics()[name] == before + 1
    assert is_answer(service.classify(files[0]), direct[0])


@contextlib.contextmanager
def half_sent(service: Service, file: bytes, times: int) -> Iterator[list[HTTPConnection]]:
    """Requests of which the service has half."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(times):
            connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
            stack.enter_context(contextlib.closing(connection))
            connection.putrequest("POST", "/classify")
            connection.putheader("Content-Length", str(len(file)))
            connection.endheaders(file[: len(file) // 2])
            connections.append(connection)
        until(lambda: service.metrics()["serve_outstanding_requests"] >= times)
        yield connections


def second_half(connection: HTTPConnection, file: bytes) -> dict[int, float]:
    connection.send(file[len(file) // 2 :])
    response = connection.getresponse()
    assert response.status == 200
    return {best["class"]: best["probability"] for best in json.loads(response.read())["top"]}


def test_more_requests_than_it_holds_are_told_to_come_again(
    service_of: Callable[[str], Service], files: list[bytes], direct: torch.Tensor
) -> None:
    service = service_of("fused")
    with half_sent(service, files[0], serve.OUTSTANDING) as connections:
        further = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
        with contextlib.closing(further):
            further.request("POST", "/classify", files[1])
            response = further.getresponse()
            assert response.status == 503 and response.headers["Retry-After"] == "1"
            response.read()
            connections.pop().close()  # one that goes away makes place
            until(lambda: service.metrics()["serve_outstanding_requests"] < serve.OUTSTANDING)
            further.request("POST", "/classify", files[1])  # the same connection can be used on
            assert further.getresponse().status == 200
        assert all(is_answer(second_half(connection, files[0]), direct[0]) for connection in connections)


def test_a_killed_decoder_loses_no_request(
    service_of: Callable[[str], Service], files: list[bytes], direct: torch.Tensor
) -> None:
    service = service_of("fused")
    service.classify(files[0])
    first, before = service.decoders(), service.metrics()["serve_decoders_lost_total"]
    assert len(first) == 2
    finished = threading.Event()
    found: list[tuple[int, dict[int, float]]] = []

    def client(start: int) -> None:
        for i in itertools.islice(itertools.cycle(range(len(files))), start, start + 400):
            found.append((i, service.classify(files[i])))
            if finished.is_set():
                return

    with ThreadPoolExecutor(16) as threads:
        clients = [threads.submit(client, start) for start in range(16)]
        for pid in first:
            answered = len(found)
            until(lambda answered=answered: len(found) > answered + 16)
            os.kill(pid, signal.SIGKILL)
        until(lambda: service.metrics()["serve_decoders_lost_total"] == before + 2)
        answered = len(found)
        until(lambda: len(found) > answered + 32)  # by those that took their places
        finished.set()
        for each in clients:
            each.result()
    assert all(is_answer(top, direct[i]) for i, top in found)
    now = service.decoders()
    assert len(now) == 2 and not set(now) & set(first)


def test_what_is_accepted_is_answered_before_the_end(files: list[bytes], direct: torch.Tensor) -> None:
    with started("fused") as service:
        pids = service.decoders()
        answered: list[tuple[int, dict[int, float]]] = []

        def client(i: int) -> None:
            with contextlib.suppress(ConnectionError):  # a new connection finds it gone
                for _ in range(10_000):
                    answered.append((i, service.classify(files[i])))

        with half_sent(service, files[0], 8) as connections, ThreadPoolExecutor(8) as threads:
            clients = [threads.submit(client, i) for i in range(8)]
            until(lambda: len(answered) > 16)
            service.process.terminate()
            until(lambda: not answers(service))
            assert service.process.poll() is None and all(map(lives, pids))  # it waits for the other halves
            assert all(is_answer(second_half(connection, files[0]), direct[0]) for connection in connections)
            for each in clients:
                each.result()
        assert service.process.wait(PATIENCE) == 0
        assert all(is_answer(top, direct[i]) for i, top in answered)
        assert len(pids) == 2 and not any(map(lives, pids))
        until(lambda: not group(service))


def test_decoders_end_when_their_service_is_killed() -> None:
    script = "import decoders; d = decoders.Decoders(64, 2); print(*(d.idle.get()[0].pid for _ in 'ab')); input()"
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=EXAMPLES, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(lives, pids))
        process.kill()
        until(lambda: not any(map(lives, pids)))


def test_a_file_that_two_decoders_die_of_is_refused_and_no_other(
    files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoders, "decode_until_closed", operator.is_)  # a process that does nothing, and ends
        pool = decoders.Decoders(SIZE, 1)
        with pytest.raises(HTTPException) as refused:
            asyncio.run(pool.decode(files[0]))
    assert refused.value.status_code == 422 and pool.lost == 2
    with pool:
        assert asyncio.run(pool.decode(files[0])) == decoders.decode(files[0], SIZE)
    assert pool.lost == 3


def test_pictures_are_decoded_as_elsewhere(files: list[bytes]) -> None:
    def middle(picture: Image.Image) -> torch.Tensor:
        w, h = picture.size
        side = min(w, h)
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        pixels = bytearray(picture.convert("RGB").resize((SIZE, SIZE), box=box).tobytes())
        return torch.frombuffer(pixels, dtype=torch.uint8).float()

    def served(file: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(decoders.decode(file, SIZE)), dtype=torch.uint8).float()

    for file in files:
        picture = Image.open(io.BytesIO(file))
        assert (served(file) - middle(picture)).abs().mean() < 3  # of 255: libjpeg makes large ones smaller itself
        assert torch.equal(served(encoded(picture, "PNG")), middle(picture))
    picture = Image.open(io.BytesIO(files[-1])).convert("RGB")
    lying = Image.Exif()
    lying[0x0112] = 6  # how a camera that was held upright says so
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(served(encoded(turned, "PNG", exif=lying)), served(encoded(picture, "PNG")))
    for mode in ("L", "RGBA", "P", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert len(served(encoded(picture.convert(mode), kind))) == SIZE * SIZE * 3


def test_a_batch_that_fails_harms_no_other() -> None:
    def classify(pictures: Sequence[bytes]) -> list[batches.Answer]:
        if b"bad" in pictures:
            raise ValueError("bad")
        return [[{"class": int(picture), "probability": 1.0}] for picture in pictures]

    async def answered() -> tuple[list[object], list[object], list[int]]:
        pool = batches.Batches(classify, 4)
        loop = asyncio.create_task(pool.run())
        first = await asyncio.gather(*(pool.answer(p) for p in (b"0", b"1", b"bad", b"3")), return_exceptions=True)
        then = await asyncio.gather(*(pool.answer(b"%d" % i) for i in range(11)), return_exceptions=True)
        loop.cancel()
        return first, then, sorted(pool.sizes.elements())

    first, then, sizes = asyncio.run(asyncio.wait_for(answered(), PATIENCE))
    assert all(isinstance(each, ValueError) for each in first)
    assert then == [[{"class": i, "probability": 1.0}] for i in range(11)]
    assert sizes == [3, 4, 4, 4]


def test_the_load_script_compares_saves_and_draws(
    service_of: Callable[[str], Service],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "service", lambda variant, *_: contextlib.nullcontext(service_of(variant).port))
    load.main(NETWORK, SIZE, clients=4, requests=12, seconds=PATIENCE, rounds=2, out=tmp_path / "load.json")
    result = json.loads((tmp_path / "load.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["eager", "fused", "optimized"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 24 and len(row["rounds"]) == 2 and min(row["rounds"]) > 0
        assert 0 < row["p50"] <= row["p99"] == max(row["seconds"]) and row["mean_batch"] >= 1
    assert Image.open(tmp_path / "load.png").size == (1100, 440)
    said = capsys.readouterr().out
    assert all(name in said for name in ("optimized", "images/s", "load.png"))
    with pytest.raises(SystemExit, match="answers otherwise"):
        load.compare("fused", {1: 0.5, 2: 0.25}, {1: 0.5, 3: 0.3})


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "example.org"])
def test_the_load_script_sends_to_this_machine_alone(host: str) -> None:
    app = typer.Typer()
    app.command()(load.main)
    done = typer.testing.CliRunner().invoke(app, ["--host", host])
    assert done.exit_code == 2 and "this machine" in done.output
