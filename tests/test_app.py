"""The app's logic: what its pages say of good and bad input, and what they read of an output."""

import io
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from agegender import (
    AgeGenderError,
    FacePrediction,
    ImageResult,
    ImageTooLargeError,
    Item,
    Predictor,
    ServerError,
    decode_image,
)
from agegender.client import Client
from agegender.draw import annotate, cut_face
from agegender.records import arrow_schema, arrow_table
from agegender.spec import DEFAULT_MODEL
from batch.errors import OutputError
from batch.output import Output, Run, now
from batch.publish import describe
from batch.request import ScoreOptions

pytest.importorskip("streamlit", reason="the app needs Python 3.11 or newer")

from streamlit.testing.v1 import AppTest

from app import engine
from app.charts import age_data, age_scale, bars, histogram
from app.engine import Engine, local_predictor
from app.gallery import FaceError, cut_row
from app.hints import SHARP, SMALL_PX, hints_of, is_undecided, sharpness
from app.messages import literal, plain
from app.photograph import View
from app.results_page import _capped
from app.scores import INTERVAL_WIDTH, Scores, Selection

ROOT = Path(__file__).parent.parent
FACE = FacePrediction(0, (10.0, 10.0, 110.0, 130.0), 0.9, 34.4, 27.6, 41.2, "female", 0.83)

Start = Callable[..., AppTest]


@pytest.fixture(autouse=True)
def own_main() -> Iterator[None]:
    """Streamlit puts its script in the place of `__main__`, which spawned processes of later tests would run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        yield


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(*arguments) -> the whole app on its first page."""

    def start_(*arguments: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["streamlit_app.py", *arguments])
        return AppTest.from_file(str(ROOT / "app" / "streamlit_app.py"), default_timeout=120).run()

    return start_


@pytest.fixture
def results_page() -> Callable[[Path], AppTest]:
    """results_page(directory) -> the page about that output."""

    def page(out: str) -> None:
        from app import results_page

        results_page.show(out)

    return lambda out: AppTest.from_function(page, args=(str(out),), default_timeout=120).run()


@pytest.fixture
def out(tmp_path: Path, predictor: Predictor, group_jpeg: bytes, grace_hopper: bytes, blank_png: bytes) -> Path:
    """An output on images that lie beside it: three faces in two images, one without a face, one broken."""
    images = {
        "group.jpg": group_jpeg,
        "grace.jpg": grace_hopper,
        "blank.png": blank_png,
        "broken.jpg": group_jpeg[:5000],
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    results = predictor.predict([Item(data, str(tmp_path / name)) for name, data in images.items()])
    directory = tmp_path / "out"
    directory.mkdir()
    pq.write_table(arrow_table(results[:2]), directory / "faces-00000000-00000.parquet")
    pq.write_table(arrow_table(results[2:]), directory / "faces-00000000-00001.parquet")
    return directory


def give(app: AppTest, *files: tuple[str, bytes]) -> AppTest:
    """Uploads files as names and contents."""
    return app.file_uploader[0].set_value([(name, data, "application/octet-stream") for name, data in files]).run()


def texts(elements: Sequence[Any]) -> list[str]:
    return [element.value for element in elements]


def shown(elements: Sequence[Any]) -> list[str]:
    """Texts as the page shows them."""
    return [re.sub(r"\\(?=[^\w\s])", "", element.value) for element in elements]


def ages(app: AppTest) -> list[str]:
    """What the cards say, in order."""
    return [text for text in texts(app.subheader) if re.fullmatch(r"\d+ years", text)]


class TestTryIt:
    def test_cards_say_what_the_predictor_says(self, start: Start, predictor: Predictor, group_jpeg: bytes) -> None:
        app = give(start(), ("group.jpg", group_jpeg))
        faces = predictor.predict([group_jpeg])[0].faces
        assert len(faces) == 2
        assert not app.exception
        assert not app.error
        assert ages(app) == [f"{face.age:.0f} years" for face in faces]
        captions = texts(app.main.caption)
        height, width = decode_image(group_jpeg).shape[:2]
        assert f"{width} × {height} px · 2 faces" in captions
        for face in faces:
            assert f"90% interval: {face.age_low:.0f} to {face.age_high:.0f}" in captions
            assert f"face {face.index + 1}, detector score {face.score:.2f}" in captions
        assert len(app.get("progress")) == 2
        assert len(app.get("vega_lite_chart")) == 2

    def test_the_notice_stands_where_results_are_read(
        self, start: Start, results_page: Callable[[Path], AppTest], out: Path
    ) -> None:
        """Also where the sidebar is shut, and where a server does not answer."""
        app = start()
        assert "Not for decisions about people" in app.main.caption[0].value
        assert not [text for text in texts(app.sidebar.caption) if "decisions" in text], "once is enough"
        assert results_page(out).main.caption[0].value == app.main.caption[0].value

    def test_the_sidebar_describes_the_artifact(self, start: Start, predictor: Predictor) -> None:
        app = start()
        rows = app.sidebar.table[0].value.iloc[:, -1].astype(str).tolist()
        spec = predictor.model.spec
        assert f"`{predictor.model.sha256[:12]}`" in rows
        assert f"{spec.metrics['gender_accuracy']:.1%}" in rows
        assert spec.training_data in app.sidebar.caption[-1].value

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"hello", "Not an image of a known format"),
            (b"", "The file is empty"),
            (b"\x89PNG\r\n\x1a\n" + bytes(40), "Damaged PNG"),
        ],
    )
    def test_bad_files_are_one_sentence_beside_good_ones(
        self, start: Start, group_jpeg: bytes, data: bytes, says: str
    ) -> None:
        app = give(start(), ("bad[1]*.jpg", data), ("group.jpg", group_jpeg))
        (error,) = shown(app.error)
        assert error.startswith("` bad[1]*.jpg `: ")
        assert says in error
        assert len(ages(app)) == 2
        assert not app.exception

    def test_files_that_fail_are_told_of_before_their_page(
        self, start: Start, blank_png: bytes, group_jpeg: bytes
    ) -> None:
        blank = [(f"{number}.png", blank_png) for number in range(8)]
        app = give(start(), *blank, ("group.jpg", group_jpeg), ("notes.txt", b"hello"))
        assert not app.error
        assert "9 photographs · 2 faces · 1 file that cannot be used: ` notes.txt `" in texts(app.main.markdown)
        app = give(start(), *[(f"{number}.txt", b"hello") for number in range(7)])
        told = ", ".join(f"` {number}.txt `" for number in range(5))
        assert f"0 photographs · 0 faces · 7 files that cannot be used: {told} and 2 more" in texts(app.main.markdown)

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (MemoryError(), "Unexpected MemoryError."),
            (ImageTooLargeError("over the limit"), "Over the limit; shrink it."),
        ],
    )
    def test_a_photograph_that_cannot_be_shown_leaves_the_others(
        self,
        start: Start,
        blank_png: bytes,
        group_jpeg: bytes,
        monkeypatch: pytest.MonkeyPatch,
        error: MemoryError | AgeGenderError,
        says: str,
    ) -> None:
        """What predicts decodes by itself: smaller, or on a server with another limit."""

        def decode(data: bytes) -> Any:
            if data == blank_png:
                raise error
            return decode_image(data)

        monkeypatch.setattr("app.photograph.decode_image", decode)
        app = give(start(), ("blank.png", blank_png), ("group.jpg", group_jpeg))
        assert not app.exception
        assert shown(app.error) == [f"` blank.png `: {says}"]
        assert len(ages(app)) == 2

    def test_a_heic_is_called_one(self, start: Start) -> None:
        app = give(start(), ("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"))
        assert "it is a HEIC image, which is not read: save it as JPEG." in shown(app.error)[0]

    def test_too_many_pixels(self, start: Start, encode: Any) -> None:
        app = give(start(), ("bomb.png", encode(Image.new("1", (20_000, 20_000)), "PNG")))
        assert shown(app.error)[0].endswith("400.0 megapixels, over the limit of 100; shrink it.")

    def test_what_a_server_says_of_a_large_image_is_said_once(
        self, start: Start, blank_png: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused = ImageResult("a.png", "too_large", "over the limit of 50; shrink it")
        monkeypatch.setattr(Predictor, "predict", lambda *_: [refused])
        assert shown(give(start(), ("a.png", blank_png)).error)[0].endswith("Over the limit of 50; shrink it.")

    def test_no_face(self, start: Start, blank_png: bytes) -> None:
        app = give(start(), ("blank.png", blank_png))
        (said,) = (text for text in texts(app.main.caption) if "no face found" in text)
        assert "if they are upright and look towards the camera" in said
        assert not ages(app)
        assert not app.error

    def test_no_face_fits_into_a_small_picture(self, start: Start, encode: Any) -> None:
        app = give(start(), ("icon.png", encode(Image.new("RGB", (100, 19)), "PNG")))
        said = "100 × 19 px · no face found; the picture is too small for one, which must be about 20 px wide"
        assert said in texts(app.main.caption)

    def test_a_later_upload_works_like_the_first_and_nothing_else_is_kept(
        self, start: Start, group_jpeg: bytes, grace_hopper: bytes
    ) -> None:
        app = start()
        for _ in range(3):
            assert len(ages(give(app, ("group.jpg", group_jpeg)))) == 2
            assert len(ages(give(app, ("grace.jpg", grace_hopper)))) == 1
        assert len(app.session_state["views"]) == 1

    def test_what_was_predicted_before_a_failure_is_kept(
        self, start: Start, group_jpeg: bytes, grace_hopper: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app = start()
        asked, predict = [], Predictor.predict

        def fail_once(self: Predictor, items: list[Item]) -> list[ImageResult]:
            asked.append(items[0].path)
            if len(asked) == 2:
                raise ServerError("the server is out of order")
            return predict(self, items)

        monkeypatch.setattr(Predictor, "predict", fail_once)
        give(app, ("group.jpg", group_jpeg), ("grace.jpg", grace_hopper))
        assert shown(app.error) == ["The server is out of order."]
        assert not app.get("progress")
        assert len(ages(app.run())) == 3
        assert asked == ["group.jpg", "grace.jpg", "grace.jpg"]

    def test_sessions_do_not_see_each_other(self, start: Start, group_jpeg: bytes, grace_hopper: bytes) -> None:
        one, other = start(), start()
        give(one, ("group.jpg", group_jpeg))
        give(other, ("grace.jpg", grace_hopper))
        assert (len(ages(one.run())), len(ages(other.run()))) == (2, 1)

    def test_many_uploads_are_paged(self, start: Start, blank_png: bytes, group_jpeg: bytes) -> None:
        app = give(start(), *[(f"{number}.png", blank_png) for number in range(9)], ("last.jpg", group_jpeg))
        assert not ages(app)
        assert app.pagination[0].num_pages == 2
        app.pagination[0].set_value(2).run()
        assert len(ages(app)) == 2

    def test_of_many_faces_the_first_cards_are_shown_until_all_are_asked_for(self, encode: Any) -> None:
        def page(png: bytes) -> None:
            from agegender import FacePrediction, ImageResult
            from app.photograph import Portrait, View, show_view

            faces = tuple(
                FacePrediction(i, (0.0, 0.0, 9.0, 9.0), 0.9, 30.0, 20.0, 40.0, "male", 0.9) for i in range(15)
            )
            result = ImageResult("a.png", "ok", None, 9, 9, faces)
            view = View(result, png, (9, 9), tuple(Portrait(face, png, 99.0) for face in faces))
            show_view(view, key="0", least_probability=0.7, coverage=0.9)

        png = encode(Image.new("RGB", (9, 9)), "PNG")

        def cards() -> list[str]:
            return [text for text in texts(app.caption) if "detector score" in text]

        app = AppTest.from_function(page, args=(png,), default_timeout=120).run()
        assert cards() == [f"face {number}, detector score 0.90" for number in range(1, 13)]
        app.toggle[0].set_value(True).run()
        assert cards() == [f"face {number}, detector score 0.90" for number in range(1, 16)]

    def test_the_threshold_decides_what_is_undecided(
        self, start: Start, predictor: Predictor, grace_hopper: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (face,) = predictor.predict([grace_hopper])[0].faces
        app = give(start(), ("grace.jpg", grace_hopper))
        assert app.slider(key="undecided").value == 70
        app.slider(key="undecided").set_value(50).run()
        assert f"**{face.gender}** {face.gender_probability:.0%}" in _progress(app)
        drawn_with = []
        annotated = View.annotated
        monkeypatch.setattr(View, "annotated", lambda view, least: drawn_with.append(least) or annotated(view, least))
        app.slider(key="undecided").set_value(100).run()
        assert f"undecided: {face.gender} {face.gender_probability:.0%}" in _progress(app)
        assert drawn_with == [1.0]

    def test_a_missing_model(self, start: Start, tmp_path: Path) -> None:
        app = start("--model", str(tmp_path / "none.pt"))
        assert "none.pt" in shown(app.error)[0]
        assert "make train" in shown(app.error)[0]
        assert not app.exception

    def test_an_unknown_argument(self, start: Start) -> None:
        app = start("--colour", "red")
        assert "argument" in shown(app.error)[0]
        assert not app.exception

    def test_samples(self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_jpeg: bytes) -> None:
        model = str(ROOT / "model_store" / "agegender.pt")
        monkeypatch.chdir(tmp_path)
        app = start("--model", model)
        app.segmented_control(key="source").set_value("Samples").run()
        assert "no samples" in app.info[0].value
        (tmp_path / "examples" / "photos").mkdir(parents=True)
        (tmp_path / "examples" / "photos" / "group.jpg").write_bytes(group_jpeg)
        assert len(ages(app.run())) == 2
        (tmp_path / "examples" / "photos" / os.fsdecode(b"\xff.jpg")).write_bytes(group_jpeg)
        (tmp_path / "examples" / "photos" / "a.jpg").symlink_to("/proc/self/mem")
        app.run()
        assert not app.exception
        app.segmented_control(key="source").set_value("Upload").run()
        app.segmented_control(key="source").set_value("Samples").run()  # the first is chosen
        assert not app.exception
        assert len(app.error) == 1


class TestServer:
    def switch(self, app: AppTest, address: str, token: str = "") -> AppTest:
        app.segmented_control(key="engine").set_value("TorchServe").run()
        app.text_input(key="token").set_value(token)
        return app.text_input(key="address").set_value(address).run()

    def test_a_server_that_is_down(self, start: Start, group_jpeg: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"http://127.0.0.1:{free.getsockname()[1]}"
        app = self.switch(give(start(), ("group.jpg", group_jpeg)), address)
        assert f"` {address} ` does not answer (connection refused); is it running?" in shown(app.error)[0]
        app.segmented_control(key="engine").set_value("This process").run()
        assert not app.error
        assert len(ages(app)) == 2

    def test_an_address_and_a_key_file_are_read_as_they_are_meant(
        self, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        asked: list[tuple[str, str | None, Path | None]] = []
        monkeypatch.setattr(engine, "_connect", lambda *call: asked.append(call) or Client())
        app = self.switch(start(), " http://127.0.0.1:9 ")
        app.text_input(key="key_file").set_value(" ~/key_file.json").run()
        assert not app.exception
        assert asked[-1] == ("http://127.0.0.1:9", None, tmp_path / "key_file.json")

    def test_a_key_file_of_a_user_that_is_not_known(self, start: Start, group_jpeg: bytes) -> None:
        app = self.switch(start(), "http://127.0.0.1:9")
        app.text_input(key="key_file").set_value("~nobody-of-this-name/keys.json").run()
        give(app, ("group.jpg", group_jpeg))
        assert not app.exception
        assert shown(app.error) == ["Cannot read ~nobody-of-this-name/keys.json: No such file or directory."]

    def test_an_address_that_is_none(self, start: Start) -> None:
        app = self.switch(start(), "localhost:8080")
        assert "must begin with http://" in shown(app.error)[0]

    def test_another_token_is_asked_anew(
        self, start: Start, group_jpeg: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def predict(client: Client, items: list[Item]) -> list[ImageResult]:
            asked.append(client._key)
            return [ImageResult(item.path, "no_face", None, 9, 9) for item in items]

        monkeypatch.setattr(Client, "predict", predict)
        app = give(start(), ("group.jpg", group_jpeg))
        for token in ("one", "one", "other"):
            self.switch(app, "http://127.0.0.1:9", token)
        assert not app.exception
        assert [key for key in asked if key] == ["one", "other"]

    def test_clients_are_not_shared_between_sessions(self) -> None:
        """One session's client holds its token and what its server has said."""
        assert engine._connect._info.scope == "session"  # the testing runner has one session for all

    def test_the_coverage_is_the_servers_own(self, predictor: Predictor) -> None:
        client = Client()
        assert Engine(client, "server").coverage is None
        client.about = {"coverage": 0.8}
        assert Engine(client, "server").coverage == 0.8
        assert Engine(predictor, "here").coverage == predictor.model.spec.coverage

    def describe(self, about: dict[str, Any], model: Path) -> AppTest:
        """What is told of a server's model, with that artifact here."""

        def page(about: dict[str, object], model: str) -> None:
            from pathlib import Path

            from agegender.client import Client
            from app.engine import Engine, describe_model

            client = Client()
            client.about = about
            describe_model(Engine(client, "server"), Path(model))

        return AppTest.from_function(page, args=(about, str(model)), default_timeout=120).run()

    @pytest.mark.parametrize("same", [True, False])
    def test_figures_are_told_of_the_same_bytes_alone_and_without_the_network(
        self, predictor: Predictor, same: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "_load", None)
        sha256 = predictor.model.sha256 if same else "0" * 64
        app = self.describe(predictor.model.spec.identity(sha256), ROOT / DEFAULT_MODEL)
        assert not app.exception
        assert ("test figures are not known here" in app.caption[-1].value) != same
        assert ("Gender correct" in str(app.table[0].value)) == same

    def test_a_damaged_model_here_hides_nothing_of_the_servers(self, predictor: Predictor, tmp_path: Path) -> None:
        about = predictor.model.spec.identity(predictor.model.sha256)
        model = tmp_path / "agegender.pt"
        model.write_bytes(b"PK no more")
        app = self.describe(about, model)
        assert not app.exception
        assert predictor.model.sha256[:12] in str(app.table[0].value)
        assert "test figures are not known here" in app.caption[-1].value
        model.write_bytes((ROOT / DEFAULT_MODEL).read_bytes())
        os.utime(model, (1, 1))
        assert "Gender correct" in str(self.describe(about, model).table[0].value)

    def test_a_model_that_has_changed_is_loaded_anew(self, tmp_path: Path) -> None:
        model = tmp_path / "agegender.pt"
        model.write_bytes((ROOT / "model_store" / "agegender.pt").read_bytes())
        first = local_predictor(model)
        assert local_predictor(model) is first
        os.utime(model, (1, 1))
        assert local_predictor(model) is not first


def _progress(app: AppTest) -> list[str]:
    return [element.proto.text for element in app.get("progress")]


def _filters(app: AppTest) -> list[Any]:
    widgets = [*app.multiselect, *app.slider, *app.text_input, *app.selectbox]
    return [widget for widget in widgets if widget.key != "out"]


class TestResults:
    def test_totals_and_rows(self, results_page: Callable[[Path], AppTest], out: Path) -> None:
        app = results_page(out)
        assert not app.exception
        figures = {metric.label: metric.value for metric in app.metric}
        assert {name: figures[name] for name in ("Images", "Faces", "With a face", "Without a face", "Failed")} == {
            "Images": "4",
            "Faces": "3",
            "With a face": "2",
            "Without a face": "1",
            "Failed": "1",
        }
        assert len(app.dataframe[0].value) == 5

    def test_filters(self, results_page: Callable[[Path], AppTest], out: Path) -> None:
        app = results_page(out)
        app.multiselect(key="statuses").set_value(["ok"]).run()
        assert set(app.dataframe[0].value["status"]) == {"ok"}
        app.text_input(key="path_part").set_value("GRACE").run()
        assert list(app.dataframe[0].value["file"]) == ["grace.jpg"]
        app.text_input(key="path_part").set_value("nowhere").run()
        assert "No row" in app.info[0].value

    def test_probability_and_order_mean_what_they_say(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path
    ) -> None:
        faces = [(20.0, 0.6), (60.0, 0.8), (40.0, 0.95)]
        app = results_page(out_of(tmp_path, [replace(FACE, age=age, gender_probability=p) for age, p in faces]))
        app.slider(key="least_probability").set_value(80).run()
        app.selectbox(key="sort_by").select("age").run()
        assert list(app.dataframe[0].value["age"]) == [40.0, 60.0]
        assert app.selectbox(key="descending").options == ["smallest first", "largest first"]
        app.selectbox(key="descending").select_index(1).run()
        assert app.dataframe[0].value["age"].iloc[0] == 60.0

    def test_what_is_chosen_on_the_second_page_is_what_is_exported_and_shown(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exported: list[list[int]] = []
        monkeypatch.setattr("app.results_page._show_export", lambda _, rows, **__: exported.append(list(rows)))
        app = results_page(out_of(tmp_path, [FACE] * 101))
        assert len(exported[-1]) == 101
        assert app.pagination[0].num_pages == 2
        app.pagination[0].set_value(2).run()
        choose(app, 0)
        assert exported[-1] == [100]
        assert f"{tmp_path}/100.jpg: the image is gone" in app.code[-1].value

    def test_what_is_chosen_on_one_page_stays_chosen_on_another(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exported: list[list[int]] = []
        monkeypatch.setattr("app.results_page._show_export", lambda _, rows, **__: exported.append(list(rows)))
        app = results_page(out_of(tmp_path, [FACE] * 101))
        choose(app, 3, 5)
        app.pagination[0].set_value(2).run()
        assert exported[-1] == [3, 5]
        choose(app, 0)
        assert exported[-1] == [3, 5, 100]
        assert app.code[-1].value.splitlines() == [
            f"{tmp_path}/{number}.jpg: the image is gone" for number in (3, 5, 100)
        ]
        app.pagination[0].set_value(1).run()
        assert exported[-1] == [3, 5, 100]
        choose(app, 5)
        assert exported[-1] == [5, 100]
        app.slider(key="ages").set_value((0, 99)).run()
        assert len(exported[-1]) == 101, "of another selection none is chosen"

    def test_filters_and_order_outlive_what_hides_them(self, out: Path) -> None:
        def page(out: str) -> None:
            import streamlit as st

            from app import results_page

            if not st.toggle("Hide", key="hide"):
                results_page.show(out)

        app = AppTest.from_function(page, args=(str(out),), default_timeout=120).run()
        app.multiselect(key="statuses").set_value(["ok"])
        app.multiselect(key="genders").set_value(["female"])
        app.slider(key="ages").set_value((1, 110))
        app.slider(key="least_probability").set_value(51)
        app.text_input(key="path_part").set_value("g")
        app.slider(key="least_score").set_value(0.05)
        app.selectbox(key="sort_by").select("age").run()
        app.selectbox(key="descending").select_index(1).run()
        before = [(widget.key, widget.value) for widget in _filters(app)]
        app.toggle(key="hide").set_value(True).run()
        assert not _filters(app)
        app.toggle(key="hide").set_value(False).run()
        assert [(widget.key, widget.value) for widget in _filters(app)] == before
        assert len(before) == 8
        assert not app.exception

    def test_a_filter_of_another_output_is_let_go_where_it_has_no_meaning(
        self, results_page: Callable[[Path], AppTest], out: Path, tmp_path: Path
    ) -> None:
        app = results_page(out)
        app.multiselect(key="statuses").set_value(["unreadable"]).run()
        (tmp_path / "other").mkdir()
        app.text_input(key="out").set_value(str(out_of(tmp_path / "other", [FACE]))).run()
        assert not app.exception
        assert app.multiselect(key="statuses").value == []

    def test_an_order_is_chosen_where_there_is_something_to_order_by(
        self, results_page: Callable[[Path], AppTest], out: Path
    ) -> None:
        app = results_page(out)
        assert app.selectbox(key="descending").disabled
        app.selectbox(key="sort_by").select("age").run()
        assert not app.selectbox(key="descending").disabled

    def test_charts_are_told_in_words(self, results_page: Callable[[Path], AppTest], tmp_path: Path) -> None:
        app = results_page(out_of(tmp_path, [replace(FACE, age=age) for age in (20.0, 39.0, 41.0)]))
        assert [chart.proto.alt for chart in app.get("vega_lite_chart")] == [
            "Ages of 3 faces, median 39 years",
            "Widths of the interval of 3 faces, median 14 years",
            "Images by outcome: ok: 3",
            "Images by number of faces: 0: 0, 1: 3",
        ]

    def test_the_gallery_shows_the_first_of_many_and_tells_of_each_that_is_missing(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path
    ) -> None:
        app = results_page(out_of(tmp_path, [FACE] * 30))
        choose(app, *range(30))
        assert "The first 24 of 30." in texts(app.caption)
        assert app.code[-1].value.splitlines() == [
            f"{tmp_path}/{number}.jpg: the image is gone" for number in range(24)
        ]

    def test_a_failed_row_that_is_chosen_says_its_own_error(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path
    ) -> None:
        results = [ImageResult("a.txt", "not_image", "not an image"), ImageResult("b.png", "no_face", None, 9, 9)]
        pq.write_table(arrow_table(results), tmp_path / "a.parquet")
        app = results_page(tmp_path)
        choose(app, 0, 1)
        assert app.code[-1].value.splitlines() == ["a.txt: not an image", "b.png: no face"]

    @pytest.mark.parametrize("years", [1, 2, 5, 10])
    def test_every_face_is_in_a_bar_however_old(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
    ) -> None:
        drawn: list[pd.DataFrame] = []

        def record(bins: pd.DataFrame, **options: Any) -> Any:
            drawn.append(bins)
            return histogram(bins, **options)

        monkeypatch.setattr("app.results_page.histogram", record)
        lived = (-1.0, 0.0, 115.9, 116.0, 130.0)
        app = results_page(out_of(tmp_path, [replace(FACE, age=age) for age in lived]))
        drawn.clear()
        app.segmented_control(key="bin_years").set_value(years).run()
        (by_age,) = (bins for bins in drawn if "gender" in bins)
        assert by_age["count"].sum() == len(lived)
        assert set(by_age["end"] - by_age["start"]) == {years}
        assert by_age["count"].iloc[0] == 2
        assert by_age["end"].max() >= 116  # else the oldest stand at an age that they have not

    @pytest.mark.parametrize("rewritten", [True, False])
    def test_files_that_change_under_the_page(
        self,
        results_page: Callable[[Path], AppTest],
        out: Path,
        monkeypatch: pytest.MonkeyPatch,
        rewritten: bool,
    ) -> None:
        """The rows are read anew with each filter; the page has been drawn by then."""

        def change(_: Scores, interval: str) -> None:
            for file in out.glob("*.parquet"):
                file.unlink()
            if rewritten:
                pq.write_table(arrow_table([ImageResult("a.png", "ok", None, 200, 200, (FACE,))]), out / "b.parquet")
                monkeypatch.undo()

        monkeypatch.setattr("app.results_page._show_charts", change)
        app = results_page(out)
        assert not app.exception
        if rewritten:
            assert list(app.dataframe[0].value["path"]) == ["a.png"]
            assert {metric.label: metric.value for metric in app.metric}["Images"] == "1"
        else:
            assert "holds no Parquet files" in shown(app.error)[0]

    def test_a_run_that_finishes_or_is_added_to_under_the_page_is_told_of(
        self, results_page: Callable[[Path], AppTest], out: Path
    ) -> None:
        def told(app: AppTest) -> str:
            assert not app.exception
            return " ".join([*texts(app.caption), *(str(table.value) for table in app.table)])

        output = Output(str(out))
        run = Run("0" * 8, now(), "1", {"name": "a*b", "version": "1", "sha256": "0" * 64}, {}, ["photos"], 4, 1)
        figures = {
            "seconds": 9.0,
            "images_per_s": 12.0,
            "startup_s": 1.0,
            "slowest": [],
            "finished": now(),
            "run": asdict(run),
        }
        app = results_page(out)
        assert "No finished run" in told(app)
        output.finish({**describe(output), **figures})
        assert r"a\*b" in told(app.run())
        output.reopen()
        assert "No finished run" in told(app.run())

    def test_bin_width(self, results_page: Callable[[Path], AppTest], out: Path) -> None:
        app = results_page(out)
        app.segmented_control(key="bin_years").set_value(1).run()
        assert not app.exception

    @pytest.mark.parametrize("started", ["listing", "scoring"])
    def test_an_output_whose_run_has_just_begun(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, started: str
    ) -> None:
        (tmp_path / "_run").mkdir()
        if started == "scoring":
            (tmp_path / "_run" / "run.json").write_text("{}")
        (error,) = shown(results_page(tmp_path).error)
        assert "is not finished" in error
        assert error.endswith("repeat the command to resume it if it was stopped.")

    @pytest.mark.parametrize(
        "results",
        [[], [ImageResult("a.jpg", "unreadable", "damaged")], [ImageResult("a.jpg", "no_face", None, 9, 9)]],
        ids=["nothing", "failed", "no face"],
    )
    def test_charts_of_nothing_are_left_out(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, results: list[ImageResult]
    ) -> None:
        pq.write_table(arrow_table(results), tmp_path / "a.parquet")
        app = results_page(tmp_path)
        assert not app.exception
        titles = [text for text in texts(app.markdown) if text.startswith("**")]
        looked_at = [result for result in results if not result.failed]
        assert titles == ["**Outcome of each image**"] * len(results) + ["**Faces in each image**"] * len(looked_at)
        assert ("This output has no rows." in texts(app.info)) == (not results)

    def test_faces_are_counted_from_one(self, results_page: Callable[[Path], AppTest], out: Path) -> None:
        table = results_page(out).dataframe[0].value
        assert list(table["number"][table["faces"] > 0]) == [1, 2, 1]

    def test_a_copy_by_pandas_is_read(self, results_page: Callable[[Path], AppTest], out: Path) -> None:
        copy = pd.read_parquet(out).astype({"face": "float64", "status": "category"})
        copy.to_parquet(out / "faces-00000000-00000.parquet")
        (out / "faces-00000000-00001.parquet").unlink()
        app = results_page(out)
        assert not app.error
        assert not app.exception
        assert {metric.label: metric.value for metric in app.metric}["Faces"] == "3"
        assert str(app.dataframe[0].value["face"].dropna().iloc[-1]) in ("0", "0.0")
        (row,) = Scores(str(out)).rows(np.array([0])).to_pylist()
        assert (row["face"], row["status"]) == (0, "ok")

    @pytest.mark.parametrize(
        "kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view()], ids=["category", "view"]
    )
    def test_paths_of_a_copy_are_looked_for_and_sorted(
        self, results_page: Callable[[Path], AppTest], out: Path, kind: pa.DataType
    ) -> None:
        for file in out.glob("*.parquet"):
            table = pq.read_table(file)
            at = table.schema.get_field_index("path")
            pq.write_table(table.set_column(at, "path", table["path"].cast(kind)), file)
        app = results_page(out)
        app.selectbox(key="sort_by").select("path").run()
        assert not app.exception
        files = ["blank.png", "broken.jpg", "grace.jpg", "group.jpg", "group.jpg"]
        assert list(app.dataframe[0].value["file"]) == files
        app.text_input(key="path_part").set_value("GRACE").run()
        assert not app.exception
        assert list(app.dataframe[0].value["file"]) == ["grace.jpg"]

    def test_columns_of_another_type_are_told_of(self, results_page: Callable[[Path], AppTest], tmp_path: Path) -> None:
        table = arrow_table([ImageResult("a.png", "ok", None, 200, 200, (FACE,))])
        at = table.schema.get_field_index("age")
        pq.write_table(table.set_column(at, "age", pa.array(["34"])), tmp_path / "a.parquet")
        app = results_page(tmp_path)
        assert not app.exception
        assert "its column age is string, not float" in shown(app.error)[0]

    def test_a_name_is_read_as_a_shell_reads_it(
        self, results_page: Callable[[Path], AppTest], out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(out.parent))
        app = results_page(Path(f" ~/{out.name} "))
        assert not app.error
        assert {metric.label: metric.value for metric in app.metric}["Faces"] == "3"

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("nowhere", "nowhere does not exist; give the directory that `make batch` wrote."),
            ("empty", "empty holds no Parquet files; give the directory that `make batch` wrote."),
            ("hollow", "hollow holds no Parquet files"),
            ("foreign", "has no column path"),
            ("damaged", "a damaged Parquet file"),
            ("file", "file is a file; give the directory around it."),
        ],
    )
    def test_what_is_no_output(
        self, results_page: Callable[[Path], AppTest], tmp_path: Path, name: str, says: str
    ) -> None:
        (tmp_path / "hollow").mkdir()
        (tmp_path / "hollow" / "a.parquet").touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "foreign").mkdir()
        pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign" / "a.parquet")
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "a.parquet").write_bytes(b"PAR1 no more")
        (tmp_path / "file").write_text("x")
        app = results_page(tmp_path / name)
        (error,) = shown(app.error)
        assert says in error
        assert not app.exception
        assert not app.metric

    def test_a_store_that_does_not_answer_is_told_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("When listing objects: the host is unknown\nand more")

        monkeypatch.setattr(Output, "list", fail)
        with pytest.raises(OutputError, match=r"^mock://bucket/out cannot be reached: .* the host is unknown$"):
            Scores.fingerprint("mock://bucket/out")
        with pytest.raises(OutputError, match=r"^gopher://a/b cannot be reached: "):
            Scores.fingerprint("gopher://a/b")


def out_of(directory: Path, faces: Sequence[FacePrediction]) -> Path:
    """An output with one face in each image; the images are gone."""
    results = [
        ImageResult(str(directory / f"{number}.jpg"), "ok", None, 200, 200, (face,))
        for number, face in enumerate(faces)
    ]
    pq.write_table(arrow_table(results), directory / "faces-00000000-00000.parquet")
    return directory


def choose(app: AppTest, *rows: int) -> None:
    """Ticks rows of the table."""
    app.session_state[app.dataframe[0].key] = {"selection": {"rows": list(rows), "columns": [], "cells": []}}
    app.run()


class TestScores:
    @pytest.fixture
    def scores(self, out: Path) -> Scores:
        return Scores(str(out))

    def test_counts(self, scores: Scores) -> None:
        assert len(scores) == 5
        assert scores.statuses == {"ok": 2, "no_face": 1, "unreadable": 1}
        assert scores.faces_per_image == {0: 1, 1: 1, 2: 1}
        assert sum(len(scores.ages(gender)) for gender in scores.genders) == scores.faces == 3
        assert (scores.interval_widths > 0).all()

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("column", ["age", INTERVAL_WIDTH, "path"])
    def test_order_with_what_has_no_value_last(self, scores: Scores, column: str, descending: bool) -> None:
        table = scores.rows(scores.select(Selection(sort_by=column, descending=descending)))
        assert table.num_rows == 5
        rows = table.to_pylist()
        keys = [
            row["age_high"] - row["age_low"] if column == INTERVAL_WIDTH and row["age"] else row.get(column)
            for row in rows
        ]
        known = [key for key in keys if key is not None]
        assert known == sorted(known, reverse=descending)
        assert keys[: len(known)] == known

    def test_filters_are_taken_together(self, scores: Scores) -> None:
        everything = scores.rows(scores.select(Selection())).to_pylist()
        youngest = min(row["age"] for row in everything if row["age"])
        (row,) = scores.rows(scores.select(Selection(ages=(0, youngest), statuses=("ok",)))).to_pylist()
        assert row["age"] == youngest
        assert not len(scores.select(Selection(ages=(0, youngest), statuses=("no_face",))))
        assert len(scores.select(Selection(least_score=0.99))) == 0
        assert len(scores.select(Selection(least_probability=0.5))) == 3

    def test_rows_are_the_files_own(self, scores: Scores, out: Path) -> None:
        table = scores.rows(np.array([4, 0]))
        files = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*.parquet"))])
        assert table.to_pylist() == files.take(pa.array([4, 0])).to_pylist()
        assert table.schema.names == arrow_schema().names

    def test_bounds_are_within(self, tmp_path: Path) -> None:
        scores = Scores(str(out_of(tmp_path, [replace(FACE, age=30.0, gender_probability=0.75, score=0.5)])))
        assert len(scores.select(Selection(ages=(30, 40)))) == len(scores.select(Selection(ages=(20, 30)))) == 1
        assert len(scores.select(Selection(least_probability=0.75))) == 1
        assert len(scores.select(Selection(least_score=0.5))) == 1

    def test_the_median_of_two_lies_between_them(self, tmp_path: Path) -> None:
        assert Scores(str(out_of(tmp_path, [replace(FACE, age=20.0), replace(FACE, age=41.0)]))).median_age == 30.5

    def test_the_most_frequent_outcome_comes_first(self, tmp_path: Path) -> None:
        results = [ImageResult("a", "unreadable", "damaged")] + [ImageResult("b", "no_face", None, 9, 9)] * 2
        pq.write_table(arrow_table(results), tmp_path / "a.parquet")
        assert list(Scores(str(tmp_path)).statuses.items()) == [("no_face", 2), ("unreadable", 1)]

    def test_an_empty_file_beside_others_is_passed_over(self, out: Path) -> None:
        (out / "z.parquet").touch()
        assert len(Scores(str(out))) == 5

    def test_nothing_to_read(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="holds no Parquet files"):
            Scores(str(tmp_path))


class TestGallery:
    def test_cuts_the_face_where_the_image_lies(self, out: Path, grace_hopper: bytes) -> None:
        scores = Scores(str(out))
        (row,) = scores.rows(scores.select(Selection(path_part="grace"))).to_pylist()
        face = cut_row(row)
        whole = cut_face(decode_image(grace_hopper), (row["x1"], row["y1"], row["x2"], row["y2"]))
        whole.thumbnail(face.size)
        assert face.size == whole.size
        difference = np.abs(np.asarray(face, np.int16) - np.asarray(whole, np.int16))
        assert difference.mean() < 3

    def test_a_picture_that_has_changed_is_cut_anew(self, out: Path, tmp_path: Path) -> None:
        scores = Scores(str(out))
        row = scores.rows(scores.select(Selection(path_part="grace"))).to_pylist()[0]
        path, shades = tmp_path / "photo.png", []
        for moment, shade in enumerate((50, 200)):
            Image.new("L", (row["width"], row["height"]), shade).save(path)
            os.utime(path, (moment, moment))
            shades.append(np.asarray(cut_row({**row, "path": str(path)})).mean())
        assert shades == [50, 200]

    def test_reads_what_the_job_reads(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = []
        monkeypatch.setattr("app.gallery.read_bytes", lambda _, max_bytes: limits.append(max_bytes) or b"")
        with pytest.raises(FaceError):
            cut_row(Scores(str(out)).rows(np.array([2])).to_pylist()[0])
        assert limits == [ScoreOptions().max_bytes]

    def test_says_what_is_gone(self, out: Path) -> None:
        scores = Scores(str(out))
        row = scores.rows(scores.select(Selection(path_part="group"))).to_pylist()[0]
        with pytest.raises(FaceError, match="the image is gone"):
            cut_row({**row, "path": str(out / "gone.jpg")})
        with pytest.raises(FaceError, match="no face"):
            cut_row({**row, "age": None})
        with pytest.raises(FaceError, match=r"^damaged JPEG image$"):
            cut_row({**row, "age": None, "error": "damaged JPEG image"})
        (out / "changed.jpg").write_bytes(b"no image any more")
        with pytest.raises(FaceError, match="not an image"):
            cut_row({**row, "path": str(out / "changed.jpg")})
        Image.new("RGB", (row["height"], row["width"])).save(out / "other.jpg")
        with pytest.raises(FaceError, match="the image has changed since"):
            cut_row({**row, "path": str(out / "other.jpg")})
        with pytest.raises(FaceError, match="cannot be read"):
            cut_row({**row, "x2": float("inf")})


class TestNames:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("www.example.com.jpg", "` www.example.com.jpg `"),
            ("a`b``c.jpg", "``` a`b``c.jpg ```"),
            ("line\nbreak.jpg", "` linebreak.jpg `"),
            ("\U0001f468\u200d\U0001f467.jpg", "` \U0001f468\u200d\U0001f467.jpg `"),
        ],
        ids=["no link", "backticks", "line break", "joined emoji"],
    )
    def test_are_code(self, name: str, shown: str) -> None:
        assert literal(name) == shown

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("see http://127.0.0.1:8080/a?b=1.", "see ` http://127.0.0.1:8080/a?b=1 `\\."),
            ("(WWW.example.com); x", r"\(` WWW.example.com `\); x"),
            ("ask someone@example.com", "ask ` someone@example.com `"),
            ("begins with http:// or https://, not", r"begins with http\:// or https\://, not"),
            ("a*b\n", r"a\*b"),
        ],
    )
    def test_addresses_in_errors_are_no_links(self, text: str, shown: str) -> None:
        assert plain(text) == shown


class TestHints:
    def test_small_faces(self) -> None:
        assert hints_of(FACE, 100.0) == []
        small = replace(FACE, box=(0.0, 0.0, SMALL_PX - 1.0, 60.0))
        assert hints_of(small, 100.0) == [f"Small: {SMALL_PX - 1} px wide. Below {SMALL_PX} px, errors grow."]

    def test_blur_begins_where_it_was_measured(self) -> None:
        assert SHARP == 12
        assert hints_of(FACE, 12.0) == []
        assert hints_of(FACE, 11.9) == ["Blurred: errors grow."]

    def test_a_blurred_photograph_gets_the_hint_and_a_sharp_one_does_not(self, grace_hopper: bytes) -> None:
        result = Predictor(ROOT / "model_store" / "agegender.pt", device="cpu").predict([grace_hopper])[0]
        pixels = decode_image(grace_hopper)
        sharp = cut_face(pixels, result.faces[0].box)
        blurred = sharp.filter(ImageFilter.GaussianBlur(sharp.width / 40))
        assert hints_of(result.faces[0], sharpness(sharp)) == []
        assert hints_of(result.faces[0], sharpness(blurred)) == ["Blurred: errors grow."]

    def test_undecided(self) -> None:
        assert is_undecided(FACE, 0.84)
        assert not is_undecided(FACE, 0.83)

    @pytest.mark.parametrize(("probability", "undecided"), [(0.994, True), (0.996, False)], ids=["99%", "100%"])
    def test_what_is_shown_as_enough_is_enough(self, probability: float, undecided: bool) -> None:
        assert is_undecided(replace(FACE, gender_probability=probability), 1.0) == undecided


@pytest.mark.parametrize("box", [(10.0, 20.0, 40.0, 60.0), (0.0, 0.0, 200.0, 100.0), (190.0, 90.0, 200.0, 100.0)])
def test_a_cut_face_is_a_square_that_holds_the_middle_of_its_box(box: tuple[float, float, float, float]) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    middle = int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)
    pixels[middle] = 255
    face = cut_face(pixels, box)
    assert face.width == face.height
    assert np.asarray(face).max() == 255


class TestCharts:
    def test_genders_have_the_colours_of_their_boxes(self) -> None:
        bins = pd.DataFrame({"start": [0], "end": [5], "count": [1], "gender": ["male"]})
        spec = histogram(bins, title="age, years", split="gender").to_dict()
        scale = spec["encoding"]["color"]["scale"]
        male, female = (scale["range"][scale["domain"].index(gender)] for gender in ("male", "female"))
        assert int(male[5:], 16) > int(male[1:3], 16)  # blue, as `agegender.draw` has it
        assert int(female[1:3], 16) > int(female[5:], 16)
        assert spec["encoding"]["x"]["title"] == "age, years"

    def test_the_age_lies_as_a_point_on_its_interval(self) -> None:
        spec = age_scale()
        track, interval, point = (layer["encoding"] for layer in spec["layer"])
        assert (track["x"]["field"], track["x2"]["field"]) == ("start", "end")
        assert (interval["x"]["field"], interval["x2"]["field"]) == ("low", "high")
        assert point["x"]["field"] == "age"
        (row,) = age_data(FACE).to_dict("records")
        assert (row["low"], row["age"], row["high"]) == (27.6, 34.4, 41.2)

    @pytest.mark.parametrize("horizontal", [True, False])
    def test_bars_stand_in_the_order_that_is_given(self, horizontal: bool) -> None:
        counts = pd.DataFrame({"name": ["ok", "no_face", "a"], "count": [1, 2, 3]})
        names = bars(counts, title="outcome", horizontal=horizontal).to_dict()["encoding"]["y" if horizontal else "x"]
        assert names["sort"] == ["ok", "no_face", "a"]

    def test_all_beyond_ten_are_one_bar(self) -> None:
        assert _capped({9: 1, 10: 2, 11: 3, 25: 4}) == {**dict.fromkeys("012345678", 0), "9": 1, "10+": 9}

    def test_numbers_that_no_image_has_keep_their_place(self) -> None:
        assert _capped({1: 4, 3: 2}) == {"0": 0, "1": 4, "2": 0, "3": 2}


def test_each_card_has_its_own_face_and_the_sharpness_of_the_photograph(encode: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (900, 1800, 3), np.uint8)
    pixels[:, :900, 2], pixels[:, 900:, 0] = 0, 0  # no blue at the left, no red at the right
    left, right = (100.0, 100.0, 800.0, 800.0), (1000.0, 100.0, 1700.0, 800.0)
    faces = (replace(FACE, box=left), replace(FACE, index=1, box=right))
    view = View.of(encode(pixels, "PNG"), ImageResult("a.png", "ok", None, 1800, 900, faces))
    for portrait, face, absent in zip(view.portraits, faces, (2, 0), strict=True):
        assert portrait.face == face
        with Image.open(io.BytesIO(portrait.picture)) as picture:
            assert np.asarray(picture)[..., absent].mean() < 40
        assert portrait.sharpness == sharpness(cut_face(pixels, face.box))


def test_a_small_photograph_is_shown_at_its_size(encode: Any) -> None:
    data = encode(Image.new("RGB", (100, 50)), "PNG")
    assert View.of(data, ImageResult("a.png", "no_face", None, 100, 50)).size == (100, 50)


def test_captions_do_not_shrink_with_the_photograph(encode: Any) -> None:
    """A large one looks like itself at the size that is shown, also on a phone."""
    box = (1000.0, 1000.0, 2000.0, 2000.0)
    large = ImageResult("a.jpg", "ok", None, 6000, 3000, (replace(FACE, box=box),))
    view = View.of(encode(Image.new("RGB", (6000, 3000), "grey"), "PNG"), large)
    small = replace(large, faces=(replace(FACE, box=tuple(side * 1920 / 6000 for side in box)),))
    expected = annotate(np.asarray(Image.new("RGB", (1920, 960), "grey")), small, font_px=11 * 1920 / 360)
    photo = opened(view, 0.5)
    assert photo.size == expected.size
    assert np.abs(np.asarray(photo, np.int16) - np.asarray(expected, np.int16)).mean() < 0.5


def opened(view: View, least_probability: float) -> Image.Image:
    return Image.open(io.BytesIO(view.annotated(least_probability)))


@pytest.mark.parametrize(
    ("faces", "size", "least_px"), [(1, (1536, 600), 29), (4, (1536, 600), 16), (1, (400, 500), 16), (1, (60, 90), 16)]
)
def test_captions_have_a_height_on_the_page(
    encode: Any, monkeypatch: pytest.MonkeyPatch, faces: int, size: tuple[int, int], least_px: int
) -> None:
    heights: list[float] = []
    load = ImageFont.load_default
    monkeypatch.setattr(ImageFont, "load_default", lambda height: heights.append(height) or load(height))
    found = tuple(replace(FACE, index=index, box=(5.0, 5.0, 25.0, 25.0)) for index in range(faces))
    view = View.of(encode(Image.new("RGB", size), "PNG"), ImageResult("a.png", "ok", None, *size, found))
    photo = opened(view, 0.5)
    assert heights[0] * view.size[0] / photo.width == pytest.approx(least_px, abs=0.5)


def test_a_small_photograph_with_a_face_is_enlarged_for_its_captions(encode: Any) -> None:
    pixels = np.full((120, 100, 3), 128, np.uint8)
    face = replace(FACE, box=(25.0, 20.0, 75.0, 80.0))
    view = View.of(encode(pixels, "PNG"), ImageResult("a.png", "ok", None, 100, 120, (face,)))
    assert view.size == (300, 360)
    photo = opened(view, 0.5)
    assert photo.size == (600, 720)
    middle = np.asarray(photo)[140:460, 170:430]  # of the face
    assert (np.abs(middle.astype(int) - 128) < 9).all()


@pytest.mark.parametrize(
    ("least_probability", "caption"), [(0.83, "female 83%\n34 (28-41)"), (0.84, "undecided\n34 (28-41)")]
)
def test_the_picture_agrees_with_the_card_on_what_is_undecided(
    encode: Any, monkeypatch: pytest.MonkeyPatch, least_probability: float, caption: str
) -> None:
    said: list[str] = []
    text = ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda draw, xy, *told, **how: said.append(told[0]) or text(draw, xy, *told, **how),
    )
    face = replace(FACE, box=(100.0, 100.0, 300.0, 300.0))
    view = View.of(encode(Image.new("RGB", (600, 600), "grey"), "PNG"), ImageResult("a", "ok", None, 600, 600, (face,)))
    photo = opened(view, least_probability)
    red, green, blue = photo.getpixel((photo.width // 3, photo.width * 301 // 600 + 4))  # of the caption, or of its box
    assert said == [caption]
    assert (max(red, green, blue) - min(red, green, blue) < 20) == caption.startswith("undecided")


def test_a_child_of_one_and_a_single_face_are_told_in_the_singular() -> None:
    def page() -> None:
        import io

        from PIL import Image

        from agegender import FacePrediction, ImageResult
        from app.photograph import Portrait, View, show_view

        buffer = io.BytesIO()
        Image.new("RGB", (9, 9)).save(buffer, "JPEG")
        face = FacePrediction(0, (0.0, 0.0, 9.0, 9.0), 0.9, 1.2, 0.0, 4.0, "male", 0.9)
        result = ImageResult("a.png", "ok", None, 9, 9, (face,))
        view = View(result, buffer.getvalue(), (9, 9), (Portrait(face, buffer.getvalue(), 1.0),))
        show_view(view, key="0", least_probability=0.7, coverage=0.9)

    app = AppTest.from_function(page, default_timeout=120).run()
    assert "1 year" in texts(app.subheader)
    assert app.get("image")[0].proto.imgs[0].alt == "a.png with 1 marked face"
    assert [text for text in texts(app.markdown) if "Blurred: errors grow." in text]
    assert not [text for text in texts(app.caption) if "errors grow" in text], "a caption is pale"


def test_the_shown_photograph_is_bounded(encode: Any) -> None:
    large = encode(Image.new("RGB", (6000, 3000), "grey"), "JPEG")
    view = View.of(
        large, ImageResult("a.jpg", "ok", None, 6000, 3000, (replace(FACE, box=(100.0, 100.0, 900.0, 900.0)),))
    )
    assert view.photo
    with Image.open(io.BytesIO(view.photo)) as photo:
        assert max(photo.size) <= 1920
    assert view.size[0] / view.size[1] == pytest.approx(2, rel=0.01)
