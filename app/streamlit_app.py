"""The app's entry: `python -m streamlit run app/streamlit_app.py`, which is what `make app` runs."""

import argparse
import logging
from pathlib import Path

import streamlit as st

try:
    from app import results_page, try_page
except ModuleNotFoundError as error:
    if error.name not in ("agegender", "app", "batch"):
        raise
    # Only `python -m` puts the project's directory on the path that modules are found on.
    st.error("Start the app from the project's directory with `make app`.")
    st.stop()

from agegender.image import quiet_pillow
from agegender.spec import DEFAULT_MODEL

_ICON = Path(__file__).with_name("icon.svg")


def main() -> None:
    """Lays out what both pages share and shows the chosen one."""
    # A file of ours: browsers fetch emoji and Material icons of a page from elsewhere.
    st.set_page_config(page_title="agegender", page_icon=str(_ICON), layout="wide")
    quiet_pillow()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what its retries end in is shown on the page
    try:
        options = _options()
    except SystemExit:  # argparse has said why, in the log
        st.error("The app was started with an argument that it does not know; the log has the ones it takes.")
        return
    pages = [
        st.Page(lambda: try_page.show(options.model), title="Try it", icon=":material/photo_camera:", url_path="try"),
        st.Page(
            lambda: results_page.show(options.out),
            title="Batch results",
            icon=":material/table_chart:",
            url_path="results",
        ),
    ]
    st.navigation(pages, position="top").run()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="streamlit run app/streamlit_app.py --")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the artifact (default %(default)s)")
    parser.add_argument("--out", default="examples/out", help="output of the batch job to open (default %(default)s)")
    return parser.parse_args()


main()
