"""What the calls of all benchmarks have in common: numbers above zero, and failures that are told in a sentence."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from agegender.errors import AgeGenderError

__all__ = ["in_a_sentence", "positive"]


def positive(text: str) -> int:
    """A whole number above zero, as argparse takes types."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


@contextmanager
def in_a_sentence(name: str) -> Iterator[None]:
    """Decorates a benchmark's `main`, so that what its user can put right is told without a traceback.

    Raises:
        SystemExit: the input, the model or the file system was at fault.
    """
    try:
        yield
    except (AgeGenderError, ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from error
