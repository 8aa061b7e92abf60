"""What can go wrong along the chain, as one tree.

    AgeGenderError
    ├── ImageDecodeError          damaged, truncated or unsupported image
    │   └── NotAnImageError       no supported image format at all
    ├── ImageTooLargeError        more pixels than allowed, refused before decoding
    ├── ModelLoadError            the artifact is missing, foreign or of another format version
    └── ServerError               a server that should predict is not there, refuses, or is out of order

Every error is one sentence that says what was wrong, fit to be shown to whoever sent the input.
"""

from typing import ClassVar

__all__ = [
    "AgeGenderError",
    "ImageDecodeError",
    "ImageTooLargeError",
    "ModelLoadError",
    "NotAnImageError",
    "ServerError",
]


class AgeGenderError(Exception):
    """Base of all errors that the package raises on purpose.

    Attributes:
        status: what a record of the failed input says in its `status` field.
    """

    status: ClassVar[str] = "failed"


class ImageDecodeError(AgeGenderError):
    """The bytes claim to be an image but cannot be decoded."""

    status = "unreadable"


class NotAnImageError(ImageDecodeError):
    """The bytes are of no supported image format."""

    status = "not_image"


class ImageTooLargeError(AgeGenderError):
    """The header announces more pixels than the caller allows.

    Attributes:
        width: announced width of the upright image, in pixels; None where it is unknown.
        height: announced height of the upright image, in pixels; None where it is unknown.
    """

    status = "too_large"

    def __init__(self, message: str, *, width: int | None = None, height: int | None = None) -> None:
        super().__init__(message)
        self.width = width
        self.height = height


class ModelLoadError(AgeGenderError):
    """The artifact cannot be loaded or is not one that this version understands."""


class ServerError(AgeGenderError):
    """The server that should predict cannot be reached, refuses the token, or is out of order."""
