"""Ctrl-C and SIGTERM end the job, wherever it is."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

from batch.progress import tell

__all__ = ["INTERRUPTED", "heed_interrupts", "unless_stuck"]

INTERRUPTED: Final = 130  # the exit code, as of a program that a shell's Ctrl-C has ended

# After an interrupt: until it must have been heard, until another one ends the program at once, until all has ended.
_HEARD_S, _IMPATIENT_S, _ENDED_S = 10, 5, 40


def heed_interrupts() -> threading.Event:
    """Lets Ctrl-C and SIGTERM raise KeyboardInterrupt, once: what follows finds the program tidying up, and lets it.

    Returns:
        What is set from the first one on.
    """
    handled = threading.Event()

    def handle(*_: object) -> None:
        if not handled.is_set():
            handled.set()
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in scripts behind `&`
        signal.signal(signal.SIGINT, handle)
    return handled


@contextlib.contextmanager
def unless_stuck(handled: threading.Event) -> Iterator[None]:
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
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                return True
    except TimeoutError:
        return None
    return False
