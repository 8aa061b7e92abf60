"""What serving costs: ours, two rivals with the same predictor, TorchServe's stock handler, and the bare predictor.

`python -m benchmarks.serve` starts all of them on this machine, on ports of their own, and takes them in turn at each
load, so that what disturbs the machine disturbs all. Where LitServe is not installed, it makes an environment for the
two rivals; TorchServe's stock handler takes part where captum is, which it imports (`pip install --no-deps captum`).

Closed loop: so many clients, each sending its next request when its last is answered. Paced: requests at 80% of the
throughput that the server reached with 8 clients, evenly and at random (Poisson) times, whatever the answers do. The
clients run on the same cores; their own cost is printed as `of the client`. CPU-ms are the processor time of all
processes of a server per answered request.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image

from agegender import Predictor
from agegender.process import keep_freed_memory
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import duration, errors_without_traceback, make_parser, positive
from benchmarks.environment import make_environment
from benchmarks.images import PHOTOGRAPHS, sample_face
from benchmarks.outputs import add_output_options, write_outputs
from handler.archive import build_archive
from handler.server import Server
from tests.serving import copy_settings

CONFIG: Final = Path("config.properties")
CONTESTANTS: Final = ("ours", "litserve", "fastapi", "stock")
RIVALS: Final = {"litserve", "fastapi"}
RIVALS_PACKAGES: Final = ("litserve>=0.2.19", "fastapi", "uvicorn", "python-multipart")
PACES: Final = ("even", "Poisson")
SIZES: Final = {"chip": (200, 200), **PHOTOGRAPHS}

_barrier: Barrier  # of the pool that this process belongs to


@dataclass
class Contestant:
    """A server that is up: where requests go, in what form, and the root of its processes."""

    name: str
    url: str
    process: psutil.Process
    headers: dict[str, str] = field(default_factory=dict)
    wrap: Callable[[bytes], bytes] = bytes


Starter = Callable[[int], AbstractContextManager[Contestant]]  # workers -> the contestant, up


@dataclass
class Measurement:
    """One contestant under one load. Latencies in ms, CPU in ms per request."""

    contestant: str
    image: str
    load: str
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cpu_ms: float
    client_cpu_ms: float
    errors: int


@errors_without_traceback("serve")
def main() -> None:
    options = _options()
    images = {name: _image(SIZES[name]) for name in options.images}
    results: list[Measurement] = []
    print("\n".join([_intro(options), "", *_HEAD]), flush=True)
    with ExitStack() as stack:
        contestants, missing = _start(options, stack)
        for image_name, image in images.items():
            results += _report([_bare(image_name, image, options.workers, options.seconds)])
            for clients in options.clients:
                results += _report(_closed(each, image_name, image, clients, options.seconds) for each in contestants)
            for name in options.paced:
                at_8 = {
                    each.contestant: each for each in results if (each.image, each.load) == (image_name, "8 clients")
                }
                rivals = [each for each in contestants if each.name in at_8]
                results += _report(
                    _paced(each, image_name, image, name, 0.8 * at_8[each.name].requests_per_s, options.seconds)
                    for each in rivals
                )
    lines = [_intro(options), "", *_HEAD, *map(_row, results), "", *_summary(results), *missing]
    print("\n".join(["", *_summary(results), *missing]))
    write_outputs(options, "\n".join(lines), results)


def _start(options: argparse.Namespace, stack: ExitStack) -> tuple[list[Contestant], list[str]]:
    """All that can be started, and why the others cannot."""
    names, missing = list(options.contestants), []
    if "stock" in names and not find_spec("captum"):
        names.remove("stock")
        missing.append("- not measured, stock: its handler imports captum; pip install --no-deps captum")
    python: Path | str = options.rivals_python or Path(sys.executable)
    if RIVALS & set(names) and not options.rivals_python and not find_spec("litserve"):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rivals-")))
        python = make_environment(folder, *RIVALS_PACKAGES, with_ours=True)
    if isinstance(python, str):
        names = [name for name in names if name not in RIVALS]
        missing.append(f"- not measured, LitServe and FastAPI: {python}")
    starters: dict[str, Starter] = {
        "ours": _ours,
        "stock": _stock,
        **{name: partial(_rival, name, str(python)) for name in RIVALS},
    }
    return [stack.enter_context(starters[name](options.workers)) for name in names], missing


def _options() -> argparse.Namespace:
    parser = make_parser("serve", __doc__)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="servers")
    parser.add_argument("--images", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of the image sent")
    parser.add_argument("--clients", nargs="+", type=positive, default=[1, 2, 4, 8, 16], help="for the closed loop")
    parser.add_argument("--paced", nargs="*", choices=PACES, default=list(PACES), help="times of the paced requests")
    parser.add_argument("--seconds", type=duration, default=20, help="per figure, after a warm-up of a fifth")
    parser.add_argument("--workers", type=positive, default=psutil.cpu_count(), help="per server (default: the cores)")
    parser.add_argument("--rivals-python", type=Path, help="an interpreter that has LitServe, FastAPI and the project")
    add_output_options(parser)
    options = parser.parse_args()
    if options.paced and 8 not in options.clients:
        parser.error("--paced takes its rate from 8 clients; add 8 to --clients, or leave --paced empty")
    return options


def _image(size: tuple[int, int]) -> bytes:
    """A JPEG with one face, from a public-domain photograph that matplotlib carries."""
    side = min(size)
    face = sample_face().resize((side, side), Image.Resampling.BICUBIC)
    texture = np.random.default_rng(0).integers(90, 160, (size[1] // 8, size[0] // 8, 3), np.uint8)
    canvas = Image.fromarray(texture).resize(size, Image.Resampling.BICUBIC)
    canvas.paste(face if side <= 200 else face.resize((side // 3, side // 3)), (0, 0))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# The contestants.


@contextmanager
def _ours(workers: int) -> Iterator[Contestant]:
    with _torchserve("ours", workers, lambda target: build_archive(DEFAULT_MODEL, target)) as contestant:
        yield contestant


@contextmanager
def _stock(workers: int) -> Iterator[Contestant]:
    """TorchServe's own image_classifier with ResNet-18, under the same settings of the server."""
    with _torchserve("stock", workers, _stock_archive) as contestant:
        yield contestant


@contextmanager
def _torchserve(name: str, workers: int, build: Callable[[Path], object]) -> Iterator[Contestant]:
    with tempfile.TemporaryDirectory(prefix=f"serve-{name}-") as folder:
        directory = Path(folder)
        (directory / "model_store").mkdir()
        build(directory / "model_store" / "agegender.mar")
        config = copy_settings(CONFIG, directory)
        config.write_text(f"{config.read_text()}\ndefault_workers_per_model={workers}\n")
        server = Server(config, directory)
        server.start(timeout_s=300)
        try:
            process = server.process()
            assert process is not None
            url = f"{server.settings['inference_address']}/predictions/agegender"
            yield Contestant(name, url, process, {"Authorization": f"Bearer {server.key('inference')}"})
        finally:
            server.stop(drain_s=5)


def _stock_archive(target: Path) -> None:
    import torch
    import torchvision

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torchvision.models.resnet18(num_classes=1000).eval()), buffer)
    model = {"modelName": "agegender", "modelVersion": "1.0", "handler": "image_classifier", "serializedFile": "net.pt"}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("net.pt", buffer.getvalue())
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))


@contextmanager
def _rival(name: str, python: str, workers: int) -> Iterator[Contestant]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "benchmarks.rivals", name, str(port), str(workers)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    root = psutil.Process(process.pid)
    try:
        contestant = Contestant(name, f"http://127.0.0.1:{port}/predict", root)
        if name == "litserve":
            contestant.headers = {"Content-Type": "multipart/form-data; boundary=part"}
            contestant.wrap = _as_form
        _wait_until_it_answers(contestant, process)
        yield contestant
    finally:
        family = root.children(recursive=True)
        process.terminate()
        for each in psutil.wait_procs([root, *family], timeout=10)[1]:
            each.kill()


def _as_form(image: bytes) -> bytes:
    head = b'--part\r\nContent-Disposition: form-data; name="request"; filename="a.jpg"\r\n\r\n'
    return head + image + b"\r\n--part--\r\n"


def _wait_until_it_answers(contestant: Contestant, process: subprocess.Popen[bytes]) -> None:
    body = contestant.wrap(_image(SIZES["chip"]))
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if _Caller(contestant, body)():
            return
        time.sleep(0.5)
    raise SystemExit(f"{contestant.name} did not start")


# The loads.


class _Caller:
    """Sends one body again and again over one connection."""

    def __init__(self, contestant: Contestant, body: bytes) -> None:
        address = urlsplit(contestant.url)
        self._connection = HTTPConnection(address.hostname or "", address.port, timeout=120)
        self._request = ("POST", address.path, body, contestant.headers)

    def __call__(self) -> bool:
        """Whether the answer was a good one."""
        try:
            self._connection.request(*self._request)
            response = self._connection.getresponse()
            response.read()
        except (OSError, HTTPException):
            self._connection.close()  # the next request opens it again
            return False
        return response.status == 200


def _closed(contestant: Contestant, image_name: str, image: bytes, clients: int, seconds: float) -> Measurement:
    body = contestant.wrap(image)

    def run(duration: float) -> tuple[list[float], int]:
        deadline = time.monotonic() + duration
        with ThreadPoolExecutor(clients) as pool:
            parts = list(pool.map(lambda _: _repeat(_Caller(contestant, body), deadline), range(clients)))
        return [latency for part, _ in parts for latency in part], sum(errors for _, errors in parts)

    run(seconds / 5)
    return _measure(contestant, image_name, f"{clients} clients", lambda: run(seconds))


def _repeat(call: _Caller, deadline: float) -> tuple[list[float], int]:
    latencies, errors = [], 0
    while (started := time.monotonic()) < deadline:
        if call():
            latencies.append(time.monotonic() - started)
        else:
            errors += 1
    return latencies, errors


def _paced(
    contestant: Contestant, image_name: str, image: bytes, times: str, rate: float, seconds: float
) -> Measurement:
    """Latency counts from the moment at which a request was due, so that a server that falls behind shows."""
    body = contestant.wrap(image)
    rng = random.Random(0)
    local = threading.local()

    def send(due: float) -> float | None:
        time.sleep(max(0.0, due - time.monotonic()))
        if not hasattr(local, "call"):
            local.call = _Caller(contestant, body)
        return time.monotonic() - due if local.call() else None

    def run() -> tuple[list[float], int]:
        due, moments = time.monotonic() + 0.1, []
        for _ in range(max(1, int(rate * seconds))):
            due += rng.expovariate(rate) if times == "Poisson" else 1 / rate
            moments.append(due)
        with ThreadPoolExecutor(32) as pool:
            outcomes = list(pool.map(send, moments))
        latencies = [outcome for outcome in outcomes if outcome is not None]
        return latencies, len(outcomes) - len(latencies)

    return _measure(contestant, image_name, f"80% {times}", run)


def _measure(
    contestant: Contestant, image_name: str, load: str, run: Callable[[], tuple[list[float], int]]
) -> Measurement:
    server, client, started = _cpu_s(contestant.process), time.process_time(), time.monotonic()
    latencies, errors = run()
    elapsed = time.monotonic() - started
    count = max(1, len(latencies))
    cpu = (_cpu_s(contestant.process) - server) * 1000 / count
    client_cpu = (time.process_time() - client) * 1000 / count
    percentiles = _percentiles_ms(latencies)
    return Measurement(
        contestant.name, image_name, load, len(latencies) / elapsed, *percentiles, cpu, client_cpu, errors
    )


def _bare(image_name: str, image: bytes, workers: int, seconds: float) -> Measurement:
    """The predictor in a loop, in as many processes as a server has workers: the limit."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with context.Pool(workers, _share, (barrier,)) as pool:
        outcomes = pool.starmap(_bare_loop, [(image, seconds)] * workers, chunksize=1)
    latencies = [latency for part, _, _ in outcomes for latency in part]
    per_second = sum(len(part) / elapsed for part, elapsed, _ in outcomes)
    cpu = sum(cpu for _, _, cpu in outcomes) * 1000 / len(latencies)
    return Measurement("bare", image_name, "loop", per_second, *_percentiles_ms(latencies), cpu, 0.0, 0)


def _share(barrier: Barrier) -> None:
    """Runs first in each process of the pool, since a barrier cannot be sent along with the work."""
    global _barrier
    _barrier = barrier


def _bare_loop(image: bytes, seconds: float) -> tuple[list[float], float, float]:
    keep_freed_memory()
    predictor = Predictor(DEFAULT_MODEL, device="cpu", threads=1)
    for _ in range(5):
        predictor.predict([image])
    _barrier.wait(timeout=120)  # no process has a core to itself while another one loads
    started, cpu, latencies = time.monotonic(), time.process_time(), []
    while (now := time.monotonic()) < started + seconds:
        predictor.predict([image])
        latencies.append(time.monotonic() - now)
    return latencies, time.monotonic() - started, time.process_time() - cpu


def _cpu_s(root: psutil.Process) -> float:
    """Processor time of a process and all its children."""
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _percentiles_ms(latencies_s: Sequence[float]) -> tuple[float, float, float]:
    p50, p95, p99 = np.percentile(latencies_s or [float("nan")], [50, 95, 99]) * 1000
    return float(p50), float(p95), float(p99)


# The report.

_HEAD: Final = (
    "| image | load | server | req/s | p50, ms | p95, ms | p99, ms | CPU-ms per request | of the client | errors |",
    "|---" * 10 + "|",
)


def _intro(options: argparse.Namespace) -> str:
    return f"{psutil.cpu_count()} cores, {options.workers} workers each, {options.seconds:g} s per figure."


def _report(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Prints each as soon as it is there."""
    kept = []
    for each in measurements:
        print(_row(each), flush=True)
        kept.append(each)
    return kept


def _row(each: Measurement) -> str:
    figures = (each.requests_per_s, each.p50_ms, each.p95_ms, each.p99_ms, each.cpu_ms, each.client_cpu_ms)
    cells = (each.image, each.load, each.contestant, *(f"{figure:.1f}" for figure in figures), f"{each.errors}")
    return f"| {' | '.join(cells)} |"


def _summary(results: Sequence[Measurement]) -> list[str]:
    """Each server's best throughput and its tail at 80% load, against the bare predictor."""
    lines = ["Against the bare predictor:", ""]
    for bare in (each for each in results if each.contestant == "bare"):
        for name in dict.fromkeys(each.contestant for each in results if each.contestant != "bare"):
            own = [each for each in results if (each.contestant, each.image) == (name, bare.image)]
            best = max(each.requests_per_s for each in own)
            tails = [f"p99 {each.load} {each.p99_ms / bare.p50_ms:.1f}x its median" for each in own if "%" in each.load]
            figures = ", ".join([f"throughput {best / bare.requests_per_s:.2f}", *tails])
            lines.append(f"- {bare.image}, {name}: {figures}")
    return lines


if __name__ == "__main__":
    main()
