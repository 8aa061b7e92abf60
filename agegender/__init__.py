"""Perceived age and gender from faces: data -> image -> faces -> chips -> predictions -> records."""

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
from agegender.model import Model, ModelSpec
from agegender.predictor import Predictor
from agegender.result import FacePrediction, ImageResult, Item

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
