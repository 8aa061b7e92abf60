"""image + result -> pictures for people: boxes with age, interval and gender, legible on light and dark; faces alone."""

from typing import Final

from PIL import Image, ImageDraw, ImageFont

from agegender.image import Pixels
from agegender.result import Box, FacePrediction, ImageResult

__all__ = ["annotate", "caption", "cut_face"]

_COLOURS: Final = {"male": "#2f6fed", "female": "#c2347e"}


def caption(face: FacePrediction) -> str:
    """One line for people, such as `female 98%, 34 years (28-41)`."""
    return f"{face.gender} {face.gender_probability:.0%}, {face.age:.0f} years ({face.age_low:.0f}-{face.age_high:.0f})"


def annotate(pixels: Pixels, result: ImageResult) -> Image.Image:
    """Draws each face's box and caption at the image's own resolution.

    Args:
        pixels: (H, W, 3) uint8 RGB, at the full resolution that the boxes speak of.
        result: of the same image.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    line_px = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(max(12, min(48, max(image.size) / 55)))
    for face in result.faces:
        colour = _COLOURS.get(face.gender, "#444444")
        draw.rectangle(face.box, outline="white", width=line_px + 2)
        draw.rectangle(face.box, outline=colour, width=line_px)
    for face in result.faces:
        lines = f"{face.gender} {face.gender_probability:.0%}\n{face.age:.0f} ({face.age_low:.0f}-{face.age_high:.0f})"
        _label(draw, face, lines, font, image.size)
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


def _label(
    draw: ImageDraw.ImageDraw,
    face: FacePrediction,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """White text on the class's colour, below the box or as near as the frame allows."""
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, spacing=2)
    width, height = right - left + 8, bottom - top + 8
    x = min(max(0, face.box[0]), max(0, size[0] - width))
    y = min(max(0, face.box[3]), max(0, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=_COLOURS.get(face.gender, "#444444"))
    draw.multiline_text((x + 4 - left, y + 4 - top), text, font=font, fill="white", spacing=2)
