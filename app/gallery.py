"""Faces of a batch output, cut from the images where they lie."""

import os
from collections.abc import Mapping
from typing import Any, Final

import streamlit as st
from PIL import Image

from agegender import AgeGenderError
from agegender.draw import cut_face
from agegender.image import read_header
from batch.location import decode_path, is_remote, read_bytes

__all__ = ["FaceError", "cut_row"]

_FACE_PX: Final = 256
_MAX_BYTES: Final = 100_000_000


class FaceError(Exception):
    """A row's face cannot be shown; one sentence says why."""


def cut_row(row: Mapping[str, Any]) -> Image.Image:
    """The face of a row, from its image.

    Args:
        row: fields of `agegender.records`.

    Raises:
        FaceError: the row has no face, or its image is gone or can no longer be read.
    """
    if row["age"] is None:
        raise FaceError("no face")
    try:
        return _cut(row["path"], (row["x1"], row["y1"], row["x2"], row["y2"]), _changed(row["path"]))
    except FileNotFoundError as error:
        raise FaceError("the image is gone") from error
    except (OSError, ValueError, AgeGenderError) as error:
        raise FaceError(f"the image cannot be read: {error}") from error
    except MemoryError as error:
        raise FaceError("the image needs more memory than there is") from error


def _changed(path: str) -> int | None:
    """When a local file last changed, nanoseconds; None in an object store, of which the cache soon forgets all."""
    return None if is_remote(path) else os.stat(decode_path(path)).st_mtime_ns


@st.cache_data(max_entries=500, show_spinner=False, ttl=600)
def _cut(path: str, box: tuple[float, float, float, float], changed: int | None) -> Image.Image:
    """Decodes no more of a large JPEG than the face needs; `changed` is for the cache alone."""
    header = read_header(read_bytes(path, max_bytes=_MAX_BYTES))
    side = max(1.0, box[2] - box[0], box[3] - box[1])
    longer = max(header.width, header.height)
    pixels = header.decode(min_side_px=max(1, round(longer * min(1.0, _FACE_PX / side))))
    x, y = pixels.shape[1] / header.width, pixels.shape[0] / header.height
    face = cut_face(pixels, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    face.thumbnail((_FACE_PX, _FACE_PX))
    return face
