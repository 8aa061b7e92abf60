"""What can end a run, as one tree.

    BatchError
    ├── RequestError        the model or an option cannot be used
    ├── SourceError         a source cannot be used
    ├── OutputError         the output directory cannot be used as asked
    ├── JobError            the engine stopped; what is done stays done
    ├── IncompleteError     not every input has an outcome
    └── TooManyBadError     more inputs failed than the caller allows

Every error is one sentence that says what was wrong and what to do.
"""

import errno
from typing import ClassVar, Final

__all__ = [
    "BatchError",
    "IncompleteError",
    "JobError",
    "OutputError",
    "RequestError",
    "SourceError",
    "TooManyBadError",
    "first_line",
    "reason_of",
]

_LONGEST_LINE: Final = 300


def first_line(error: BaseException) -> str:
    """What a library's error says, without its details."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..."


def reason_of(error: OSError) -> str:
    """Why a disk or an object store did not do it."""
    return "the disk is full; free some space" if error.errno == errno.ENOSPC else first_line(error)


class BatchError(Exception):
    """Base of all errors that end a run on purpose.

    Attributes:
        exit_code: what the command returns.
    """

    exit_code: ClassVar[int] = 1


class RequestError(BatchError):
    """The model cannot be loaded, or an option is out of its range."""

    exit_code = 2


class SourceError(BatchError):
    """A source is missing, cannot be reached, or holds nothing."""

    exit_code = 2


class OutputError(BatchError):
    """The output directory holds something else, is in use, or cannot be written."""

    exit_code = 2


class JobError(BatchError):
    """The engine stopped. What is done stays done."""


class IncompleteError(BatchError):
    """The engine ended well, but not every input has an outcome."""


class TooManyBadError(BatchError):
    """More inputs failed than the caller allows."""

    exit_code = 3
