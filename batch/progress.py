"""Seeing a run: actors tell a tally what they have done, the driver shows it."""

import heapq
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Protocol, TextIO

__all__ = ["GOOD", "BlockReport", "Listener", "Progress", "Tally", "bad_count", "tell"]

# The statuses of inputs that were looked at.
GOOD: Final = ("ok", "no_face")

_SLOWEST: Final = 20
# A file is given up when the process that worked on it has died this often with nothing else in hand.
_FATAL_DEATHS: Final = 2

_COLUMNS: Final = 100
_STEADY_S: Final = 0.5
_TERMINAL_EVERY_S: Final = 0.25
_LOG_EVERY_S: Final = (4.0, 60.0)


def bad_count(statuses: dict[str, int]) -> int:
    """How many inputs could not be looked at."""
    return sum(count for status, count in statuses.items() if status not in GOOD)


@dataclass
class BlockReport:
    """What a block has come to so far.

    Attributes:
        statuses: inputs by status.
        stages_s: seconds by stage.
        slowest: seconds and names of the slowest inputs, without the network's share.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    stages_s: dict[str, float] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def add(self, other: "BlockReport") -> None:
        """Adds what another has come to."""
        self.statuses.update(other.statuses)
        for stage, seconds in other.stages_s.items():
            self.stages_s[stage] = self.stages_s.get(stage, 0.0) + seconds
        self.slowest = heapq.nlargest(_SLOWEST, self.slowest + other.slowest)


class Listener(Protocol):
    """What a process that scores tells of its work; see `Tally`."""

    def begin(self, block: int) -> tuple[bool, list[str]]: ...
    def take(self, block: int, path: str) -> None: ...
    def report(self, block: int, report: BlockReport, done: bool = False) -> None: ...


class Tally:
    """Counts outcomes while they come, and finds out which input a process died of.

    A block that is done again counts once.
    """

    def __init__(self) -> None:
        """Counts nothing yet."""
        self._total = BlockReport()
        self._running: dict[int, BlockReport] = {}
        self._done: set[int] = set()
        self._begun: set[int] = set()
        self._in_hand: dict[int, str] = {}
        self._deaths: Counter[str] = Counter()

    def begin(self, block: int) -> tuple[bool, list[str]]:
        """A process starts on a block.

        Returns:
            Whether another died on it, so that this one should name each input to `take`; and the inputs to give up.
        """
        careful = block in self._begun
        self._begun.add(block)
        if block in self._in_hand:
            self._deaths[self._in_hand.pop(block)] += 1
        return careful, [path for path, deaths in self._deaths.items() if deaths >= _FATAL_DEATHS]

    def take(self, block: int, path: str) -> None:
        """A process takes an input in hand."""
        self._in_hand[block] = path

    def report(self, block: int, report: BlockReport, done: bool = False) -> None:
        """Takes what one block has come to."""
        if done:
            self._in_hand.pop(block, None)  # of a block that is done again, too: its next beginning tells of no death
        if block in self._done:
            return
        self._running[block] = report
        if done:
            self._total.add(self._running.pop(block))
            self._done.add(block)

    def total(self) -> BlockReport:
        """What all blocks have come to."""
        total = BlockReport()
        for each in (self._total, *self._running.values()):
            total.add(each)
        return total


def tell(stream: TextIO, text: str) -> None:
    """Writes to people at once; where that fails, the work goes on without.

    As it does behind `| head`, in a terminal that was closed, or into a log on a full disk.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


class Progress:
    """One line that renews itself in a terminal; in a log, a line now and then, ever more rarely."""

    def __init__(self, total: int, *, before: int = 0, stream: TextIO | None = None) -> None:
        """Starts the clock.

        Args:
            total: inputs to do in all.
            before: inputs that an earlier run has done.
            stream: where the line goes; what is stderr at that moment by default.
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
            return f"starting ({self._before:,} of {self._total:,} images done before)"
        from tqdm import tqdm  # here, for an interrupt while it is imported would come before it is heeded

        since, first = self._first
        elapsed = now - since
        text = tqdm.format_meter(
            done,
            self._total,
            elapsed,
            unit="img",
            rate=(done - first) / elapsed if done > first and elapsed > _STEADY_S else None,
            ncols=self._columns() if self._terminal else 0,
            ascii=not (self._out.encoding or "utf").lower().startswith("utf"),
            postfix=f"{bad} bad" if bad else "",
        )
        return str(text).strip()

    def _columns(self) -> int:
        """A line that is wrapped could not be renewed."""
        try:
            columns = os.get_terminal_size(self._out.fileno()).columns
            return max(1, min(_COLUMNS, columns - 1)) if columns else _COLUMNS
        except (OSError, ValueError):
            return _COLUMNS

    def _line(self, text: str) -> None:
        self._write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        tell(self._out, text)

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stderr
