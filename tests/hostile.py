"""Requests that mean no good, and what must hold when they have been answered."""

import base64
import io
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from handler.server import Server

Ask = Callable[..., tuple[int, Any]]  # the fixture of that name

PREDICTIONS = "/predictions/agegender"


def kserve(*images: bytes, **more: Any) -> dict[str, Any]:
    return {"instances": [{"data": base64.b64encode(image).decode()} for image in images], **more}


def hostile_requests(image: bytes, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Random, truncated, mutilated, empty, deep, mistyped and bomb-like requests."""
    rng = random.Random(seed)
    types = ["application/json", "image/jpeg", "text/plain", "application/octet-stream", "multipart/form-data", "x"]
    bomb = _bomb()
    signatures = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"RIFF0000WEBP"]
    deep = b'{"instances":' * 50_000
    noise = np.random.default_rng(seed)
    makers: list[Callable[[], bytes]] = [
        lambda: noise.bytes(rng.randrange(1, 50_000)),
        lambda: image[: rng.randrange(len(image))],
        lambda: _mutilated(image, rng),
        lambda: b"",
        lambda: deep,
        lambda: bomb,
        lambda: json.dumps(rng.choice([None, 1, [], {}, {"instances": None}, {"instances": [[]]}, "x"])).encode(),
        lambda: json.dumps(kserve(noise.bytes(200), parameters={"faces": rng.random()})).encode(),
        lambda: rng.choice(signatures) + noise.bytes(99),
    ]
    return [
        {"body": makers[index % len(makers)](), "headers": {"content-type": rng.choice(types)}}
        for index in range(count)
    ]


def _mutilated(image: bytes, rng: random.Random) -> bytes:
    data = bytearray(image)
    for _ in range(rng.randrange(1, 100)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (7000, 7100)).save(buffer, "PNG")
    return buffer.getvalue()


def assert_survives(requests: list[dict[str, Any]], ask: Ask, server: Server) -> None:
    """Every request is answered, none by a dead or failed worker, and the workers are the same as before."""
    before = _workers(server)
    for request in requests:
        status, answer = ask(PREDICTIONS, **request)
        ours = "predictions" in answer if status == 200 else status in (400, 413) and isinstance(answer["error"], dict)
        # Forms are taken apart by TorchServe itself, which tells of a broken one by a 500 of its own.
        form = request["headers"]["content-type"].startswith("multipart")
        broken_form = form and answer.get("type", "").endswith("DecoderException")
        assert ours or broken_form, (status, str(answer)[:300], request["headers"], request["body"][:60])
        assert "Traceback" not in str(answer)
    assert _workers(server) == before
    assert server.ready()


def _workers(server: Server) -> list[int]:
    process = server.process()
    assert process is not None
    return [worker.pid for worker in process.children(recursive=True)]
