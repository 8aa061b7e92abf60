"""predictions -> results: what the chain says of one input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from agegender.errors import AgeGenderError, ImageTooLargeError

__all__ = ["Box", "FacePrediction", "FacesMode", "ImageResult", "Item", "as_items", "scale_box"]

Box = tuple[float, float, float, float]

FacesMode = Literal["detect", "whole"]


@dataclass(frozen=True)
class Item:
    """One input: the encoded bytes of an image, and the path or name that its result will carry."""

    data: bytes
    path: str = ""


def as_items(items: Iterable[Item | bytes]) -> Iterator[Item]:
    """Makes items of bare bytes.

    Raises:
        TypeError: one input was given instead of several; each of its bytes would become an item.
    """
    if isinstance(items, bytes | bytearray | memoryview | str):
        raise TypeError("items must be a list of encoded images; put a single one into a list")
    return (item if isinstance(item, Item) else Item(item) for item in items)


def scale_box(box: Box, x: float, y: float) -> Box:
    """The same box in the same image at x times the width and y times the height."""
    x1, y1, x2, y2 = box
    return (x1 * x, y1 * y, x2 * x, y2 * y)


@dataclass(frozen=True)
class FacePrediction:
    """One face with its predictions.

    Attributes:
        index: which face of its image, from 0, the largest first.
        box: x1, y1, x2, y2 in pixels of the upright image.
        score: the detector's confidence, 0 to 1; None when the whole image was taken as the face.
        age: perceived age, years.
        age_low: lower end of the calibrated interval, years.
        age_high: upper end.
        gender: label of the likelier gender.
        gender_probability: its calibrated probability, 0.5 to 1.
    """

    index: int
    box: Box
    score: float | None
    age: float
    age_low: float
    age_high: float
    gender: str
    gender_probability: float


@dataclass(frozen=True)
class ImageResult:
    """The outcome of one input, whatever happened to it.

    Attributes:
        path: the item's path or name.
        status: `ok`, `no_face`, or the status of the error that ended it.
        error: what was wrong, in one sentence; None where nothing was.
        width: width of the upright image in pixels; None where it is unknown.
        height: height of the upright image in pixels; None where it is unknown.
        faces: by falling size.
    """

    path: str
    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    faces: tuple[FacePrediction, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the input could not be looked at."""
        return self.error is not None

    @classmethod
    def from_error(cls, path: str, error: Exception) -> "ImageResult":
        """The result of an input that raised."""
        if isinstance(error, ImageTooLargeError):
            return cls(path, error.status, str(error), error.width, error.height)
        if isinstance(error, AgeGenderError):
            return cls(path, error.status, str(error))
        if isinstance(error, OSError):
            return cls(path, "unreadable", f"cannot be read: {error.strerror or error}")
        reason = " ".join(str(error).split())  # those of libraries run over many lines
        return cls(path, AgeGenderError.status, f"unexpected {type(error).__name__}: {reason}".rstrip(": "))
