"""image + result -> annotated image: boxes and captions inside the frame, and the input left as it was."""

import numpy as np
import pytest

from agegender import FacePrediction, ImageResult
from agegender.draw import annotate


def face(box, gender="female", index=0):
    return FacePrediction(index, box, 0.9, 34.4, 27.6, 41.2, gender, 0.983)


def drawn(shape, *boxes, gender="female"):
    """Which pixels differ from the grey image that was drawn on."""
    pixels = np.full((*shape, 3), 128, np.uint8)
    result = ImageResult("a", "ok", None, shape[1], shape[0], tuple(face(box, gender) for box in boxes))
    image = np.asarray(annotate(pixels, result))
    assert image.shape == pixels.shape
    assert (pixels == 128).all(), "the input is left as it was"
    return (image != 128).any(axis=2)


def test_the_box_is_drawn_where_it_is():
    changed = drawn((600, 800), (200.0, 100.0, 400.0, 300.0))
    for edge in (changed[100, 200:401], changed[300, 200:401], changed[100:301, 200], changed[100:301, 400]):
        assert edge.all()
    assert not changed[120:280, 220:380].any(), "the face itself stays visible"
    assert not changed[:90].any()
    assert changed[310:340, 200:300].any(), "the caption below"


def test_nothing_is_drawn_without_faces():
    assert not drawn((100, 100)).any()


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((480, 640), (0.0, 0.0, 640.0, 480.0)),
        ((480, 640), (600.0, 440.0, 640.0, 480.0)),
        ((480, 640), (0.0, 470.0, 10.0, 480.0)),
        ((8, 8), (0.0, 0.0, 8.0, 8.0)),
        ((1, 1), (0.0, 0.0, 1.0, 1.0)),
        ((3000, 20), (0.0, 10.0, 20.0, 30.0)),
        ((480, 640), (10.2, 10.4, 10.6, 10.8)),
    ],
)
def test_boxes_at_the_frame_and_tiny_images(shape, box):
    assert drawn(shape, box).any()


def test_the_caption_stays_inside_the_frame():
    """The whole label is seen, though the face is in the lower right corner."""
    inside = drawn((480, 640), (200.0, 100.0, 230.0, 130.0))
    corner = drawn((480, 640), (610.0, 450.0, 640.0, 480.0))
    assert corner.sum() >= 0.75 * inside.sum()


def test_genders_are_told_apart_and_any_label_will_do():
    colours = []
    for gender in ("male", "female", "other"):
        pixels = np.full((200, 200, 3), 128, np.uint8)
        image = annotate(pixels, ImageResult("a", "ok", None, 200, 200, (face((50.0, 50.0, 150.0, 150.0), gender),)))
        colours.append(image.getpixel((100, 51)))
    assert len(set(colours)) == 3


def test_read_only_pixels_will_do():
    pixels = np.full((50, 50, 3), 128, np.uint8)
    pixels.flags.writeable = False
    annotate(pixels, ImageResult("a", "ok", None, 50, 50, (face((5.0, 5.0, 20.0, 20.0)),)))
