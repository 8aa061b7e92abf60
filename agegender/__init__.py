"""Perceived age and gender from faces: data -> image -> faces -> chips -> predictions -> records."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from agegender.chips import cut_chip
from agegender.detector import Face, FaceDetector
from agegender.errors import (
    AgeGenderError,
    ImageDecodeError,
    ImageTooLargeError,
    ModelLoadError,
    NotAnImageError,
    ServerError,
)
from agegender.image import decode_image
from agegender.result import Box, FacePrediction, FacesMode, ImageResult, Item
from agegender.spec import ModelSpec

if TYPE_CHECKING:
    from agegender.client import Client
    from agegender.model import ChipModel, Model, Predictions
    from agegender.predictor import Predictor

_LATE: Final = {
    "ChipModel": "agegender.model",
    "Client": "agegender.client",
    "Model": "agegender.model",
    "Predictions": "agegender.model",
    "Predictor": "agegender.predictor",
}

__all__ = [
    "AgeGenderError",
    "Box",
    "ChipModel",
    "Client",
    "Face",
    "FaceDetector",
    "FacePrediction",
    "FacesMode",
    "ImageDecodeError",
    "ImageResult",
    "ImageTooLargeError",
    "Item",
    "Model",
    "ModelLoadError",
    "ModelSpec",
    "NotAnImageError",
    "Predictions",
    "Predictor",
    "ServerError",
    "cut_chip",
    "decode_image",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> Any:
    """Imports what takes time, torch above all, when it is first asked for; the version is the package's."""
    if name == "__version__":
        return _version()
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError as error:  # as in the server's archive
        raise AttributeError(f"{__name__} is not installed here, so its version is not known") from error
