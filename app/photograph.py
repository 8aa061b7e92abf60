"""One photograph with its faces: the annotated picture, and a card for each face."""

import io
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import streamlit as st
from PIL import Image

from agegender import FacePrediction, ImageResult, decode_image
from agegender.detector import smallest_face_px
from agegender.draw import annotate, cut_face
from agegender.image import Pixels
from agegender.spec import interval_name
from app.charts import age_data, age_scale
from app.hints import hints_of, is_undecided, sharpness
from app.messages import literal, plain, sentence

__all__ = ["Portrait", "View", "show_card", "show_view"]

_FACE_PX: Final = 96
_PHOTO_PX: Final = (1920, 1120)  # twice of what is shown, for screens of high density
_SHOWN_HEIGHT_PX: Final = 560
_SHOWN_WIDTH_PX: Final = 960
_CARD_PX: Final = 300
_CARDS_AT_ONCE: Final = 12


@dataclass(frozen=True)
class Portrait:
    """One face as its card shows it.

    Attributes:
        face: its prediction.
        picture: JPEG of the face.
        sharpness: see `hints.sharpness`.
    """

    face: FacePrediction
    picture: bytes
    sharpness: float


@dataclass(frozen=True)
class View:
    """One input as the page shows it; holds no more of the photograph than what is shown.

    Attributes:
        result: what the predictor said.
        photo: JPEG of the annotated photograph; None where it could not be decoded.
        size: width and height at which it is shown, in pixels of the page.
        portraits: one for each face.
    """

    result: ImageResult
    photo: bytes | None = None
    size: tuple[int, int] = (0, 0)
    portraits: tuple[Portrait, ...] = ()

    @classmethod
    def of(cls, data: bytes, result: ImageResult) -> "View":
        """Shrinks the photograph to what a page can show, and draws on that; cuts the faces from it as it is."""
        if result.failed:
            return cls(result)
        pixels = decode_image(data)
        faces = tuple(_portrait(face, cut_face(pixels, face.box)) for face in result.faces)
        height, width = pixels.shape[:2]
        scale = min(1.0, _SHOWN_WIDTH_PX / width, _SHOWN_HEIGHT_PX / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return cls(result, _jpeg(_annotated(pixels, result)), size, faces)


def _annotated(pixels: Pixels, result: ImageResult) -> Image.Image:
    """The shrunk photograph with its boxes; captions that were drawn before would shrink with it."""
    photo = Image.fromarray(pixels)
    photo.thumbnail(_PHOTO_PX)
    x, y = photo.width / pixels.shape[1], photo.height / pixels.shape[0]
    faces = []
    for face in result.faces:
        x1, y1, x2, y2 = face.box
        faces.append(replace(face, box=(x1 * x, y1 * y, x2 * x, y2 * y)))
    return annotate(np.asarray(photo), replace(result, faces=tuple(faces)))


def _portrait(face: FacePrediction, picture: Image.Image) -> Portrait:
    shown = picture.copy()
    shown.thumbnail((2 * _FACE_PX, 2 * _FACE_PX))
    return Portrait(face, _jpeg(shown), sharpness(picture))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def show_view(view: View, *, key: str, least_probability: float, coverage: float | None) -> None:
    """The photograph and its cards.

    Args:
        view: what to show.
        key: tells its widgets from those of other views.
        least_probability: a gender below is called undecided.
        coverage: nominal coverage of the age intervals, if it is known.
    """
    if view.photo is None:
        st.error(
            f"{literal(view.result.path)}: {plain(sentence(view.result.error or ''))}", icon=":material/broken_image:"
        )
        return
    st.subheader(literal(view.result.path), anchor=False)
    st.caption(_summary(view.result))
    if len(view.portraits) in (1, 2):
        with st.container(horizontal=True, gap="medium"):
            _show_photo(view)
            with st.container(width=360):
                for portrait in view.portraits:
                    show_card(portrait, least_probability, coverage)
        return
    _show_photo(view)
    if view.portraits:
        _show_cards(view.portraits, key, least_probability, coverage)


def _show_photo(view: View) -> None:
    assert view.photo
    st.image(view.photo, width=view.size[0], alt=f"{view.result.path} with {len(view.portraits)} marked faces")


def _summary(result: ImageResult) -> str:
    width, height = result.width or 0, result.height or 0
    size = f"{width} × {height} px"
    if not result.faces:
        least = smallest_face_px(width, height)
        if min(width, height) < least:
            return f"{size} · no face found; the picture is too small for one, which must be about {least} px wide"
        return (
            f"{size} · no face found; in a picture of this size, faces from about {least} px are, if they are upright "
            "and look towards the camera"
        )
    return f"{size} · {len(result.faces)} {'face' if len(result.faces) == 1 else 'faces'}"


def _show_cards(portraits: tuple[Portrait, ...], key: str, least_probability: float, coverage: float | None) -> None:
    shown = portraits
    if len(portraits) > _CARDS_AT_ONCE and not st.toggle(f"Cards of all {len(portraits)} faces", key=f"all-{key}"):
        shown = portraits[:_CARDS_AT_ONCE]
    with st.grid(min_column_width=_CARD_PX):
        for portrait in shown:
            show_card(portrait, least_probability, coverage)


def show_card(portrait: Portrait, least_probability: float, coverage: float | None) -> None:
    """Face, age with its interval, gender with its probability, score, and what speaks against them."""
    face = portrait.face
    with st.container(border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.image(portrait.picture, width=_FACE_PX, alt=f"face {face.index + 1}")
            with st.container(gap="xxsmall", width="stretch"):
                st.subheader(f"{face.age:.0f} years", anchor=False)
                st.caption(f"{interval_name(coverage)}: {face.age_low:.0f} to {face.age_high:.0f}")
        spoken = f"age {face.age:.0f}, from {face.age_low:.0f} to {face.age_high:.0f}"
        st.vega_lite_chart(age_data(face), age_scale(), alt=spoken)
        undecided = is_undecided(face, least_probability)
        gender = f"undecided: {face.gender}" if undecided else f"**{face.gender}**"
        st.progress(face.gender_probability, text=f"{gender} {face.gender_probability:.0%}")
        if face.score is not None:
            st.caption(f"face {face.index + 1}, detector score {face.score:.2f}")
        for hint in hints_of(face, portrait.sharpness):
            st.caption(f":orange[:material/warning: {hint}]")
