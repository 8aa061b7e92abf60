"""Faces of a batch output, cut from the images where they lie."""

import os
from collections.abc import Mapping
from typing import Any, Final

import streamlit as st
from PIL import Image

from agegender import AgeGenderError
from agegender.draw import cut_recorded_face
from agegender.result import Box
from batch.location import decode_path, is_remote, read_bytes
from batch.request import ScoreOptions

__all__ = ["FaceError", "cut_row"]

_FACE_PX: Final = 256


class FaceError(Exception):
    """A row's face cannot be shown; one sentence says why."""


def cut_row(row: Mapping[str, Any]) -> Image.Image:
    """The face of a row, from its image.

    Args:
        row: fields of `agegender.records`.

    Raises:
        FaceError: the row has no face, or its image is gone, has changed or can no longer be read.
    """
    if row["age"] is None:
        raise FaceError(row["error"] or "no face")
    try:
        box = (row["x1"], row["y1"], row["x2"], row["y2"])
        return _cut(row["path"], box, (row["width"], row["height"]), _changed(row["path"]))
    except FileNotFoundError as error:
        raise FaceError("the image is gone") from error
    except AgeGenderError as error:
        raise FaceError(str(error)) from error
    except (OSError, ValueError, ArithmeticError) as error:  # boxes of other programs may have no end
        raise FaceError(f"the image cannot be read: {error}") from error
    except MemoryError as error:
        raise FaceError("the image needs more memory than there is") from error


def _changed(path: str) -> int | None:
    """When a local file last changed, nanoseconds; None in an object store, of which the cache soon forgets all."""
    return None if is_remote(path) else os.stat(decode_path(path)).st_mtime_ns


@st.cache_data(max_entries=500, show_spinner=False, ttl=600)
def _cut(path: str, box: Box, size: tuple[int, int], changed: int | None) -> Image.Image:
    """`changed` is for the cache alone."""
    return cut_recorded_face(read_bytes(path, max_bytes=ScoreOptions.max_bytes), box, size, side_px=_FACE_PX)
