"""The page `Batch results`: what an output of the batch job holds, from totals down to single faces."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from agegender.spec import interval_name
from app.charts import AGE_END_YEARS, bars, histogram
from app.export import to_csv, to_parquet
from app.gallery import FaceError, cut_row
from app.messages import counted, literal, plain, show_error, show_title
from app.scores import INTERVAL_WIDTH, SORTABLE, Rows, Scores, Selection, read_summary
from batch.errors import OutputError
from batch.summary import time_text

__all__ = ["show"]

_ROWS_PER_PAGE: Final = 100
_GALLERY: Final = 24
_TABLE_PX: Final = 420
_CHART_PX: Final = 380
_SORT_NAMES: Final = {
    "": "order of the files",
    "age": "age",
    INTERVAL_WIDTH: "interval width",
    "gender_probability": "gender probability",
    "score": "detector score",
    "faces": "faces in the image",
    "path": "path",
}
_NUMBER: Final = "number"
_CHOSEN: Final = "chosen"
_COLUMNS: Final = {
    "file": st.column_config.TextColumn("file", width="medium"),
    "status": st.column_config.TextColumn("status", width="small"),
    "age": st.column_config.NumberColumn("age", format="%.1f", width="small"),
    "age_low": st.column_config.NumberColumn("from", format="%.0f", width="small", help="Lower end of its interval"),
    "age_high": st.column_config.NumberColumn("to", format="%.0f", width="small", help="Upper end of its interval"),
    "gender": st.column_config.TextColumn("gender", width="small"),
    "gender_probability": st.column_config.ProgressColumn("probability", format="%.2f", min_value=0, max_value=1),
    "score": st.column_config.NumberColumn("score", format="%.2f", width="small"),
    _NUMBER: st.column_config.NumberColumn("face", width="small", help="Its number; the largest is the first"),
    "faces": st.column_config.NumberColumn("of", width="small", help="How many faces the image has"),
    "width": st.column_config.NumberColumn("width", format="%d px", width="small"),
    "height": st.column_config.NumberColumn("height", format="%d px", width="small"),
    "error": st.column_config.TextColumn("error", width="medium"),
    "path": st.column_config.TextColumn("path", width="large"),
}


def show(out: str) -> None:
    """Draws the page.

    Args:
        out: the directory that is shown first.
    """
    show_title("Batch results")
    name = st.text_input(
        "Output directory",
        out,
        placeholder="out, or s3://bucket/prefix",
        help="What `make batch` wrote.",
        key="out",
        persist_state="session",
    )
    if not (name := os.path.expanduser((name or "").strip())):  # as a shell, and a copied line, have it
        return
    try:
        fingerprint = Scores.fingerprint(name)
        scores = _load(name, fingerprint)
    except (OutputError, OSError, ValueError) as error:
        show_error(error)
        return
    summary = read_summary(name)
    with st.sidebar:
        _describe_run(summary)
    _show_totals(scores)
    _show_charts(scores, interval_name(summary["run"]["model"].get("coverage") if summary else None))
    st.subheader("Rows", anchor=False)
    _show_rows(name, fingerprint)


@st.cache_resource(max_entries=3, show_spinner="Reading the columns")
def _load(name: str, fingerprint: tuple[Any, ...]) -> Scores:
    return Scores(name)


def _describe_run(summary: dict[str, Any]) -> None:
    st.subheader("Run", anchor=False)
    if not summary:
        st.caption("No finished run is told of here: one still goes on or was stopped, or the files are copies.")
        return
    run = summary["run"]
    st.table(
        {
            "Model": plain(f"{run['model']['name']} {run['model']['version']}"),
            "SHA-256": f"`{run['model']['sha256'][:12]}`",
            "Finished": plain(summary["finished"].replace("T", " ").replace("Z", " UTC")),
            "Time": time_text(summary),
        },
        border="horizontal",
    )
    st.caption("Sources")
    st.code("\n".join(run["sources"]), language=None, wrap_lines=True)


def _show_totals(scores: Scores) -> None:
    statuses = scores.statuses
    total = sum(statuses.values())
    without = statuses.get("no_face", 0)
    with_face = statuses.get("ok", 0)
    figures = {
        "Images": total,
        "Faces": scores.faces,
        "With a face": with_face,
        "Without a face": without,
        "Failed": total - with_face - without,
        "Median age": scores.median_age,
    }
    with st.grid(len(figures), min_column_width=130):
        for label, figure in figures.items():
            st.metric(label, "-" if figure is None else f"{figure:,.0f}", border=True)


def _show_charts(scores: Scores, interval: str) -> None:
    """Those that have something to show: Vega-Lite labels an axis of nothing with NaN."""
    with st.grid(2, min_column_width=_CHART_PX, border=True) as grid:
        if scores.faces:
            with grid.cell():
                _show_ages(scores)
            with grid.cell():
                st.markdown(f"**Width of the {interval} of age**")
                edges = np.arange(0, AGE_END_YEARS + 4, 4)
                widths = scores.interval_widths
                told = (
                    f"Widths of the {interval} of {counted(len(widths), 'face')}, median {np.median(widths):.0f} years"
                )
                st.altair_chart(histogram(_bins(widths, edges), title="width, years"), alt=told)
        if scores.statuses:
            with grid.cell():
                st.markdown("**Outcome of each image**")
                _show_bars("Images by outcome", scores.statuses, title="outcome", horizontal=True)
        if scores.faces_per_image:
            with grid.cell():
                st.markdown("**Faces in each image**")
                _show_bars("Images by number of faces", _capped(scores.faces_per_image), title="faces")


def _show_bars(what: str, counts: dict[str, int], *, title: str, horizontal: bool = False) -> None:
    told = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
    st.altair_chart(bars(_frame(counts), title=title, horizontal=horizontal), alt=f"{what}: {told}")


def _show_ages(scores: Scores) -> None:
    st.markdown("**Age by gender**")
    chart = st.container()  # above the choice, since Streamlit lays a chart's own buttons over what is above it
    years = st.segmented_control(
        "Bin width",
        [1, 2, 5, 10],
        default=5,
        required=True,
        format_func=lambda width: f"{width} y",
        label_visibility="collapsed",
        key="bin_years",
        persist_state="session",
    )
    edges = np.arange(0, AGE_END_YEARS + years, years)
    frames = [_bins(scores.ages(gender), edges).assign(gender=gender) for gender in scores.genders]
    told = f"Ages of {counted(scores.faces, 'face')}, median {scores.median_age:.0f} years"
    chart.altair_chart(histogram(pd.concat(frames), title="age, years", split="gender"), alt=told)


def _bins(values: "np.typing.NDArray[np.float32]", edges: "np.typing.NDArray[np.int64]") -> pd.DataFrame:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return pd.DataFrame({"start": edges[:-1], "end": edges[1:], "count": counts})


def _capped(counts: dict[int, int], most: int = 10) -> dict[str, int]:
    """Counts of each number from 0, with all that lies beyond `most` in one."""
    capped: Counter[int] = Counter()
    for number, count in counts.items():
        capped[min(number, most)] += count
    return {f"{number}+" if number == most else str(number): capped[number] for number in range(max(capped) + 1)}


def _frame(counts: dict[str, int]) -> pd.DataFrame:
    return pd.DataFrame({"name": list(counts), "count": list(counts.values())})


@st.fragment
def _show_rows(name: str, fingerprint: tuple[Any, ...]) -> None:
    """Filters, table, gallery and export; what happens here does not draw the charts anew, unless the files changed."""
    try:
        if Scores.fingerprint(name) != fingerprint:
            st.rerun()
        _show_selected(_load(name, fingerprint), hash((name, fingerprint)))
    except (OutputError, OSError, ValueError) as error:
        show_error(error)


def _show_selected(scores: Scores, source: int) -> None:
    """Choices are kept as numbers of rows, so a change of the files or of the filters forgets them."""
    selection = _choose_selection(scores)
    rows = hash((source, selection))
    numbers = scores.select(selection)
    if not len(numbers):
        said = "No row is like this; widen the filters." if len(scores) else "This output has no rows."
        st.info(said, icon=":material/filter_alt_off:")
        return
    pages = -(-len(numbers) // _ROWS_PER_PAGE)
    page = st.pagination(pages, key=f"page-{rows}") if pages > 1 else 1
    first = (page - 1) * _ROWS_PER_PAGE
    shown = numbers[first : first + _ROWS_PER_PAGE]
    table = scores.rows(shown)
    chosen = _chosen(rows)
    event = st.dataframe(
        table.append_column("file", _file_names(table)).append_column(_NUMBER, pc.add(table["face"], 1)),
        height=min(_TABLE_PX, 40 + 35 * len(shown)),
        hide_index=True,
        column_order=list(_COLUMNS),
        column_config=_COLUMNS,
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": [number - first for number in chosen.get(page, [])]}},
        placeholder="",
        key=f"rows-{page}-{rows}",
    )
    chosen[page] = [first + number for number in event.selection.rows]
    picked = numbers[[number for _, of_page in sorted(chosen.items()) for number in of_page]]
    _show_export(scores, picked if len(picked) else numbers, chosen=bool(len(picked)), total=len(scores))
    _show_gallery(scores.rows(picked[:_GALLERY]).to_pylist() if len(picked) else [], len(picked))


def _chosen(rows: int) -> dict[int, list[int]]:
    """What has been chosen of a selection, by page: Streamlit forgets it of a page that is not shown."""
    if st.session_state.get(_CHOSEN, (None,))[0] != rows:
        st.session_state[_CHOSEN] = (rows, {})
    chosen: dict[int, list[int]] = st.session_state[_CHOSEN][1]
    return chosen


def _file_names(table: pa.Table) -> pa.Array:
    """The ends of paths, whose beginnings mostly are the same."""
    return pa.array(map(_file_name, table["path"].to_pylist()), pa.string())


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _choose_selection(scores: Scores) -> Selection:
    with st.grid(4, min_column_width=150):
        statuses = st.multiselect("Status", list(scores.statuses), placeholder="all", **_kept("statuses"))
        genders = st.multiselect("Gender", scores.genders, placeholder="all", **_kept("genders"))
        ages = st.slider("Age", 0, AGE_END_YEARS, (0, AGE_END_YEARS), **_kept("ages"))
        least = st.slider("Gender probability from", 50, 100, 50, format="%d%%", **_kept("least_probability"))
        path_part = st.text_input("Path contains", **_kept("path_part"))
        least_score = st.slider("Detector score from", 0.0, 1.0, 0.0, 0.05, **_kept("least_score"))
        sort_by = st.selectbox("Sort by", ["", *SORTABLE], format_func=_sort_name, **_kept("sort_by"))
        descending = st.selectbox(
            "Order", [False, True], format_func=_order_name, disabled=not sort_by, **_kept("descending")
        )
    return Selection(
        statuses=tuple(statuses),
        genders=tuple(genders),
        ages=None if ages == (0, AGE_END_YEARS) else ages,
        least_probability=0.0 if least == 50 else least / 100,
        least_score=least_score,
        path_part=path_part or "",
        sort_by=sort_by or "",
        descending=bool(descending),
    )


def _kept(key: str) -> dict[str, Any]:
    """Arguments of a widget that keeps its value while another page is shown."""
    return {"key": key, "persist_state": "session"}


def _sort_name(name: str) -> str:
    return _SORT_NAMES[name]


def _order_name(descending: bool) -> str:
    return "largest first" if descending else "smallest first"


def _show_export(scores: Scores, numbers: Rows, *, chosen: bool, total: int) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        _download("CSV", lambda: to_csv(scores.rows(numbers)), "text/csv")
        _download("Parquet", lambda: to_parquet(scores.rows(numbers)), "application/vnd.apache.parquet")
        st.caption(f"{len(numbers):,} {'chosen' if chosen else 'filtered'} of {total:,} rows", width="content")


def _download(kind: str, content: Callable[[], bytes | str], mime: str) -> None:
    """A button that makes its file when it is pressed; then the rows are drawn anew, and say what became of them."""
    st.download_button(kind, content, f"selection.{kind.lower()}", mime, icon=":material/download:")


def _show_gallery(rows: Sequence[dict[str, Any]], chosen: int) -> None:
    """The first rows of so many that were chosen."""
    st.subheader("Faces of the chosen rows", anchor=False)
    if not rows:
        st.caption("Choose rows at the left edge of the table to see their faces.")
        return
    if chosen > len(rows):
        st.caption(f"The first {len(rows)} of {chosen}.")
    missing = []
    with st.grid(min_column_width=140):
        for row in rows:
            try:
                face = cut_row(row)
            except FaceError as error:
                missing.append(f"{row['path']}: {error}")
                continue
            with st.container(gap="xxsmall"):
                st.image(face, width="stretch", alt=f"face {row['face'] + 1} of {row['path']}")
                age = f"{counted(round(row['age']), 'year')} ({row['age_low']:.0f} to {row['age_high']:.0f})"
                st.caption(f"{plain(row['gender'])} {row['gender_probability']:.0%}, {age}")
                st.markdown(literal(_file_name(row["path"])))  # a caption would pale it
    if missing:
        st.warning(f"{len(missing)} of {len(rows)} chosen rows cannot be shown:", icon=":material/hide_image:")
        st.code("\n".join(missing), language=None, wrap_lines=True)
