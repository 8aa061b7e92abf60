"""Perceived age and gender from faces: data -> image -> faces -> chips -> predictions -> records."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from agegender.result import FacePrediction, ImageResult, Item
from agegender.spec import ModelSpec

if TYPE_CHECKING:
    from agegender.model import Model
    from agegender.predictor import Predictor

__all__ = [
    "AgeGenderError",
    "Face",
    "FaceDetector",
    "FacePrediction",
    "ImageDecodeError",
    "ImageResult",
    "ImageTooLargeError",
    "Item",
    "Model",
    "ModelLoadError",
    "ModelSpec",
    "NotAnImageError",
    "Predictor",
    "ServerError",
    "cut_chip",
    "decode_image",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> Any:
    """Imports what needs torch, which takes seconds, when it is first asked for; the version is the package's."""
    if name == "__version__":
        return _version()
    home = {"Model": "agegender.model", "Predictor": "agegender.predictor"}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError as error:  # as in the server's archive
        raise AttributeError(f"{__name__} is not installed here, so its version is not known") from error
