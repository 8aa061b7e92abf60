"""Seeing a run: actors tell a tally what they have done, the driver shows it."""

import sys
import time
from collections import Counter
from typing import Final, TextIO

from tqdm import tqdm

__all__ = ["GOOD", "Progress", "Tally", "bad_count"]

# The statuses of inputs that were looked at.
GOOD: Final = ("ok", "no_face")

_TERMINAL_EVERY_S: Final = 0.25
_LOG_EVERY_S: Final = (2.0, 60.0)


def bad_count(statuses: dict[str, int]) -> int:
    """How many inputs could not be looked at."""
    return sum(count for status, count in statuses.items() if status not in GOOD)


class Tally:
    """Counts outcomes by status while they come. A block that is done again counts once."""

    def __init__(self) -> None:
        """Counts nothing yet."""
        self._total: Counter[str] = Counter()
        self._running: dict[int, dict[str, int]] = {}
        self._done: set[int] = set()

    def report(self, block: int, statuses: dict[str, int], done: bool = False) -> None:
        """Takes what one block has come to."""
        if block in self._done:
            return
        self._running[block] = statuses
        if done:
            self._total.update(self._running.pop(block))
            self._done.add(block)

    def statuses(self) -> dict[str, int]:
        """Number of inputs by status."""
        counts = self._total.copy()
        for running in self._running.values():
            counts.update(running)
        return dict(counts)


class Progress:
    """One line that renews itself in a terminal; in a log, a line now and then, ever more rarely."""

    def __init__(self, total: int, *, before: int = 0, stream: TextIO | None = None) -> None:
        """Starts the clock.

        Args:
            total: inputs to do in all.
            before: inputs that an earlier run has done.
            stream: where the line goes; stderr by default.
        """
        self._total = total
        self._before = before
        self._stream = stream
        self._terminal = (stream or sys.stderr).isatty()
        self._interval = _TERMINAL_EVERY_S if self._terminal else _LOG_EVERY_S[0]
        self._next = 0.0
        self._first: tuple[float, int] | None = None

    def show(self, done: int, bad: int) -> None:
        """Shows the counts of inputs, if it is time to."""
        now = time.monotonic()
        if done > self._before and self._first is None:
            self._first = (now, done)
        if now < self._next:
            return
        self._next = now + self._interval
        if not self._terminal:
            self._interval = min(2 * self._interval, _LOG_EVERY_S[1])
        self._line(self._text(now, done, bad))

    def close(self, done: int, bad: int) -> None:
        """Shows the last counts."""
        self._line(self._text(time.monotonic(), done, bad))
        if self._terminal:
            self._write("\n")

    def _text(self, now: float, done: int, bad: int) -> str:
        if self._first is None:
            return f"starting: {self._before} of {self._total} images done"
        since, first = self._first
        return tqdm.format_meter(
            done,
            self._total,
            max(now - since, 1e-6),
            unit="img",
            rate=(done - first) / max(now - since, 1e-6) or None,
            ncols=100 if self._terminal else None,
            bar_format=None
            if self._terminal
            else "{n_fmt}/{total_fmt} {percentage:.0f}% {rate_fmt}, {remaining} left{postfix}",
            postfix=f"{bad} bad" if bad else "",
        )

    def _line(self, text: str) -> None:
        self._write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text)
        stream.flush()
