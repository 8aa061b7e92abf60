"""How an error is shown: as one sentence."""

import streamlit as st

__all__ = ["show_error"]


def show_error(error: Exception) -> None:
    """The error's own sentence on the page."""
    text = str(error).rstrip(".")
    st.error(f"{text[:1].upper()}{text[1:]}.", icon=":material/error:")
