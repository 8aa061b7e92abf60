"""A finished output -> one self-contained HTML page."""

import base64
import heapq
import html
import io
from collections import defaultdict
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agegender import AgeGenderError
from agegender.draw import cut_recorded_face
from agegender.image import quiet_pillow
from agegender.spec import interval_name
from batch.errors import OutputError
from batch.location import read_bytes
from batch.output import REPORT_FILE, Output
from batch.summary import time_text

__all__ = ["write_report"]

_EXAMPLES: Final = 5
_WORST: Final = 12
_WIDTH_STEP_YEARS: Final = 5
_THUMBNAIL_PX: Final = 96
_MAX_THUMBNAIL_BYTES: Final = 50_000_000
_BOX: Final = ["x1", "y1", "x2", "y2"]
_PREDICTED: Final = ["score", "age", "age_low", "age_high", "gender"]
_COLUMNS: Final = ["path", "status", "error", "width", "height", *_BOX, *_PREDICTED]

_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .2rem .6rem .2rem 0; vertical-align: top } th { font-weight: normal; color: #888 }
td.n { text-align: right; white-space: nowrap } .bar { background: #4a7db5; height: .8rem; min-width: 1px }
td.p { word-break: break-all; font-size: .85rem } .dim { color: #888 } img { border-radius: 4px; display: block }
@media (max-width: 40rem) { table { display: block; overflow-x: auto } td.p, td.p + td { min-width: 11rem } }
"""


def write_report(output: Output) -> str:
    """Writes `_report.html` beside the records; readers of Parquet directories skip names that begin so.

    Returns:
        Its path.

    Raises:
        OutputError: the output is not finished, or a run began to change it meanwhile.
    """
    quiet_pillow()
    summary, finished = output.summary(), output.finished()
    if finished is None:
        raise OutputError(f"{output.name} is not a finished output: a run is adding to it, or was stopped at that")
    gathered = _Gathered()
    for batch in output.batches(_COLUMNS):
        gathered.add(batch)
    page = _page(output, summary, gathered)
    if output.finished() != finished:
        raise OutputError(f"{output.name} has changed while it was read; give the command again when no run goes on")
    output.write(REPORT_FILE, page)
    output.drop_empty_run()
    return output.path(REPORT_FILE)


class _Gathered:
    """What the page shows and the summary does not hold."""

    def __init__(self) -> None:
        self.examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.widths: dict[int, int] = defaultdict(int)
        self._worst: list[tuple[float, int, dict[str, Any]]] = []
        self._number = 0

    def add(self, batch: pa.RecordBatch) -> None:
        table = pa.table(batch)
        for status in table["status"].unique().to_pylist():
            wanted = _EXAMPLES - len(self.examples[status])
            if status != "ok" and wanted > 0:
                rows = table.filter(pc.equal(table["status"], status)).slice(0, wanted)
                self.examples[status] += rows.to_pylist()
        width = pc.subtract(table["age_high"], table["age_low"]).drop_null().to_numpy()
        for step, count in zip(*np.unique(width // _WIDTH_STEP_YEARS, return_counts=True), strict=True):
            self.widths[int(step)] += int(count)
        self._keep_worst(table)

    def _keep_worst(self, table: pa.Table) -> None:
        scored = table.filter(pc.is_valid(table["score"])).sort_by("score").slice(0, _WORST)
        for row in scored.to_pylist():
            self._number += 1
            self._worst.append((row["score"], self._number, row))
        self._worst = heapq.nsmallest(_WORST, self._worst)

    @property
    def worst(self) -> list[dict[str, Any]]:
        return [row for _, _, row in self._worst]


def _page(output: Output, summary: dict[str, Any], gathered: _Gathered) -> str:
    run = summary["run"]
    model = f"{run['model']['name']} {run['model']['version']} ({run['model']['sha256'][:12]})"
    interval = interval_name(run["model"].get("coverage"))
    widths = {
        f"{step * _WIDTH_STEP_YEARS}-{(step + 1) * _WIDTH_STEP_YEARS}": count
        for step, count in sorted(gathered.widths.items())
    }
    sections = [
        f"<h1>{summary['inputs']:,} files, {summary['faces']:,} faces</h1>",
        f"<p class=dim>{_text(', '.join(run['sources']))}<br>model {_text(model)}<br>finished "
        f"{_text(summary['finished'])} in {time_text(summary)}<br>{_text(output.name)}</p>",
        _bars("Status", summary["statuses"]),
        _examples(gathered),
        _bars("Perceived age, years", {decade: count for decade, count in summary["ages"].items() if count}),
        _bars("Perceived gender", summary["genders"]),
        _bars(f"Width of the {interval} of age, years", widths),
        _slowest(summary),
        _worst_faces(gathered, interval),
    ]
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>agegender</title><style>{_STYLE}</style>"
    )
    return head + "\n".join(section for section in sections if section) + "</html>\n"


def _bars(title: str, counts: dict[str, int]) -> str:
    if not counts:
        return ""
    largest, total = max(counts.values()), sum(counts.values())
    rows = "".join(
        f"<tr><td>{_text(label)}<td class=n>{count:,}<td class=n>{count / total:.1%}"
        f"<td style='width:60%'><div class=bar style='width:{100 * count / largest:.1f}%'></div>"
        for label, count in counts.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>"


def _examples(gathered: _Gathered) -> str:
    rows = "".join(
        f"<tr><td>{_text(status)}<td class=p>{_text(row['path'])}<td>{_text(row['error'] or '')}"
        for status, examples in sorted(gathered.examples.items())
        for row in examples
    )
    return f"<h2>Examples of inputs without a face</h2><table>{rows}</table>" if rows else ""


def _slowest(summary: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td class=n>{each['seconds']:.3f} s<td class=p>{_text(each['path'])}" for each in summary["slowest"]
    )
    note = "Reading, decoding and detection, without the network; of the last call alone."
    return f"<h2>Slowest files</h2><p class=dim>{note}</p><table>{rows}</table>" if rows else ""


def _worst_faces(gathered: _Gathered, interval: str) -> str:
    rows = "".join(
        f"<tr><td>{_thumbnail(row)}<td class=n>{row['score']:.2f}<td>{_text(row['gender'])}<td class=n>{row['age']:.0f}"
        f"<td class=n>{row['age_low']:.0f} to {row['age_high']:.0f}<td class=p>{_text(row['path'])}"
        for row in gathered.worst
    )
    head = f"<tr><th>face<th>detector score<th>gender<th>age<th>{interval}<th>file"
    return f"<h2>Faces that the detector was least sure of</h2><table>{head}{rows}</table>" if rows else ""


def _thumbnail(row: dict[str, Any]) -> str:
    """The face, if its image is still there and as it was, and can be read."""
    x1, y1, x2, y2 = (row[name] for name in _BOX)
    try:
        data = read_bytes(row["path"], max_bytes=_MAX_THUMBNAIL_BYTES)
        face = cut_recorded_face(data, (x1, y1, x2, y2), (row["width"], row["height"]), side_px=_THUMBNAIL_PX)
    except (OSError, ValueError, ArithmeticError, MemoryError, AgeGenderError):
        return "cannot be shown"
    buffer = io.BytesIO()
    face.save(buffer, "JPEG", quality=80)
    return f"<img alt='the face' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _text(text: str) -> str:
    return html.escape(text)
