"""What both pages say alike: the title with its notice, counts, errors as one sentence, names of files as they are."""

import re
from typing import Final

import streamlit as st

__all__ = ["counted", "literal", "plain", "sentence", "show_error", "show_title"]

_NOTICE: Final = (
    "Guesses of how a face is perceived, not of who somebody is. Not for decisions about people; non-commercial "
    "research only."
)

_JOINER: Final = "\u200d"  # of emoji that are made of several
_MARKDOWN: Final = frozenset(r"\`*_{}[]<>()#+-.!|$:~&")
# Of the web and of mail, without the marks that end a sentence: GitHub's Markdown finds them however they are escaped.
_ADDRESS: Final = re.compile(
    r"""((?:https?://|www\.)[-.\w]\S*?(?=[.,;:!?)\]'"]*(?:\s|$))|[-.\w+]+@[-\w]+(?:\.[-\w]+)+)""", re.IGNORECASE
)


def show_title(title: str) -> None:
    """A page's title, with what the numbers below it are and what they are not for."""
    st.title(title, anchor=False)
    st.caption(_NOTICE)


def counted(number: int, name: str) -> str:
    """The number with its noun."""
    return f"{number} {name}" if number == 1 else f"{number:,} {name}s"


def plain(text: str) -> str:
    """Text of elsewhere, which is no Markdown and may hold what cannot be printed; addresses in it are no links."""
    parts = _ADDRESS.split("".join(each for each in text if each.isprintable()))
    return "".join(literal(part) if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    return "".join(f"\\{each}" if each in _MARKDOWN else each for each in text)


def literal(name: str) -> str:
    """A name of elsewhere as Markdown's code, in which Streamlit finds no links, arrows or icons."""
    shown = "".join(each for each in name if each.isprintable() or each == _JOINER)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}"


def sentence(text: str) -> str:
    """The text with a capital, unless it begins with a name, and a full stop."""
    begins = text.partition(" ")[0]
    capital = text[:1].upper() if begins.isalpha() else text[:1]
    return f"{capital}{text[1:]}" + ("" if text.endswith((".", "?", "!")) else ".")


def show_error(error: Exception) -> None:
    """The error's own sentence on the page."""
    st.error(plain(sentence(str(error))), icon=":material/error:")
