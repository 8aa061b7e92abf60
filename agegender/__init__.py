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


def __getattr__(name: str) -> Any:
    """Imports what needs torch, which takes seconds, when it is first asked for."""
    home = {"Model": "agegender.model", "Predictor": "agegender.predictor"}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
