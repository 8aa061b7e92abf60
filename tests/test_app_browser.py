"""The app as people use it: a real Chromium, the app in a process of its own, and a real TorchServe."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from agegender import ImageResult, Item, Predictor
from agegender.records import arrow_table, from_json, to_json
from batch.samples import write_samples
from handler.server import KEY_FILE, Server

pytest.importorskip("streamlit", reason="the app needs Python 3.11 or newer")

from tests.browsing import NO_CHROMIUM, App, alerts, chromium, chromium_path, open_page, running_app, settle, upload

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).parent.parent
_EMPTY_END_PX = 110  # below the last element of a page
PICTURES = os.environ.get("SCREENSHOTS")

pytestmark = pytest.mark.skipif(chromium_path() is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app; when all tests are done, its log must be clean."""
    with running_app(tmp_path_factory.mktemp("app") / "app.log") as app:
        yield app
        assert app.warnings() == []


def out_of(directory: Path, results: list[ImageResult]) -> Path:
    """An output of the batch job with these results."""
    directory.mkdir()
    pq.write_table(arrow_table(results), directory / "faces-00000000-00000.parquet")
    return directory


def open_results(browser: "Browser", app: App, out: Path, *, rows: int) -> "Page":
    """The results page with an output of as many rows."""
    page = open_page(browser, f"{app.address}/results")
    page.get_by_role("textbox", name="Output directory").fill(str(out))
    page.keyboard.press("Enter")
    page.get_by_text(f"{rows} filtered of {rows} rows").wait_for()
    return page


def assert_cards(page: "Page", result: ImageResult) -> None:
    """The page shows each face's numbers, as people read them."""
    main = page.get_by_test_id("stMain")
    for face in result.faces:
        main.get_by_role("heading", name=f"{face.age:.0f} years", exact=True).first.wait_for()
        interval = f"90% interval: {face.age_low:.0f} to {face.age_high:.0f}"
        gender = f"{face.gender} {face.gender_probability:.0%}"
        for text in (interval, gender, f"face {face.index + 1}, detector score {face.score:.2f}"):
            main.get_by_text(text).first.wait_for()


def downloaded(page: "Page", name: str) -> bytes:
    """What a download button gives."""
    with page.expect_download() as download:
        page.get_by_test_id("stMain").get_by_role("button", name=name, exact=True).click()
    return Path(download.value.path()).read_bytes()


def numbers(result: ImageResult) -> list[float]:
    return [
        number
        for face in result.faces
        for number in (*face.box, face.score or 0, face.age, face.age_low, face.age_high, face.gender_probability)
    ]


def assert_fits(page: "Page") -> None:
    """Nothing reaches beyond the page's right edge, and no text of a card is cut off."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    main = page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
    assert main <= page.viewport_size["width"]  # type: ignore[index]


def choose_row(page: "Page", number: int) -> None:
    """Ticks a row of the table, counted from 0."""
    table = page.get_by_test_id("stDataFrame")
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    assert box
    page.mouse.click(box["x"] + 17, box["y"] + 35 + 17 + 35 * number)


def images_of(area: "Locator") -> list[tuple[int, int]]:
    """Widths and heights of the decoded images there."""
    sizes = area.locator("[data-testid=stImage] img").evaluate_all(
        "all => all.map(i => [i.naturalWidth, i.naturalHeight])"
    )
    return [(width, height) for width, height in sizes]


def test_uploads_show_the_predictors_numbers(
    app: App, browser: "Browser", predictor: Predictor, group_jpeg: bytes, astronaut: bytes
) -> None:
    """One upload, a second, and a broken one beside them."""
    group, single = predictor.predict([Item(group_jpeg, "group.jpg"), Item(astronaut, "astronaut.png")])
    page = open_page(browser, app.address)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if app.address not in request.url else None)

    upload(page, ("group.jpg", group_jpeg))
    assert_cards(page, group)
    upload(page, ("astronaut.png", astronaut))
    assert_cards(page, single)
    assert_cards(page, group)

    upload(page, ("broken.jpg", group_jpeg[:5000]))
    alerts(page).first.wait_for()
    assert "broken.jpg: Damaged JPEG image" in alerts(page).inner_text().replace("\n", "")
    settle(page)
    assert len(images_of(page.get_by_test_id("stMain"))) == 2 + 3  # two photographs, three faces
    assert_fits(page)

    records = json.loads(downloaded(page, "JSON"))
    assert [record["path"] for record in records] == ["group.jpg", "astronaut.png", "broken.jpg"]
    for record, expected in zip(records, (group, single), strict=False):
        assert numbers(from_json(record)) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-5)
    csv = downloaded(page, "CSV").decode().splitlines()
    assert csv[0].startswith('"path","status"')
    assert len(csv) == 1 + 4
    assert [error for error in errors if not error.startswith(("data:", "blob:", "ws:"))] == []


def test_an_output_at_the_width_of_a_phone(
    app: App, browser: "Browser", predictor: Predictor, grace_hopper_path: Path, group_jpeg: bytes, tmp_path: Path
) -> None:
    paths = [str(grace_hopper_path), str(tmp_path / "gone.jpg")]
    results = predictor.predict([Item(grace_hopper_path.read_bytes(), paths[0]), Item(group_jpeg, paths[1])])
    out = out_of(tmp_path / "out", results)
    page = open_page(browser, f"{app.address}/results", width_px=390, dark=True)
    page.get_by_role("textbox", name="Output directory").fill(str(out))
    page.keyboard.press("Enter")
    page.get_by_test_id("stMetric").filter(has_text="Faces").get_by_text("3", exact=True).wait_for()
    settle(page)
    assert_fits(page)
    choose_row(page, 0)
    page.get_by_test_id("stMain").locator("[data-testid=stImage] img").wait_for()
    choose_row(page, 1)
    alerts(page).first.wait_for()
    settle(page)
    assert len(images_of(page.get_by_test_id("stMain"))) == 1
    assert "gone.jpg: the image is gone" in page.get_by_test_id("stMain").inner_text()
    exported = downloaded(page, "Parquet")
    assert pq.read_table(io.BytesIO(exported)).column("path").to_pylist() == paths

    # Of another output none is chosen.
    page.get_by_role("textbox", name="Output directory").fill(str(out_of(tmp_path / "other", results[:1])))
    page.keyboard.press("Enter")
    page.get_by_text("1 filtered of 1 rows").wait_for()


def test_the_same_numbers_from_a_server(
    app: App, browser: "Browser", server: Server, predictor: Predictor, group_jpeg: bytes
) -> None:
    """By its key file and by a typed token; an old token is said to be one."""
    (expected,) = predictor.predict([group_jpeg])
    page = open_page(browser, app.address)
    page.get_by_test_id("stSidebar").get_by_text("TorchServe", exact=True).click()
    enter(page, "Address", server.settings["inference_address"])
    enter(page, "Key file", str(server.directory / KEY_FILE))
    upload(page, ("group.jpg", group_jpeg))
    assert_cards(page, expected)
    assert predictor.model.sha256[:12] in page.get_by_test_id("stSidebar").inner_text()
    enter(page, "Token", "of-yesterday")
    alerts(page).get_by_text("refuses the token").wait_for()
    enter(page, "Token", server.key("inference"))
    assert_cards(page, expected)
    assert alerts(page).count() == 0


def test_uploads_outlive_a_look_at_the_other_page(
    app: App, browser: "Browser", predictor: Predictor, group_jpeg: bytes, astronaut: bytes
) -> None:
    """Until they are removed, or others take their place."""
    group, single = predictor.predict([group_jpeg, astronaut])
    page = open_page(browser, app.address)
    upload(page, ("www.example.com.jpg", group_jpeg))
    assert_cards(page, group)
    assert page.get_by_test_id("stMain").get_by_role("link").count() == 0
    page.get_by_role("link", name="Batch results").click()
    page.get_by_role("textbox", name="Output directory").wait_for()
    page.get_by_role("link", name="Try it").click()
    assert_cards(page, group)
    upload(page, ("astronaut.png", astronaut))
    assert_cards(page, single)
    page.get_by_role("link", name="Batch results").click()
    page.get_by_role("textbox", name="Output directory").wait_for()
    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="Remove 1 photograph").click()
    settle(page)
    assert images_of(page.get_by_test_id("stMain")) == []


def test_a_charts_own_buttons_cover_no_choice(
    app: App, browser: "Browser", predictor: Predictor, group_jpeg: bytes, tmp_path: Path
) -> None:
    out = out_of(tmp_path / "out", predictor.predict([Item(group_jpeg, "group.jpg")]))
    page = open_results(browser, app, out, rows=2)
    settle(page)
    page.get_by_test_id("stVegaLiteChart").first.hover()
    buttons = page.get_by_test_id("stElementToolbarButtonContainer").first.bounding_box()
    choice = page.get_by_role("radiogroup", name="Bin width").bounding_box()
    assert buttons
    assert choice
    assert choice["y"] >= buttons["y"] + buttons["height"]


def test_filters_outlive_a_look_at_the_other_page(app: App, browser: "Browser", tmp_path: Path) -> None:
    failed = [ImageResult(name, "unreadable", "damaged") for name in ("a.jpg", "b.jpg")]
    out = out_of(tmp_path / "out", [*failed, ImageResult("c.png", "no_face", None, 9, 9)])
    page = open_results(browser, app, out, rows=3)
    page.get_by_role("textbox", name="Path contains").fill(".jpg")
    page.keyboard.press("Enter")
    page.get_by_text("2 filtered of 3 rows").wait_for()
    page.get_by_role("link", name="Try it").click()
    page.get_by_text("JPEG, PNG, WebP").wait_for()
    page.get_by_role("link", name="Batch results").click()
    page.get_by_text("2 filtered of 3 rows").wait_for()
    settle(page)
    assert page.get_by_role("textbox", name="Path contains").input_value() == ".jpg"


def test_rows_stay_chosen_while_another_page_of_the_table_is_shown(
    app: App, browser: "Browser", tmp_path: Path
) -> None:
    out = out_of(tmp_path / "out", [ImageResult(f"{number}.jpg", "unreadable", "damaged") for number in range(101)])
    page = open_results(browser, app, out, rows=101)
    settle(page)
    choose_row(page, 1)
    page.get_by_text("1 chosen of 101 rows").wait_for()
    for number in (2, 1):
        page.get_by_role("button", name=f"Page {number}", exact=True).click()
        settle(page)
        page.get_by_text("1 chosen of 101 rows").wait_for()
    choose_row(page, 3)
    page.get_by_text("2 chosen of 101 rows").wait_for()
    settle(page)
    choose_row(page, 1)  # the tick is there to be taken away
    page.get_by_text("1 chosen of 101 rows").wait_for()


# Of each element that holds text itself, laid over all that lies behind it (WCAG 2.2, contrast ratio).
_CONTRAST = """element => {
    const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b)
    const parts = colour => { const [r, g, b, a] = colour.match(/[.\\d]+/g).map(Number); return [r, g, b, a ?? 1] }
    const laid = (top, below) => [0, 1, 2].map(at => top[at] * top[3] + below[at] * (1 - top[3]))
    const around = []
    for (let each = element; each; each = each.parentElement) around.unshift(getComputedStyle(each))
    const ground = around.reduce((below, style) => laid(parts(style.backgroundColor), below), [255, 255, 255])
    const text = parts(getComputedStyle(element).color)
    text[3] *= around.reduce((product, style) => product * style.opacity, 1)
    const [dark, bright] = [light(ground), light(laid(text, ground))].sort((a, b) => a - b)
    return (bright + 0.05) / (dark + 0.05)
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_warnings_notices_and_names_are_legible(
    app: App, browser: "Browser", grace_hopper: bytes, encode: Callable[..., bytes], dark: bool
) -> None:
    blurred = Image.open(io.BytesIO(grace_hopper)).convert("RGB").filter(ImageFilter.GaussianBlur(9))
    page = open_page(browser, app.address, dark=dark)
    upload(page, ("blurred.png", encode(blurred, "PNG")), ("notes.txt", b"hello"))
    main = page.get_by_test_id("stMain")
    main.get_by_text("errors grow.").wait_for()
    settle(page)
    for text in ("errors grow.", "Not for decisions", "detector score", "1 file that cannot be used", "notes.txt"):
        for element in main.get_by_text(text).all() or pytest.fail(f"{text} is not there"):
            assert element.evaluate(_CONTRAST) >= 4.5, text


def test_charts_side_by_side_have_plots_of_one_height(
    app: App, browser: "Browser", predictor: Predictor, group_jpeg: bytes, tmp_path: Path
) -> None:
    out = out_of(tmp_path / "out", predictor.predict([Item(group_jpeg, "group.jpg")]))
    page = open_results(browser, app, out, rows=2)
    settle(page)
    plots = page.locator("[data-testid=stVegaLiteChart] g.role-frame.root > g > path.background").all()
    heights = [box["height"] for plot in plots[:2] if (box := plot.bounding_box())]
    assert heights[0] == pytest.approx(heights[1], abs=3)


def test_a_download_of_rows_that_are_gone_is_told_of(
    browser: "Browser", predictor: Predictor, group_jpeg: bytes, tmp_path: Path
) -> None:
    out = out_of(tmp_path / "out", predictor.predict([Item(group_jpeg, "group.jpg")]))
    with running_app(tmp_path / "app.log") as app:  # of its own: Streamlit logs what has failed
        page = open_results(browser, app, out, rows=2)
        shutil.rmtree(out)
        page.get_by_test_id("stMain").get_by_role("button", name="CSV", exact=True).click()
        alerts(page).get_by_text("does not exist").wait_for()


def enter(page: "Page", label: str, text: str) -> None:
    """Types into a field of the sidebar."""
    page.get_by_role("textbox", name=label, exact=True).fill(text)
    page.keyboard.press("Enter")
    settle(page)


@pytest.mark.slow
def test_the_camera(app: App, browser: "Browser") -> None:
    """Chromium's test picture has no face."""
    page = open_page(browser, app.address)
    page.get_by_text("Camera", exact=True).click()
    page.wait_for_function("(document.querySelector('video') || {}).readyState >= 2")  # before, a click takes nothing
    settle(page)
    page.get_by_role("button", name="Take Photo").click()
    page.get_by_text("no face found").wait_for()


@pytest.mark.slow
def test_two_sessions_at_once(
    app: App, browser: "Browser", predictor: Predictor, grace_hopper: bytes, astronaut: bytes
) -> None:
    results = predictor.predict([grace_hopper, astronaut])
    pages = [open_page(browser, app.address) for _ in range(2)]
    for _ in range(3):
        for page, name, data in zip(pages, ("grace.jpg", "astronaut.png"), (grace_hopper, astronaut), strict=True):
            upload(page, (name, data))
    for page, mine, other in zip(pages, results, reversed(results), strict=True):
        assert_cards(page, mine)
        settle(page)
        assert page.get_by_role("heading", name=f"{other.faces[0].age:.0f} years", exact=True).count() == 0


@pytest.mark.slow
def test_the_hundredth_upload_works_like_the_first(
    app: App, browser: "Browser", predictor: Predictor, group_jpeg: bytes, blank_png: bytes
) -> None:
    page = open_page(browser, app.address)
    for first in range(0, 99, 11):
        upload(page, *[(f"{number}.png", blank_png) for number in range(first, first + 11)])
        page.get_by_text(f"{first + 10}.png").first.wait_for()
        settle(page)
    upload(page, ("last.jpg", group_jpeg))
    page.get_by_role("button", name="Page 13", exact=True).click()
    assert_cards(page, predictor.predict([group_jpeg])[0])


@pytest.mark.slow
def test_a_run_of_the_batch_job(app: App, browser: "Browser", predictor: Predictor, tmp_path: Path) -> None:
    write_samples(tmp_path / "photos")
    score(tmp_path / "photos", tmp_path / "out")
    page = open_page(browser, f"{app.address}/results")
    page.get_by_role("textbox", name="Output directory").fill(str(tmp_path / "out"))
    page.keyboard.press("Enter")
    page.get_by_test_id("stSidebar").get_by_text(predictor.model.sha256[:12]).wait_for()
    settle(page)
    assert page.get_by_test_id("stMetric").all_inner_texts()[0].split() == ["Images", "4"]
    exported = json.loads(pq.read_table(io.BytesIO(downloaded(page, "Parquet"))).to_pandas().to_json(orient="records"))
    grace = next(row for row in exported if row["path"].endswith("grace_hopper.jpg"))
    expected = to_json(predictor.predict([(tmp_path / "photos" / "grace_hopper.jpg").read_bytes()])[0])
    assert grace["age"] == pytest.approx(expected["predictions"][0]["age"], rel=1e-5)


@pytest.fixture(scope="module")
def variations() -> Iterator[Path]:
    """A run on the sample photographs, varied in size, light and turn, so that the charts have a form.

    Lies where its path tells nothing of the machine, since the pictures show it.
    """
    folder = Path(tempfile.gettempdir()) / "agegender"
    shutil.rmtree(folder, ignore_errors=True)
    write_samples(folder / "photos")
    for path in (folder / "photos" / "astronaut.png", folder / "photos" / "grace_hopper.jpg"):
        vary(path, path.parent)
    score(folder / "photos", folder / "out")
    yield folder / "out"
    shutil.rmtree(folder)


def score(photos: Path, out: Path) -> None:
    """Runs the batch job."""
    call = [sys.executable, "-m", "batch", str(photos), str(out)]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True, timeout=400)


class TestScreenshots:
    """The README's pictures: `make screenshots`."""

    pytestmark = pytest.mark.skipif(not PICTURES, reason="the pictures are taken by `make screenshots`")

    @pytest.mark.parametrize("width_px", [1440, 390])
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_screenshots_of_try_it(
        self, app: App, browser: "Browser", predictor: Predictor, grace_hopper: bytes, width_px: int, theme: str
    ) -> None:
        page = open_page(browser, app.address, width_px=width_px, dark=theme == "dark")
        upload(page, ("grace_hopper.jpg", grace_hopper))
        assert_cards(page, predictor.predict([grace_hopper])[0])
        take(page, "try", width_px, theme)

    @pytest.mark.parametrize("width_px", [1440, 390])
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_screenshots_of_results(
        self, app: App, browser: "Browser", variations: Path, width_px: int, theme: str
    ) -> None:
        page = open_page(browser, f"{app.address}/results", width_px=width_px, dark=theme == "dark")
        page.get_by_role("textbox", name="Output directory").fill(str(variations))
        page.keyboard.press("Enter")
        page.get_by_test_id("stMetric").first.wait_for()
        settle(page)
        for row in range(6):
            choose_row(page, row)
            settle(page)
        take(page, "results", width_px, theme)


def vary(path: Path, folder: Path) -> None:
    """Writes some dozens of variations of a photograph."""
    draw = random.Random(path.stem)
    image = Image.open(path).convert("RGB")
    for number in range(40):
        copy = image.rotate(draw.uniform(-35, 35), fillcolor="grey")
        copy = ImageEnhance.Brightness(copy).enhance(draw.uniform(0.2, 1.8))
        copy = ImageEnhance.Contrast(copy).enhance(draw.uniform(0.4, 1.6))
        copy = ImageOps.mirror(copy) if draw.random() < 0.5 else copy
        copy = copy.resize((round(copy.width * (scale := draw.uniform(0.25, 1))), round(copy.height * scale)))
        copy.save(folder / f"{path.stem}-{number:02}.jpg", quality=90)


def take(page: "Page", name: str, width_px: int, theme: str) -> None:
    """Takes the whole page, with nothing of it beyond the window."""
    settle(page)
    height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": width_px, "height": height})
    page.evaluate("document.querySelector('[data-testid=stMain]').scrollTo(0, 0)")
    page.mouse.move(0, 0)
    settle(page)
    assert_fits(page)
    suffix = "" if (width_px, theme) == (1440, "light") else f"-{width_px}-{theme}"
    shown = {"x": 0, "y": 0, "width": width_px, "height": height - _EMPTY_END_PX}
    page.screenshot(path=Path(str(PICTURES)) / f"app-{name}{suffix}.png", clip=shown, animations="disabled")
