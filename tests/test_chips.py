"""image + face -> chip: the geometry of the cut, what lies outside the image, and that no reduction aliases."""

import math

import numpy as np
import pytest

from agegender import Face, cut_chip
from agegender.chips import TEMPLATE


def face_at(landmarks):
    """A face with these landmarks; its box and score do not matter to the cut."""
    return Face((0.0, 0.0, 1.0, 1.0), 1.0, np.asarray(landmarks, np.float32))


def placed(scale, degrees, shift):
    """The template's landmarks, turned and scaled to a face of that many pixels and moved there."""
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return TEMPLATE * scale @ turn.T + shift


def with_dots(landmarks, size, radius):
    """A black image with a white disc at each landmark."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    nearest = np.min([np.hypot(x - landmark[0], y - landmark[1]) for landmark in landmarks], axis=0)
    return np.repeat((255 * np.clip(radius + 0.5 - nearest, 0, 1)).round().astype(np.uint8)[:, :, None], 3, axis=2)


def centres_near(chip, points, reach):
    """Centre of brightness around each point, in continuous coordinates."""
    height, width = chip.shape[:2]
    y, x = np.mgrid[0:height, 0:width] + 0.5
    centres = []
    for point in points:
        weight = chip[:, :, 0].astype(float) * (np.hypot(x - point[0], y - point[1]) < reach)
        centres.append([(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()])
    return np.array(centres)


@pytest.mark.parametrize("margin", [0.0, 0.25])
@pytest.mark.parametrize("degrees", [0, 20, -45, 90, 180])
@pytest.mark.parametrize("scale", [40, 128, 300, 900])
def test_landmarks_land_on_the_template(scale, degrees, margin):
    landmarks = placed(scale, degrees, (0, 0))
    landmarks += 700 - landmarks.mean(axis=0)
    chip = cut_chip(with_dots(landmarks, 1400, scale * 0.03), face_at(landmarks), 128, margin=margin)
    expected = (TEMPLATE + margin) / (1 + 2 * margin) * 128
    assert np.abs(centres_near(chip, expected, 9) - expected).max() < 0.5


def test_landmarks_of_another_shape_land_as_near_as_a_similarity_can():
    """A wide face: least squares spreads the error and leaves the centre where it belongs."""
    landmarks = placed(200, 0, (100, 100)) * (1.2, 1.0)
    chip = cut_chip(with_dots(landmarks, 500, 6), face_at(landmarks), 128)
    found = centres_near(chip, TEMPLATE * 128, 16)
    assert np.abs(found - TEMPLATE * 128).max() < 8
    assert np.abs(found.mean(axis=0) - TEMPLATE.mean(axis=0) * 128).max() < 0.5


def test_a_mirrored_face_is_turned_and_never_mirrored():
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[:, :100] = 255
    mirrored = placed(200, 0, (0, 0)) * (-1, 1) + (200, 0)
    chip = cut_chip(pixels, face_at(mirrored), 64)
    row = chip[32, :, 0].astype(int)
    assert row.max() == 255
    assert chip.shape == (64, 64, 3)


def test_a_face_on_the_template_is_cut_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    chip = cut_chip(pixels, face_at(TEMPLATE * 128), 128)
    assert np.abs(chip.astype(int) - pixels).max() <= 1


def test_a_face_moved_by_whole_pixels_is_cut_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    chip = cut_chip(pixels, face_at(TEMPLATE * 128 + (70, 41)), 128)
    assert np.abs(chip.astype(int) - pixels[41:169, 70:198]).max() <= 1


def test_the_margin_shows_more_of_the_image():
    """A white square just around the template's frame fills the chip without margin, and its middle with one."""
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[100:300, 100:300] = 255
    face = face_at(TEMPLATE * 200 + 100)
    assert cut_chip(pixels, face, 100)[1:-1, 1:-1].min() == 255
    chip = cut_chip(pixels, face, 100, margin=0.5)
    assert chip[27:73, 27:73].min() == 255
    assert chip[:24].max() == chip[:, :24].max() == chip[76:].max() == chip[:, 76:].max() == 0


@pytest.mark.parametrize("scale", [60, 200, 1500])
def test_zeros_outside_the_image(scale):
    """The face's middle is in the image's upper left corner: three quarters of the chip lie outside."""
    pixels = np.full((scale, scale, 3), 200, np.uint8)
    chip = cut_chip(pixels, face_at(TEMPLATE * scale - scale / 2), 128)
    assert (chip[:62] == 0).all()
    assert (chip[:, :62] == 0).all()
    assert np.abs(chip[66:126, 66:126].astype(int) - 200).max() <= 1


@pytest.mark.parametrize("scale", [130, 200, 400, 1500])
@pytest.mark.parametrize("shift", [399.999, 400.001])
def test_the_chip_is_the_images_own_up_to_its_edge(scale, shift):
    """Of a face within the image, though no more is reduced than the part that the chip covers."""
    pixels = np.full((scale + 800, scale + 800, 3), 255, np.uint8)
    assert cut_chip(pixels, face_at(TEMPLATE * scale + shift), 64).min() == 255


def test_a_face_wholly_outside_gives_an_empty_chip():
    for scale in (50, 2000):
        chip = cut_chip(np.full((100, 100, 3), 255, np.uint8), face_at(TEMPLATE * scale + 5000), 128)
        assert not chip.any()


@pytest.mark.parametrize("factor", [2, 3.3, 5, 20, 47])
@pytest.mark.parametrize("degrees", [0, 10, 45])
def test_a_fine_checkerboard_becomes_grey(factor, degrees):
    """Plain bilinear sampling would show moire of full contrast."""
    assert contrast_of_checkerboard(factor, degrees) < 16


@pytest.mark.parametrize("factor", [1.5, 1.9])
@pytest.mark.parametrize("degrees", [0, 10])
def test_a_fine_checkerboard_becomes_grey_where_no_blocks_are_averaged(factor, degrees):
    assert contrast_of_checkerboard(factor, degrees) < 20


def contrast_of_checkerboard(factor, degrees):
    """How far a chip of fields of one pixel is from grey, where a pixel of the chip takes this many of the image's."""
    scale = round(64 * factor)
    side = 2 * scale
    y, x = np.mgrid[0:side, 0:side]
    pixels = np.repeat((((x + y) % 2) * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    landmarks = placed(scale, degrees, (0, 0))
    landmarks += side / 2 - landmarks.mean(axis=0)
    chip = cut_chip(pixels, face_at(landmarks), 64)[4:-4, 4:-4].astype(int)
    return np.abs(chip - 127.5).max()


@pytest.mark.parametrize("period", [1, 2, 3])
def test_fine_stripes_become_grey(period):
    pixels = np.zeros((2000, 2000, 3), np.uint8)
    pixels[np.arange(2000) // period % 2 == 0] = 255
    chip = cut_chip(pixels, face_at(TEMPLATE * 1280 + 300), 64)[2:-2, 2:-2].astype(int)
    assert np.abs(chip - 127.5).max() < 26


@pytest.mark.parametrize("scale", [32, 64, 100, 200, 500, 1300])
def test_reduction_and_enlargement_keep_a_ramp(scale):
    """A ramp of brightness stays where it is, to two thirds of a chip pixel, at any scale."""
    ramp = np.linspace(20, 220, scale)
    pixels = np.repeat(np.tile(ramp, (scale, 1))[:, :, None], 3, axis=2).round().astype(np.uint8)
    chip = cut_chip(pixels, face_at(TEMPLATE * scale), 64)[32, 3:-3, 0].astype(float)
    expected = 20 + 200 * ((np.arange(64) + 0.5) / 64 * scale - 0.5) / (scale - 1)
    assert np.abs(chip - expected[3:-3]).max() < 2


@pytest.mark.parametrize("side", [16, 60, 128, 129, 256, 257, 1000, 3000])
def test_a_whole_square_image_fills_the_chip(side):
    pixels = np.full((side, side, 3), 200, np.uint8)
    chip = cut_chip(pixels, None, 128)
    edge = math.ceil(64 / side)  # an enlarged border pixel fades over half its width
    assert np.abs(chip[edge:-edge, edge:-edge].astype(int) - 200).max() <= 4


@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (1000, 250), (37, 400)])
def test_a_whole_image_is_centred_and_not_stretched(shape):
    height, width = shape
    pixels = np.full((height, width, 3), 200, np.uint8)
    chip = cut_chip(pixels, None, 100)[:, :, 0] > 100
    rows, columns = np.flatnonzero(chip.any(axis=1)), np.flatnonzero(chip.any(axis=0))
    longest = max(shape)
    assert abs(len(rows) - 100 * height / longest) <= 1
    assert abs(len(columns) - 100 * width / longest) <= 1
    assert abs(rows[0] - (99 - rows[-1])) <= 1
    assert abs(columns[0] - (99 - columns[-1])) <= 1


def test_a_whole_image_of_the_chips_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    assert np.array_equal(cut_chip(pixels, None, 128), pixels)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (3, 40_000), (40_000, 3), (33_000, 40)]
)
def test_tiny_and_thin_images(shape):
    pixels = np.full((*shape, 3), 255, np.uint8)
    for face in (None, face_at(TEMPLATE * 50), face_at(TEMPLATE * 5000)):
        chip = cut_chip(pixels, face, 64)
        assert chip.shape == (64, 64, 3)


def test_a_small_face_far_out_in_a_very_large_image():
    """OpenCV cannot warp images of 32,767 pixels and more on a side."""
    pixels = np.zeros((300, 40_000, 3), np.uint8)
    pixels[100:228, 39_000:39_128] = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    chip = cut_chip(pixels, face_at(TEMPLATE * 128 + (39_000, 100)), 128)
    assert np.abs(chip.astype(int) - pixels[100:228, 39_000:39_128]).max() <= 1


@pytest.mark.parametrize("scale", [30, 128, 1000])
def test_type_shape_and_memory(scale):
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1100, 3), np.uint8)
    before = pixels.copy()
    for face in (None, face_at(TEMPLATE * scale + 20)):
        chip = cut_chip(pixels, face, 96, margin=0.1)
        assert chip.dtype == np.uint8
        assert chip.shape == (96, 96, 3)
        assert chip.flags.c_contiguous
        assert not np.shares_memory(chip, pixels)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 4), (0, 9, 3), (9, 0, 3)])
def test_what_is_no_image_is_refused(shape):
    for face in (None, face_at(TEMPLATE * 9)):
        with pytest.raises(ValueError, match=r"must be .* uint8 and not empty, not .* uint8"):
            cut_chip(np.zeros(shape, np.uint8), face, 64)
        with pytest.raises(ValueError, match=r"not .* float32"):
            cut_chip(np.zeros((9, 9, 3), np.float32), face, 64)


@pytest.mark.parametrize("size_px", [0, -1])
def test_a_chip_without_size_is_refused(size_px):
    with pytest.raises(ValueError, match="size_px must be at least 1"):
        cut_chip(np.zeros((9, 9, 3), np.uint8), None, size_px)


@pytest.mark.parametrize(
    "landmarks",
    [np.full((5, 2), 50), TEMPLATE * 1e12, np.full((5, 2), np.nan)],
    ids=["in one place", "too far apart", "no numbers"],
)
def test_landmarks_that_are_no_face_are_refused(landmarks):
    with pytest.raises(ValueError, match="landmarks cannot be used"):
        cut_chip(np.zeros((100, 100, 3), np.uint8), face_at(landmarks), 64)


@pytest.mark.parametrize("scale", [1e-4, 1e7])
def test_faces_of_absurd_size_are_cut_all_the_same(scale):
    pixels = np.full((100, 100, 3), 200, np.uint8)
    assert cut_chip(pixels, face_at(TEMPLATE * scale + 50), 64).shape == (64, 64, 3)


def test_views_and_read_only_images_will_do():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    face = face_at(TEMPLATE * 200 + 10)
    expected = cut_chip(np.ascontiguousarray(pixels[::-1, 20:]), face, 64)
    view = pixels[::-1, 20:]
    view.flags.writeable = False
    assert np.array_equal(cut_chip(view, face, 64), expected)


def test_the_colour_order_is_kept():
    pixels = np.zeros((50, 50, 3), np.uint8)
    pixels[:] = (200, 100, 50)
    assert cut_chip(pixels, None, 20)[10, 10].tolist() == [200, 100, 50]
    assert cut_chip(np.tile(pixels, (30, 30, 1)), None, 20)[10, 10].tolist() == [200, 100, 50]
