"""image + result -> annotated image: boxes and captions inside the frame, and the input left as it was."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from agegender import AgeGenderError, FacePrediction, ImageResult
from agegender.draw import annotate, cut_recorded_face


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
    (red, _, blue), (female_red, _, female_blue), _ = colours
    assert blue > red, "a man's is blue"
    assert female_red > female_blue, "a woman's is red"


def test_read_only_pixels_will_do():
    pixels = np.full((50, 50, 3), 128, np.uint8)
    pixels.flags.writeable = False
    annotate(pixels, ImageResult("a", "ok", None, 50, 50, (face((5.0, 5.0, 20.0, 20.0)),)))


@pytest.fixture
def labels(monkeypatch):
    """The text and the place of each caption that is drawn."""
    texts, places = [], []
    text, rectangle = ImageDraw.ImageDraw.multiline_text, ImageDraw.ImageDraw.rectangle

    def multiline_text(self, xy, told, **options):
        texts.append(told)
        text(self, xy, told, **options)

    def filled(self, xy, fill=None, **options):
        if fill:
            places.append(xy)
        rectangle(self, xy, fill=fill, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", multiline_text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", filled)
    return texts, places


def test_captions_of_neighbours_are_numbered_from_1_and_lie_on_no_other(labels):
    faces = tuple(face((x, 200.0, x + 50, 250.0), index=index) for index, x in enumerate((300.0, 350.0, 400.0)))
    annotate(np.full((600, 800, 3), 128, np.uint8), ImageResult("a", "ok", None, 800, 600, faces))
    texts, places = labels
    assert texts == [f"{number}: female 98%\n34 (28-41)" for number in (1, 2, 3)]
    covered = np.zeros((600, 800), int)
    for x1, y1, x2, y2 in places:
        covered[round(y1) : round(y2), round(x1) : round(x2)] += 1
    assert len(places) == 3
    assert covered.max() == 1


def test_a_caption_of_one_face_has_no_number(labels):
    drawn((600, 800), (200.0, 100.0, 400.0, 300.0))
    assert labels[0] == ["female 98%\n34 (28-41)"]


def test_a_recorded_face_is_cut_out_of_an_image_that_is_decoded_smaller(encode):
    pixels = np.zeros((1200, 2400, 3), np.uint8)
    pixels[800:1120, 1600:1920] = 255
    face = cut_recorded_face(encode(pixels, "JPEG"), (1600.0, 800.0, 1920.0, 1120.0), (2400, 1200), side_px=70)
    assert face.size == (70, 70)
    white = np.asarray(face.convert("L")) > 128
    assert white[12:58, 12:58].all()
    assert not white[[4, -5]].any()
    assert not white[:, [4, -5]].any()


@pytest.mark.parametrize("size", [(64, 47), (63, 48)])
def test_a_face_is_not_cut_out_of_an_image_that_has_changed(encode, size):
    data = encode(Image.new("RGB", (64, 48)), "PNG")
    with pytest.raises(AgeGenderError, match=f"has 64x48 pixels, and had {size[0]}x{size[1]}"):
        cut_recorded_face(data, (0.0, 0.0, 20.0, 20.0), size, side_px=20)
