"""The chain: one result per item and in order, whatever one of them does; faces of many images batched together."""

import io
import logging
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import agegender
from agegender import ImageResult, Item, Model, ModelLoadError, Predictor
from agegender import predictor as module

ORIENTATION_TAG = 0x0112


@pytest.fixture(scope="module")
def model(predictor):
    return predictor.model


def face_numbers(face):
    return [*face.box, face.score or 0, face.age, face.age_low, face.age_high, face.gender_probability]


def assert_same(one, other):
    """Equal results; predictions up to the order of summation in a batch."""
    assert (one.path, one.status, one.error, one.width, one.height) == (
        other.path,
        other.status,
        other.error,
        other.width,
        other.height,
    )
    assert [face.gender for face in one.faces] == [face.gender for face in other.faces]
    for left, right in zip(one.faces, other.faces, strict=True):
        assert face_numbers(left) == pytest.approx(face_numbers(right), abs=1e-3)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_one_bad_item_among_many(predictor, astronaut, grace_hopper, blank_png, group_jpeg, encode):
    large = encode(Image.new("1", (10_100, 10_000)), "PNG")
    items = [
        Item(astronaut, "astronaut.png"),
        Item(grace_hopper[:5000], "truncated.jpg"),
        Item(blank_png, "blank.png"),
        Item(b"text", "text.txt"),
        Item(group_jpeg, "group.jpg"),
        Item(large, "large.png"),
        Item(b"", "empty"),
        Item(grace_hopper, "hopper.jpg"),
    ]
    results = predictor.predict(items)
    assert [(result.path, result.status, len(result.faces)) for result in results] == [
        ("astronaut.png", "ok", 1),
        ("truncated.jpg", "unreadable", 0),
        ("blank.png", "no_face", 0),
        ("text.txt", "not_image", 0),
        ("group.jpg", "ok", 2),
        ("large.png", "too_large", 0),
        ("empty", "not_image", 0),
        ("hopper.jpg", "ok", 1),
    ]
    for result in results:
        assert result.failed == (result.status not in ("ok", "no_face")) == (result.error is not None)
    assert (results[5].width, results[5].height) == (10_100, 10_000)
    assert (results[2].width, results[2].height) == (320, 240)
    assert results[1].width is None


@pytest.mark.parametrize("bad", range(5))
def test_the_neighbours_of_a_bad_item_are_as_without_it(bad, predictor, astronaut):
    good = predictor.predict([Item(astronaut, "good")])[0]
    items = [Item(astronaut, "good")] * 5
    items[bad] = Item(astronaut[:999], "bad")
    for index, result in enumerate(predictor.predict(items)):
        if index == bad:
            assert (result.path, result.status, result.faces) == ("bad", "unreadable", ())
        else:
            assert_same(result, good)


def test_an_unexpected_exception_is_one_items_failure(model, monkeypatch, caplog, astronaut, grace_hopper):
    cut_chip = module.cut_chip

    def failing(pixels, face, size_px, *, margin):
        if pixels.shape[0] == 512:
            raise ZeroDivisionError("the first line\n  and another")
        return cut_chip(pixels, face, size_px, margin=margin)

    monkeypatch.setattr(module, "cut_chip", failing)
    with caplog.at_level(logging.ERROR):
        results = Predictor(model).predict(
            [Item(grace_hopper, "a"), Item(astronaut, "b"), Item(astronaut, "c"), Item(grace_hopper, "d")]
        )
    assert [(result.path, result.status) for result in results] == [
        ("a", "ok"),
        ("b", "failed"),
        ("c", "failed"),
        ("d", "ok"),
    ]
    assert results[1].error == "unexpected ZeroDivisionError: the first line and another"
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 2  # what happened is in the log
    assert_same(results[0], Predictor(model).predict([Item(grace_hopper, "a")])[0])


def test_an_item_of_a_wrong_type_is_its_own_failure(predictor, blank_png):
    results = predictor.predict([Item(blank_png), "photo.jpg", None, 7, blank_png])
    assert [result.status for result in results] == ["no_face", "failed", "failed", "failed", "no_face"]
    assert "not as str" in results[1].error


def test_errors_that_are_expected_are_not_logged(predictor, caplog):
    predictor.predict([b"", b"text", b"\xff\xd8\xff\xe0"])
    assert not caplog.records


# --- what may be given -----------------------------------------------------------------------------------------------


def test_nothing_in_nothing_out(predictor):
    assert predictor.predict([]) == []
    assert list(predictor.stream(iter(()))) == []


def test_bare_bytes_and_generators(predictor, astronaut, blank_png):
    expected = predictor.predict([Item(astronaut), Item(blank_png)])
    for items in ([astronaut, blank_png], (each for each in (astronaut, blank_png)), [bytearray(astronaut), blank_png]):
        results = predictor.predict(items)
        assert [result.path for result in results] == ["", ""]
        for one, other in zip(results, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("items", [b"one image", bytearray(b"2"), memoryview(b"3"), "path.jpg", Item(b"x"), None])
def test_a_single_item_is_no_list(items, predictor):
    with pytest.raises(TypeError):
        predictor.predict(items)
    with pytest.raises(TypeError):
        predictor.stream(items)  # at once, as the client does


@pytest.mark.parametrize(
    "options",
    [
        {"faces": "all"},
        {"min_score": -1},
        {"min_score": 2},
        {"max_faces": 0},
        {"max_faces": 2.5},
        {"faces": "whole", "max_faces": 0},
        {"max_pixels": 0},
        {"batch_size": 0},
        {"threads": 0},
        {"threads": -1},
    ],
    ids=str,
)
def test_an_option_out_of_range(options, model):
    with pytest.raises(ValueError, match=rf"{list(options)[-1]}\b"):
        Predictor(model, **options)


def test_a_count_of_numpys_is_whole_too(model, group_jpeg):
    assert len(Predictor(model, max_faces=np.int64(1)).predict([group_jpeg])[0].faces) == 1


@pytest.mark.parametrize("model", [None, bytearray(b"artifact"), 7])
def test_a_model_that_is_none(model):
    with pytest.raises(TypeError, match=f"its path, its bytes, or loaded, not as {type(model).__name__}"):
        Predictor(model)


def test_a_model_that_has_but_a_part_of_what_is_needed(model):
    with pytest.raises(TypeError, match="not as SimpleNamespace"):
        Predictor(SimpleNamespace(predict=model.predict))


def test_what_stands_for_a_model_will_do(model, predictor, astronaut):
    stand_in = SimpleNamespace(spec=model.spec, sha256=model.sha256, predict=model.predict)
    assert_same(Predictor(stand_in).predict([astronaut])[0], predictor.predict([astronaut])[0])


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelLoadError, match="No such file"):
        Predictor(tmp_path / "none.pt")


def test_other_detector_weights(model):
    with pytest.raises(ModelLoadError, match="YuNet"):
        Predictor(model, detector_weights=b"other")


def test_the_package_lists_what_it_imports_late_and_knows_its_version():
    assert {*agegender.__all__, "__version__"} <= set(dir(agegender))
    assert agegender.__version__ == version("agegender")


def test_where_the_package_is_not_installed_it_has_no_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    assert not hasattr(agegender, "__version__")


def _not_installed(name):
    raise PackageNotFoundError(name)


# --- faces -----------------------------------------------------------------------------------------------------------


def test_faces_of_many_images_are_batched_and_come_out_where_they_belong(model, astronaut, grace_hopper, group_jpeg):
    """More faces than a batch holds, so that batches begin and end within an image."""
    names = [*"abcdefghij"]
    images = [(astronaut, group_jpeg, grace_hopper)[index % 3] for index in range(len(names))]
    items = [Item(data, name) for data, name in zip(images, names, strict=True)]
    alone = [Predictor(model, batch_size=1).predict([item])[0] for item in items]
    for batch_size in (1, 3, 32):
        together = Predictor(model, batch_size=batch_size).predict(items)
        assert [result.path for result in together] == names
        for one, other in zip(together, alone, strict=True):
            assert_same(one, other)


def test_batches_are_filled_across_images(model, monkeypatch, astronaut):
    sizes = []
    predict = Model.predict
    monkeypatch.setattr(Model, "predict", lambda self, chips: sizes.append(len(chips)) or predict(self, chips))
    Predictor(model, batch_size=4).predict([astronaut] * 10)
    assert sizes == [4, 4, 2]


def test_faces_are_numbered_by_falling_size_inside_the_frame(predictor, group_jpeg):
    (result,) = predictor.predict([group_jpeg])
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (face.box for face in result.faces)]
    assert areas == sorted(areas, reverse=True)
    assert [face.index for face in result.faces] == [0, 1]
    for face in result.faces:
        x1, y1, x2, y2 = face.box
        assert 0 <= x1 < x2 <= result.width
        assert 0 <= y1 < y2 <= result.height
        assert 0 <= face.age_low <= face.age <= face.age_high <= 116
        assert face.gender in predictor.model.spec.labels
        assert 0.5 <= face.gender_probability <= 1
        assert 0.6 <= face.score <= 1
        assert {type(value) for value in face_numbers(face)} == {float}


def test_detector_options_are_passed_on(model, group_jpeg):
    (all_faces,) = Predictor(model).predict([group_jpeg])
    (largest,) = Predictor(model, max_faces=1).predict([group_jpeg])
    (none,) = Predictor(model, min_score=1.0).predict([group_jpeg])
    assert [face.box for face in largest.faces] == [all_faces.faces[0].box]
    assert (none.status, none.faces) == ("no_face", ())
    (refused,) = Predictor(model, max_pixels=1000).predict([group_jpeg])
    assert refused.status == "too_large"


def test_whole_takes_every_image_as_one_face(model, blank_png, astronaut):
    blank, face, broken = Predictor(model, faces="whole").predict([blank_png, astronaut, astronaut[:999]])
    assert (blank.status, face.status, broken.status) == ("ok", "ok", "unreadable")
    assert blank.faces[0].box == (0, 0, 320, 240)
    assert face.faces[0].box == (0, 0, 512, 512)
    assert blank.faces[0].score is None
    assert len(blank.faces) == len(face.faces) == 1


def test_whole_sees_the_very_chip_that_detect_cuts(model, astronaut, encode):
    """A directory of cut chips gives what the photographs gave that they were cut from."""
    detected = Predictor(model).predict([astronaut])[0].faces[0]
    spec = model.spec
    pixels = module.read_header(astronaut).decode()
    (face,) = module.FaceDetector().detect(pixels)
    chip = module.cut_chip(pixels, face, spec.chip_size_px, margin=spec.chip_margin)
    whole = Predictor(model, faces="whole").predict([encode(chip, "PNG")])[0].faces[0]
    assert (whole.age, whole.gender_probability) == pytest.approx((detected.age, detected.gender_probability), abs=1e-3)


# --- large and turned images -----------------------------------------------------------------------------------------


def test_boxes_of_a_reduced_jpeg_are_in_full_resolution_pixels(predictor, grace_hopper, encode):
    """12 megapixels, decoded at half size, against the original of 0.3."""
    source = Image.open(io.BytesIO(grace_hopper)).convert("RGB")
    factor = 6.25
    large = encode(source.resize((3200, 3750), Image.Resampling.BICUBIC), "JPEG", quality=95)
    (small_result,), (large_result,) = predictor.predict([grace_hopper]), predictor.predict([large])
    assert (large_result.width, large_result.height) == (3200, 3750)
    (small,), (big,) = small_result.faces, large_result.faces
    width = (small.box[2] - small.box[0]) * factor
    assert np.abs(np.array(small.box) * factor - big.box).max() < 0.05 * width
    assert abs(small.age - big.age) < 5
    assert small.gender == big.gender


def test_a_reduced_jpeg_and_its_png_agree(predictor, grace_hopper, encode):
    """The PNG is decoded in full: only the reduction differs."""
    source = Image.open(io.BytesIO(grace_hopper)).convert("RGB").resize((2560, 3000), Image.Resampling.BICUBIC)
    reduced, full = predictor.predict([encode(source, "JPEG", quality=97), encode(source, "PNG", compress_level=1)])
    width = full.faces[0].box[2] - full.faces[0].box[0]
    assert np.abs(np.array(reduced.faces[0].box) - full.faces[0].box).max() < 0.03 * width
    assert abs(reduced.faces[0].age - full.faces[0].age) < 3


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF"])
def test_boxes_are_of_the_upright_image(format_, orientation, predictor, grace_hopper, encode):
    """The pixels are stored turned and the tag says so: faces are found where a viewer shows them."""
    source = Image.open(io.BytesIO(grace_hopper)).convert("RGB")
    stored = {
        3: source.transpose(Image.Transpose.ROTATE_180),
        5: source.transpose(Image.Transpose.TRANSPOSE),
        6: source.transpose(Image.Transpose.ROTATE_90),
        8: source.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    tag = Image.Exif()
    tag[ORIENTATION_TAG] = orientation
    options = {"quality": 95, "subsampling": 0} if format_ == "JPEG" else {}
    (result,) = predictor.predict([encode(stored, format_, exif=tag, **options)])
    (upright,) = predictor.predict([encode(source, format_, **options)])
    assert (result.width, result.height) == source.size
    assert np.abs(np.array(result.faces[0].box) - upright.faces[0].box).max() < 3


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (9, 9), (3, 30_000), (30_000, 3)])
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
@pytest.mark.parametrize("faces", ["detect", "whole"])
def test_tiny_and_thin_images(faces, format_, size, model, encode):
    data = encode(Image.new("RGB", size, (127, 127, 127)), format_)
    (result,) = Predictor(model, faces=faces).predict([data])
    assert result.status == {"detect": "no_face", "whole": "ok"}[faces]
    assert (result.width, result.height) == size


# --- streams, stages, threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["blank", "broken", "face"])
def test_a_stream_reads_no_further_ahead_than_a_few_batches(data, model, blank_png, astronaut):
    content = {"blank": blank_png, "broken": b"text", "face": astronaut}[data]
    taken = 0

    def items():
        nonlocal taken
        for index in range(30):
            taken += 1
            yield Item(content, str(index))

    most = 0
    for count, result in enumerate(Predictor(model, batch_size=2).stream(items())):
        assert result.path == str(count)
        most = max(most, taken - count)
    assert taken == 30
    assert most <= (2 if data == "face" else 8)


_GROWTH_OVER_60_IMAGES = """
import io
import sys
import psutil
from PIL import Image
from agegender import Predictor

buffer = io.BytesIO()
Image.new("RGB", (2000, 2000), (90, 90, 90)).save(buffer, "PNG")
predictor = Predictor(sys.argv[1], faces="whole", batch_size=64, device="cpu")
predictor.predict([buffer.getvalue()] * 2)
sizes = []

def items():
    for _ in range(60):
        sizes.append(psutil.Process().memory_info().rss)
        yield buffer.getvalue()

assert all(result.status == "ok" for result in predictor.stream(items()))
print(max(sizes) - sizes[0])
"""


def test_memory_stays_bounded(model_path):
    """60 images of 12 MB each, of which nothing but the chips may be kept; here, others' freed memory would hide it."""
    script = [sys.executable, "-c", _GROWTH_OVER_60_IMAGES, str(model_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300e6  # kept, they are 700 MB


def test_stages_are_reported(model, astronaut):
    stages = []
    Predictor(model, on_stage=lambda name, seconds: stages.append((name, seconds))).predict([astronaut, b"text"])
    assert [name for name, _ in stages][:3] == ["decode", "detect", "cut"]
    assert stages[-1][0] == "predict"
    assert all(0 <= seconds < 60 for _, seconds in stages)


def test_threads_share_a_predictor(predictor, astronaut, grace_hopper, group_jpeg, blank_png):
    images = [astronaut, grace_hopper, group_jpeg, blank_png]
    expected = [predictor.predict([image])[0] for image in images]
    failures = []

    def work(start):
        try:
            for step in range(4):
                index = (start + step) % len(images)
                assert_same(predictor.predict([images[index]])[0], expected[index])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_results_of_errors_speak_in_one_line():
    error = OSError(13, "Permission denied")
    assert ImageResult.from_error("a", error) == ImageResult("a", "unreadable", "cannot be read: Permission denied")
    assert ImageResult.from_error("a", MemoryError()).error == "unexpected MemoryError"


# --- photographs beside the repository -------------------------------------------------------------------------------


def test_faces_of_everyday_photographs_are_found(predictor, photos):
    paths = sorted(path for path in photos.iterdir() if path.suffix == ".jpg")
    results = predictor.predict(Item(path.read_bytes(), path.name) for path in paths)
    assert [result.path for result in results] == [path.name for path in paths]
    assert not [result for result in results if result.failed]
    found = {result.path: len(result.faces) for result in results}
    assert all(count for name, count in found.items() if name != "dogs.jpg"), found
