"""Builds the model archive that TorchServe loads: handler, core, artifact and detector, byte for byte reproducible."""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import agegender
from agegender import Model
from agegender.detector import detector_weights
from agegender.spec import DEFAULT_MODEL
from handler import ARTIFACT, DETECTOR_WEIGHTS, MODEL_NAME

__all__ = ["ARCHIVE", "build_archive"]

ARCHIVE: Final = DEFAULT_MODEL.with_suffix(".mar")
_HANDLER: Final = ("__init__.py", "handler.py", "metrics.py", "request.py")
_SETTINGS: Final = "model-config.yaml"
_FIXED_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold
_READABLE: Final = 0o100644 << 16


def build_archive(model: Path = DEFAULT_MODEL, target: Path = ARCHIVE) -> str:
    """Writes the archive; the same inputs give the same bytes.

    Args:
        model: the artifact.
        target: the archive to write, a .mar file.

    Returns:
        The version that the archive announces, which is the artifact's.

    Raises:
        ModelLoadError: the artifact or the detector's weights cannot be used.
    """
    version = Model(model, device="cpu").spec.version
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")  # another process may be building it as well
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, data in sorted(_members(model, version)):
                _write(archive, name, data)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return version


def _members(model: Path, version: str) -> Iterator[tuple[str, bytes]]:
    here = Path(__file__).parent
    core = Path(agegender.__file__).parent.glob("*.py")
    for source in (*core, *(here / name for name in _HANDLER)):
        yield f"{source.parent.name}/{source.name}", source.read_bytes()
    yield ARTIFACT, model.read_bytes()
    yield DETECTOR_WEIGHTS, detector_weights()
    yield _SETTINGS, (here / _SETTINGS).read_bytes()
    yield "MAR-INF/MANIFEST.json", json.dumps(_manifest(version), indent=1).encode()


def _manifest(version: str) -> dict[str, object]:
    return {
        "runtime": "python",
        "model": {
            "modelName": MODEL_NAME,
            "modelVersion": version,
            "handler": "handler.handler",
            "configFile": _SETTINGS,
        },
        "archiverVersion": "0.12.0",
        "createdOn": "01/01/1980 00:00:00",  # a fixed one: TorchServe asks for it, reproducibility forbids the true one
    }


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _FIXED_TIME)
    entry.external_attr = _READABLE
    entry.create_system = 3  # Unix, wherever it is built
    # Stored, not deflated: weights hardly shrink, and zlib's output differs between its versions.
    archive.writestr(entry, data, zipfile.ZIP_STORED)
