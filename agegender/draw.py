"""image + result -> pictures for people: boxes with age and gender, legible on light and dark; faces alone."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from agegender.errors import AgeGenderError
from agegender.image import Pixels, read_header
from agegender.result import Box, FacePrediction, ImageResult, scale_box

__all__ = ["annotate", "cut_face", "cut_recorded_face"]

_COLOURS: Final = {"male": "#2f6fed", "female": "#c2347e"}
_UNDECIDED: Final = "undecided"


def annotate(
    pixels: Pixels, result: ImageResult, *, font_px: float | None = None, undecided: Collection[int] = ()
) -> Image.Image:
    """Draws each face's box and caption, with its number if there are several, at the image's own resolution.

    Args:
        pixels: (H, W, 3) uint8 RGB, at the full resolution that the boxes speak of.
        result: of the same image.
        font_px: height of the captions' font; by default it grows with the image.
        undecided: indices of faces whose gender is not told.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    line_px = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(font_px or max(12, min(48, max(image.size) / 55)))
    faces = [replace(face, gender=_UNDECIDED) if face.index in undecided else face for face in result.faces]
    for face in faces:
        colour = _COLOURS.get(face.gender, "#444444")
        draw.rectangle(face.box, outline="white", width=line_px + 2)
        draw.rectangle(face.box, outline=colour, width=line_px)
    labels: list[Box] = []
    for face in faces:
        number = f"{face.index + 1}: " if len(result.faces) > 1 else ""
        age = f"{face.age:.0f} ({face.age_low:.0f}-{face.age_high:.0f})"
        gender = _UNDECIDED if face.index in undecided else f"{face.gender} {face.gender_probability:.0%}"
        labels.append(_label(draw, face, f"{number}{gender}\n{age}", font, image.size, labels))
    return image


def cut_face(pixels: Pixels, box: Box, *, margin: float = 0.2) -> Image.Image:
    """Cuts the square around a face, upright as in the image and at its resolution; it ends where the image ends.

    For people to look at: what the network sees is cut by `cut_chip`, which needs the landmarks.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        box: x1, y1, x2, y2 of the face in pixels of that image.
        margin: how much is seen beyond the box on each side, as a share of its longer side.
    """
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = box
    side = max(1, min(height, width, round(max(x2 - x1, y2 - y1) * (1 + 2 * margin))))
    left = round(min(max(0, (x1 + x2 - side) / 2), width - side))
    top = round(min(max(0, (y1 + y2 - side) / 2), height - side))
    return Image.fromarray(pixels[top : top + side, left : left + side])


def cut_recorded_face(data: bytes, box: Box, size: tuple[int, int], *, side_px: int) -> Image.Image:
    """Cuts a face out of its image for people to look at, long after it was found.

    Args:
        data: the encoded image, of which no more is decoded than the face needs.
        box: where the face was found, in pixels of the upright image.
        size: width and height of the image in which it was found.
        side_px: longest side of what is returned.

    Raises:
        AgeGenderError: the data cannot be decoded, or are of an image of another size.
    """
    header = read_header(data)
    if (header.width, header.height) != size:
        raise AgeGenderError(
            f"the image has changed since: it has {header.width}x{header.height} pixels, and had {size[0]}x{size[1]}"
        )
    longest = max(1.0, box[2] - box[0], box[3] - box[1])
    pixels = header.decode(min_side_px=max(1, round(max(size) * min(1.0, side_px / longest))))
    x, y = pixels.shape[1] / header.width, pixels.shape[0] / header.height
    face = cut_face(pixels, scale_box(box, x, y))
    face.thumbnail((side_px, side_px))
    return face


def _label(
    draw: ImageDraw.ImageDraw,
    face: FacePrediction,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    others: Sequence[Box],
) -> Box:
    """White text on the class's colour; returns where it is."""
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, spacing=2)
    place = _place(face.box, (right - left + 8, bottom - top + 8), size, others)
    draw.rectangle(place, fill=_COLOURS.get(face.gender, "#444444"))
    draw.multiline_text((place[0] + 4 - left, place[1] + 4 - top), text, font=font, fill="white", spacing=2)
    return place


def _place(box: Box, label: tuple[float, float], size: tuple[int, int], others: Sequence[Box]) -> Box:
    """Below the box, else above it, beside it, or wherever it lies on no other label; always inside the frame."""
    x1, y1, x2, y2 = box
    width, height = label
    wanted = ((x1, y2), (x1, y1 - height), (x2, y1), (x1 - width, y1), (x2, y2), (x1 - width, y2), (x2, y1 - height))
    places = [
        (x, y, x + width, y + height)
        for x, y in (
            (min(max(0, x), max(0, size[0] - width)), min(max(0, y), max(0, size[1] - height))) for x, y in wanted
        )
    ]
    return next((place for place in places if not any(_overlap(place, other) for other in others)), places[0])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
