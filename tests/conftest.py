"""What many tests need, made without network: sample photographs of installed packages, encoders, the shipped model."""

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import urllib3
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share the machine with what they start

from agegender import Predictor
from batch.samples import package_file
from handler.archive import build_archive
from handler.server import Server
from tests.hostile import Ask
from tests.serving import copy_settings

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "model_store" / "agegender.pt"
SHARED = REPOSITORY.parent / "shared"

Encode = Callable[..., bytes]


@pytest.fixture(scope="session", autouse=True)
def fonts_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Training would keep matplotlib's list of them with its cache, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("fonts")))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The artifact that ships."""
    return MODEL


@pytest.fixture(scope="session")
def grace_hopper_path() -> Path:
    """A JPEG portrait of 512x606 pixels, public domain, from matplotlib."""
    return package_file("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")


@pytest.fixture(scope="session")
def astronaut_path() -> Path:
    """A PNG portrait of 512x512 pixels, public domain, from scikit-image."""
    return package_file("skimage", "data/astronaut.png")


@pytest.fixture(scope="session")
def grace_hopper(grace_hopper_path: Path) -> bytes:
    return grace_hopper_path.read_bytes()


@pytest.fixture(scope="session")
def astronaut(astronaut_path: Path) -> bytes:
    return astronaut_path.read_bytes()


@pytest.fixture(scope="session")
def encode() -> Encode:
    """encode(pixels or PIL image, format, **options of Pillow) -> the encoded file."""

    def encode_(image: npt.NDArray[np.uint8] | Image.Image, format_: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        source = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        source.save(buffer, format_, **options)
        return buffer.getvalue()

    return encode_


@pytest.fixture(scope="session")
def blank_png(encode: Encode) -> bytes:
    """An image without a face."""
    return encode(Image.new("RGB", (320, 240), (90, 120, 150)), "PNG")


@pytest.fixture(scope="session")
def group_jpeg(astronaut: bytes, grace_hopper: bytes, encode: Encode) -> bytes:
    """A JPEG of two sample portraits side by side, the right one at half size: two faces."""
    canvas = Image.new("RGB", (900, 620), (128, 128, 128))
    canvas.paste(Image.open(io.BytesIO(grace_hopper)).convert("RGB"), (0, 0))
    canvas.paste(Image.open(io.BytesIO(astronaut)).convert("RGB").resize((256, 256)), (580, 100))
    return encode(canvas, "JPEG", quality=95)


@pytest.fixture(scope="session")
def predictor() -> Predictor:
    """The chain with the shipped model, on the CPU."""
    return Predictor(MODEL, device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data(name) -> ../shared/name; skips the test where that lies not."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is not there")
        return path

    return locate


@pytest.fixture(scope="session")
def photos(shared_data: Callable[[str], Path]) -> Path:
    """The folder of everyday photographs, where it lies beside the repository."""
    return shared_data("photos")


@pytest.fixture(scope="session")
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """new_server() -> a TorchServe of its own, not started: the project's settings on free ports, in a directory."""
    servers: list[Server] = []

    def make() -> Server:
        directory = tmp_path_factory.mktemp("torchserve")
        build_archive(MODEL, directory / "model_store" / "agegender.mar")
        servers.append(Server(copy_settings(REPOSITORY / "config.properties", directory), directory))
        return servers[-1]

    yield make
    for server in servers:
        server.stop(drain_s=0)


@pytest.fixture(scope="session")
def server(new_server: Callable[[], Server]) -> Server:
    """The TorchServe that the session's tests share, ready."""
    server = new_server()
    server.start(timeout_s=300)
    return server


@pytest.fixture(scope="session")
def asking() -> Callable[[Server], Ask]:
    """asking(server) -> ask(path, **what urllib3 takes), which gives status and decoded JSON of a POST with its key."""
    http = urllib3.PoolManager(maxsize=32, retries=False, timeout=urllib3.Timeout(connect=5, read=120))

    def of(server: Server) -> Ask:
        def ask(path: str, *, headers: dict[str, str] | None = None, **request: Any) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {server.key('inference')}", **(headers or {})}
            response = http.request("POST", server.settings["inference_address"] + path, headers=headers, **request)
            return response.status, json.loads(response.data) if response.data else None

        return ask

    return of


@pytest.fixture
def ask(asking: Callable[[Server], Ask], server: Server) -> Ask:
    """Asks the shared server."""
    return asking(server)
