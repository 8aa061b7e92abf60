"""One photograph with its faces: the annotated picture, and a card for each face."""

import io
from dataclasses import dataclass, replace
from typing import Final

import streamlit as st
from PIL import Image

from agegender import AgeGenderError, FacePrediction, ImageResult, decode_image
from agegender.detector import smallest_face_px
from agegender.draw import annotate, cut_face
from agegender.image import Pixels
from agegender.result import scale_box
from agegender.spec import interval_name
from app.charts import age_data, age_scale
from app.hints import hints_of, is_undecided, sharpness
from app.messages import counted, literal, plain, sentence

__all__ = ["Portrait", "View", "show_card", "show_view"]

_FACE_PX: Final = 96
_SHOWN_HEIGHT_PX: Final = 560
_SHOWN_WIDTH_PX: Final = 960
_DENSITY: Final = 2  # of the sharpest screens
_LEAST_SHOWN_PX: Final = 360  # of the longer side, where captions are drawn, which would cover a small picture
_CAPTION_PX: Final = 16
_PHONE_PX, _PHONE_CAPTION_PX = 360, 11  # there, a wide picture is shown this wide, and a caption still legible
_FEW_FACES: Final = 3  # leave room for captions of that size
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
        result: what the predictor said, or why the photograph cannot be shown.
        photo: JPEG of the photograph, without boxes; None where it could not be decoded.
        size: width and height at which it is shown, in pixels of the page.
        portraits: one for each face.
    """

    result: ImageResult
    photo: bytes | None = None
    size: tuple[int, int] = (0, 0)
    portraits: tuple[Portrait, ...] = ()

    @classmethod
    def of(cls, data: bytes, result: ImageResult) -> "View":
        """Brings the photograph to what a page can show; cuts the faces from it as it is."""
        if result.failed:
            return cls(result)
        try:
            return cls._decoded(data, result)
        except (AgeGenderError, MemoryError) as error:  # what predicts may have taken it smaller, or on another machine
            return cls(ImageResult.from_error(result.path, error))

    @classmethod
    def _decoded(cls, data: bytes, result: ImageResult) -> "View":
        pixels = decode_image(data)
        faces = tuple(_portrait(face, cut_face(pixels, face.box)) for face in result.faces)
        height, width = pixels.shape[:2]
        scale = min(1.0, _SHOWN_WIDTH_PX / width, _SHOWN_HEIGHT_PX / height)
        if faces:
            scale = max(scale, _LEAST_SHOWN_PX / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return cls(result, _jpeg(_resized(pixels, size, enlarge=scale > 1)), size, faces)

    def annotated(self, least_probability: float) -> bytes:
        """JPEG of the photograph with its boxes; captions that were drawn before would shrink with it.

        Args:
            least_probability: a gender below is called undecided.
        """
        assert self.photo
        if not self.result.faces:
            return self.photo
        pixels = decode_image(self.photo)
        x, y = pixels.shape[1] / (self.result.width or 1), pixels.shape[0] / (self.result.height or 1)
        faces = tuple(replace(face, box=scale_box(face.box, x, y)) for face in self.result.faces)
        phone_px = _PHONE_CAPTION_PX * self.size[0] / _PHONE_PX if len(faces) <= _FEW_FACES else 0
        return _jpeg(
            annotate(
                pixels,
                replace(self.result, faces=faces),
                font_px=max(_CAPTION_PX, phone_px) * pixels.shape[1] / self.size[0],
                undecided={face.index for face in faces if is_undecided(face, least_probability)},
            )
        )


def _resized(pixels: Pixels, size: tuple[int, int], *, enlarge: bool) -> Image.Image:
    photo = Image.fromarray(pixels)
    shown = (_DENSITY * size[0], _DENSITY * size[1])
    if enlarge:
        return photo.resize(shown)
    photo.thumbnail(shown)
    return photo


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
            f"{literal(view.result.path)}: {plain(sentence(_reason(view.result)))}", icon=":material/broken_image:"
        )
        return
    st.subheader(literal(view.result.path), anchor=False)
    st.caption(_summary(view.result))
    if len(view.portraits) in (1, 2):
        with st.container(horizontal=True, gap="medium"):
            _show_photo(view, least_probability)
            with st.container(width=360):
                for portrait in view.portraits:
                    show_card(portrait, least_probability, coverage)
        return
    _show_photo(view, least_probability)
    if view.portraits:
        _show_cards(view.portraits, key, least_probability, coverage)


def _reason(result: ImageResult) -> str:
    """What speaks against an image; a server adds the advice itself."""
    error = result.error or ""
    return f"{error}; shrink it" if result.status == "too_large" and "shrink" not in error else error


def _show_photo(view: View, least_probability: float) -> None:
    marked = counted(len(view.portraits), "marked face")
    st.image(view.annotated(least_probability), width=view.size[0], alt=f"{view.result.path} with {marked}")


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
    return f"{size} · {counted(len(result.faces), 'face')}"


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
                st.subheader(counted(round(face.age), "year"), anchor=False)
                st.caption(f"{interval_name(coverage)}: {face.age_low:.0f} to {face.age_high:.0f}")
        spoken = f"age {face.age:.0f}, from {face.age_low:.0f} to {face.age_high:.0f}"
        st.vega_lite_chart(age_data(face), age_scale(), alt=spoken)
        undecided = is_undecided(face, least_probability)
        gender = f"undecided: {face.gender}" if undecided else f"**{face.gender}**"
        st.progress(face.gender_probability, text=f"{gender} {face.gender_probability:.0%}")
        if face.score is not None:
            st.caption(f"face {face.index + 1}, detector score {face.score:.2f}")
        for hint in hints_of(face, portrait.sharpness):
            st.markdown(f":orange[:material/warning: {hint}]")  # a caption would pale it
