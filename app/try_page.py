"""The page `Try it`: photographs in, faces with ages and genders out."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import streamlit as st
from streamlit.runtime.uploaded_file_manager import UploadedFile

from agegender import AgeGenderError, Item
from agegender.records import arrow_table, to_json
from app.engine import Engine, choose_engine, describe_model
from app.export import to_csv
from app.messages import counted, literal, show_error, show_title
from app.photograph import View, show_view

__all__ = ["show"]

_SAMPLES: Final = Path("examples/photos")
_UPLOAD, _CAMERA, _SAMPLE = "Upload", "Camera", "Samples"
_VIEWS_PER_PAGE: Final = 8
_NAMES: Final = 5
_FILES, _UPLOADS, _VIEWS = "files", "uploads", "views"


def show(model: Path) -> None:
    """Draws the page.

    Args:
        model: the artifact for predictions in this process.
    """
    show_title("Age and gender from a face")
    items = _choose_items()
    with st.sidebar:
        choice, threshold, about = st.container(), st.container(), st.container()
    least_probability = _choose_threshold(threshold)
    try:
        with choice:
            engine = choose_engine(model)
        views = _views(items, engine)
        with about:
            st.subheader("Model", anchor=False)
            describe_model(engine, model)
    except (AgeGenderError, ValueError) as error:
        show_error(error)
        return
    if views:
        _show_views(views, least_probability, engine.coverage)


def _choose_threshold(place: st.delta_generator.DeltaGenerator) -> float:
    per_cent = place.slider(
        "Undecided below",
        50,
        100,
        70,
        format="%d%%",
        help="A gender of a lower probability is called undecided.",
        key="undecided",
        persist_state="session",
    )
    return float(per_cent) / 100


def _choose_items() -> list[Item]:
    """The photographs that the viewer gives; they stay in memory."""
    source = st.segmented_control(
        "Photographs from",
        [_UPLOAD, _CAMERA, _SAMPLE],
        default=_UPLOAD,
        required=True,
        label_visibility="collapsed",
        key="source",
        persist_state="session",
    )
    if source == _SAMPLE:
        return _choose_samples()
    if source == _CAMERA:
        picture = st.camera_input("Take a picture", label_visibility="collapsed", resolution="720p", width=640)
        return [Item(picture.getvalue(), "camera.jpg")] if picture else []
    files = st.file_uploader(
        "JPEG, PNG, WebP, BMP, TIFF or GIF; kept in memory only, and sent to the server where one is chosen",
        accept_multiple_files=True,
        key=_FILES,
        on_change=_take_uploads,
    )
    uploads: list[Item] = st.session_state.get(_UPLOADS, [])
    if uploads and not files:
        st.button(
            f"Remove {counted(len(uploads), 'photograph')}",
            icon=":material/delete:",
            on_click=_take_uploads,
        )
    return uploads


def _take_uploads() -> None:
    """Keeps what was uploaded: the uploader itself forgets it when another page is shown."""
    files = [file for file in st.session_state[_FILES] if isinstance(file, UploadedFile)]  # others have been deleted
    st.session_state[_UPLOADS] = [Item(file.getvalue(), file.name) for file in files]


def _choose_samples() -> list[Item]:
    paths = {path.name: path for path in sorted(_SAMPLES.glob("*")) if path.is_file() and path.name.isprintable()}
    if not paths:
        st.info(f"There are no samples in {_SAMPLES}; `make batch` puts them there.", icon=":material/info:")
        return []
    names = st.pills(
        "Samples", list(paths), selection_mode="multi", default=next(iter(paths)), label_visibility="collapsed"
    )
    items = []
    for name in names:
        try:
            items.append(Item(paths[name].read_bytes(), name))
        except OSError as error:
            show_error(error)
    return items


def _views(items: Sequence[Item], engine: Engine) -> list[View]:
    """What is shown of each photograph; what this session has seen already is not predicted again, nor kept longer.

    Raises:
        ServerError: the server is out of order; what it answered before is kept.
    """
    known: dict[str, View] = st.session_state.get(_VIEWS, {})
    keys = [_key(item, engine) for item in items]
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
    views = {key: known[key] for key in keys if key in known}
    st.session_state[_VIEWS] = views
    progress = st.empty()
    try:
        for number, (key, item) in enumerate(new.items()):
            if len(new) > 1:
                progress.progress(number / len(new), f"Photograph {number + 1} of {len(new)}")
            views[key] = View.of(item.data, engine.predictor.predict([item])[0])
    finally:
        progress.empty()
    return [views[key] for key in keys]


def _key(item: Item, engine: Engine) -> str:
    return hashlib.sha256(f"{engine.name}\n{item.path}\n".encode() + item.data).hexdigest()


def _show_views(views: Sequence[View], least_probability: float, coverage: float | None) -> None:
    _show_downloads(views)
    if len(views) > 1:
        st.markdown(_told(views))
    first = 0
    if len(views) > _VIEWS_PER_PAGE:
        first = (st.pagination(-(-len(views) // _VIEWS_PER_PAGE), key="views_page") - 1) * _VIEWS_PER_PAGE
    for number, view in enumerate(views[first : first + _VIEWS_PER_PAGE], first):
        show_view(view, key=str(number), least_probability=least_probability, coverage=coverage)


def _told(views: Sequence[View]) -> str:
    """Totals, and the names of files that failed, which may be shown on a later page."""
    failed = [view.result.path for view in views if view.result.failed]
    told = (
        f"{counted(len(views) - len(failed), 'photograph')} · {counted(sum(len(v.portraits) for v in views), 'face')}"
    )
    if not failed:
        return told
    names = ", ".join(map(literal, failed[:_NAMES]))
    more = f" and {len(failed) - _NAMES} more" if len(failed) > _NAMES else ""
    return f"{told} · {counted(len(failed), 'file')} that cannot be used: {names}{more}"


def _show_downloads(views: Sequence[View]) -> None:
    results = [view.result for view in views]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "JSON",
            lambda: json.dumps([to_json(result) for result in results], indent=1),
            "faces.json",
            "application/json",
            on_click="ignore",
            icon=":material/download:",
        )
        st.download_button(
            "CSV",
            lambda: to_csv(arrow_table(results)),
            "faces.csv",
            "text/csv",
            on_click="ignore",
            icon=":material/download:",
        )
