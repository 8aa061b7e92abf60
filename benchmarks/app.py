"""How long the app takes: from an uploaded photograph to its result, and for the page of a large batch output.

`python -m benchmarks.app` starts the app and a headless Chromium. Uploads are photographs of one megapixel, each with
other pixels, one after the other in one session; what is measured is the time from the moment in which the browser has
the file to the moment in which it shows the face's age. The output has ten files of made-up values, a row for each
image; its page is measured in the browser from a cold start (`page`), and so is the code that reads it, without a
browser (`reader`).
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import Browser, Page

from agegender.records import arrow_schema
from app.scores import INTERVAL_WIDTH, Scores, Selection
from batch.samples import package_file
from benchmarks.command_line import errors_without_traceback, make_parser, positive
from benchmarks.outputs import add_output_options, write_outputs
from tests.browsing import chromium, open_page, running_app, settle, upload

T = TypeVar("T")

_SIZE_PX: Final = (1000, 1000)
_FILES: Final = 10


@dataclass(frozen=True)
class Measurement:
    """One figure; seconds."""

    part: str
    what: str
    seconds: float


@errors_without_traceback("app")
def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, running_app(Path(folder) / "app.log") as app, chromium() as browser:
        out = Path(folder) / "out"
        _write_output(out, options.rows)
        results = [
            *_measure_uploads(open_page(browser, app.address), options.uploads),
            *_measure_reader(out),
            *_measure_page(browser, app.address, out),
        ]
        print("\n".join(app.warnings()), file=sys.stderr)
    lines = [
        f"{options.uploads} uploads; an output of {options.rows:,} rows.",
        "",
        "| part | what | s |",
        "|---|---|---|",
    ]
    report = "\n".join([*lines, *(f"| {each.part} | {each.what} | {each.seconds:.2f} |" for each in results)])
    print(report)
    write_outputs(options, report, results)


def _options() -> argparse.Namespace:
    parser = make_parser("app", __doc__)
    parser.add_argument("--uploads", type=positive, default=20, help="photographs to give")
    parser.add_argument("--rows", type=positive, default=1_000_000, help="rows of the output")
    add_output_options(parser)
    return parser.parse_args()


def _measure_uploads(page: Page, uploads: int) -> Iterator[Measurement]:
    seconds = [_upload_s(page, number, photo) for number, photo in enumerate(_photographs(uploads + 1))]
    later = seconds[1:]
    for what, value in (("first", seconds[0]), ("median", statistics.median(later)), ("slowest", max(later))):
        yield Measurement("upload to card", what, value)


def _upload_s(page: Page, number: int, photo: bytes) -> float:
    started = time.perf_counter()
    upload(page, (f"{number}.jpg", photo))
    page.get_by_role("heading", name=f"{number}.jpg", exact=True).wait_for()
    page.get_by_test_id("stMain").get_by_text("detector score").last.wait_for()
    seconds = time.perf_counter() - started
    settle(page)
    page.get_by_role("button", name=f"Remove {number}.jpg").click()
    settle(page)
    return seconds


def _photographs(count: int) -> Iterator[bytes]:
    portrait = Image.open(package_file("skimage", "data/astronaut.png")).convert("RGB").resize(_SIZE_PX)
    generator = np.random.default_rng(0)
    for _ in range(count):
        noise = generator.integers(-4, 5, (*_SIZE_PX[::-1], 1))
        pixels = np.clip(np.asarray(portrait, np.int16) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def _write_output(out: Path, rows: int) -> None:
    out.mkdir()
    generator = np.random.default_rng(0)
    for number, part in enumerate(np.array_split(np.arange(rows), _FILES)):
        pq.write_table(_made_up(part, generator), out / f"faces-00000000-{number:05}.parquet")


def _made_up(numbers: np.ndarray[Any, Any], generator: np.random.Generator) -> pa.Table:
    """A row of one face for each image."""
    count = len(numbers)
    age = generator.gamma(6, 6, count).clip(0, 116)
    columns: dict[str, Any] = {name: np.full(count, 100.0) for name in ("x1", "y1", "x2", "y2")}
    columns |= {
        "path": [f"/photographs/{number // 1000:05}/{number:09}.jpg" for number in numbers],
        "status": ["ok"] * count,
        "error": [None] * count,
        "width": np.full(count, 1000),
        "height": np.full(count, 1000),
        "faces": np.ones(count, int),
        "face": np.zeros(count, int),
        "score": generator.uniform(0.6, 1, count),
        "age": age,
        "age_low": (age - generator.uniform(1, 20, count)).clip(0),
        "age_high": age + generator.uniform(1, 20, count),
        "gender": np.where(generator.random(count) < 0.5, "male", "female"),
        "gender_probability": generator.uniform(0.5, 1, count),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in arrow_schema()]
    return pa.Table.from_arrays(arrays, schema=arrow_schema())


def _measure_reader(out: Path) -> Iterator[Measurement]:
    scores, seconds = _timed(lambda: Scores(str(out)))
    yield Measurement("reader", "open", seconds)
    selections = {
        "all rows": Selection(),
        "women of 20 to 30": Selection(genders=("female",), ages=(20, 30)),
        "by interval width": Selection(sort_by=INTERVAL_WIDTH, descending=True),
        "by path": Selection(sort_by="path", descending=True),
        "path contains": Selection(path_part="00042"),
    }
    for name, selection in selections.items():
        numbers, seconds = _timed(partial(scores.select, selection))
        yield Measurement("reader", name, seconds)
        _, seconds = _timed(partial(scores.rows, numbers[:100]))
        yield Measurement("reader", f"{name}, first 100 of {len(numbers):,} rows", seconds)


def _measure_page(browser: Browser, address: str, out: Path) -> Iterator[Measurement]:
    page = open_page(browser, f"{address}/results")
    actions: dict[str, Callable[[], None]] = {
        "open": lambda: _enter(page, "Output directory", str(out)),
        "filter by path": lambda: _enter(page, "Path contains", "00042"),
        "no filter again": lambda: _enter(page, "Path contains", ""),
        "next page": lambda: page.get_by_role("button", name="Page 2", exact=True).click(),
    }
    for name, act in actions.items():
        started = time.perf_counter()
        act()
        settle(page)
        yield Measurement("page", name, time.perf_counter() - started)


def _enter(page: Page, label: str, text: str) -> None:
    page.get_by_role("textbox", name=label).fill(text)
    page.keyboard.press("Enter")


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    value = function()
    return value, time.perf_counter() - started


if __name__ == "__main__":
    main()
