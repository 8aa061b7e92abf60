"""Ctrl-C, SIGTERM and a terminal that closes end the job, wherever it is; and what ends it from outside is told of."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

from batch.progress import tell

__all__ = ["INTERRUPTED", "children_outlast_terminal", "exit_if_stuck", "heed_interrupts", "told_if_killed"]

INTERRUPTED: Final = 130  # the exit code, as of a program that a shell's Ctrl-C has ended

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# After an interrupt: until it must have been heard, until another one ends the program at once, until all has ended.
_HEARD_S, _IMPATIENT_S, _ENDED_S = 10, 5, 40

_AGAIN_S: Final = 0.05

_KILLED: Final = (
    "batch: this process was ended by its engine or killed; "
    "what is done stays done, and the same command (without --overwrite) goes on"
)
# Reads until this process closes the pipe or ends, and says the above if no more than this word came.
_WATCH: Final = "watch"
_WITNESS: Final = (
    "/bin/sh",
    "-c",
    'while read -r line; do last=$line; done; [ "$last" != "$1" ] || printf "\\n%s\\n" "$0" >&2',
    _KILLED,
    _WATCH,
)

_witnesses: Final[set[int]] = set()


def heed_interrupts() -> threading.Event:
    """Lets Ctrl-C, SIGTERM and a terminal that closes raise KeyboardInterrupt.

    Once: what follows finds the program tidying up, and lets it.

    Returns:
        What is set from the first one on.
    """
    handled = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if handled.is_set():
            return
        if _would_be_dropped(frame):
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        handled.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in scripts behind `&`, and behind nohup
            signal.signal(number, handle)
    return handled


def _would_be_dropped(frame: FrameType | None) -> bool:
    """Whether a hook runs whose exceptions Python drops.

    They are those of `logging` around a fork, which would keep its lock for ever, and the one at the end of an import.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        if (frame.f_code.co_filename, frame.f_code.co_name) == ("<frozen importlib._bootstrap>", "cb"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def exit_if_stuck(handled: threading.Event) -> Iterator[None]:
    """Ends the process where an interrupt does not.

    A handler runs between two steps of Python, and a call into an object store that does not answer is one step of
    minutes; tidying up there takes as long. And what a handler raises inside a destructor, Python drops.

    Args:
        handled: of `heed_interrupts`.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        if not _interrupted(reader, None):
            return
        began = time.monotonic()
        if handled.wait(_HEARD_S):
            while (left := began + _ENDED_S - time.monotonic()) > 0:
                again = _interrupted(reader, left)
                if again is False:
                    return
                if again and time.monotonic() - began > _IMPATIENT_S:
                    break
        tell(sys.stderr, "\nbatch: interrupted, and ended without tidying up; what is done stays done\n")
        _dismiss_witnesses()
        os._exit(INTERRUPTED)

    with reader, writer:
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.shutdown(socket.SHUT_WR)  # ends the thread
            watcher.join()


def _interrupted(reader: socket.socket, timeout_s: float | None) -> bool | None:
    """Waits for an interrupt: True for one, False where none can come any more, None when the time is over."""
    reader.settimeout(timeout_s)
    try:
        while number := reader.recv(1):
            if number[0] in _ENDING:
                return True
    except TimeoutError:
        return None
    return False


@contextlib.contextmanager
def children_outlast_terminal() -> Iterator[None]:
    """What is started inside this context does not end with the terminal; this one is told at the latest after it.

    A terminal that closes tells all processes of the job, and without Ray's there is no tidying up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def told_if_killed() -> Iterator[None]:
    """Has a process of its own say it on stderr when this one ends inside this context.

    As it does without a word when a process of Ray's dies: Ray's code in C++ then ends this one, too.
    """
    import subprocess  # here, for an interrupt while it is imported would come before it is heeded

    with subprocess.Popen(
        _WITNESS,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # which Ctrl-C does not reach
    ) as witness:
        assert witness.stdin is not None
        _witnesses.add(witness.stdin.fileno())
        try:
            _write(witness.stdin.fileno(), _WATCH)
            yield
        finally:
            _dismiss_witnesses()


def _dismiss_witnesses() -> None:
    """This process ends by itself, or what could end it has ended."""
    while _witnesses:
        _write(_witnesses.pop(), "enough")


def _write(descriptor: int, word: str) -> None:
    with contextlib.suppress(OSError):  # somebody has killed the witness; the job needs none
        os.write(descriptor, f"{word}\n".encode())
