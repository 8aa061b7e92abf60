"""Keeps a second run off an output in an object store, which has no locks.

A run keeps an object of its own there and writes it anew every few seconds. Who comes later looks whether another
one's changes: if so, that run lives. No clocks are compared. Of two that come at the same moment each sees
the other, and at least one gives up.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from pyarrow import fs

__all__ = ["LeaseLostError", "LeaseTakenError", "lease"]

_PREFIX: Final = "_writer-"
_BEAT_S: Final = 5.0
_SILENT_BEATS: Final = 3


class LeaseTakenError(Exception):
    """Another run lives."""


class LeaseLostError(Exception):
    """Another run has taken this one for dead."""


@contextlib.contextmanager
def lease(filesystem: fs.FileSystem, folder: str, *, beat_s: float | None = None) -> Iterator[Callable[[], None]]:
    """Holds `folder` inside this context.

    Args:
        filesystem: of an object store.
        folder: where the runs keep their objects.
        beat_s: how often this one's is written; by default every five seconds. Another is taken for dead when it has
            not changed for three beats.

    Yields:
        A function that raises LeaseLostError if this run no longer holds the folder.

    Raises:
        LeaseTakenError: another run holds it.
        OSError: the store does not say who holds it.
    """
    beat_s = beat_s or _BEAT_S
    own = f"{folder}/{_PREFIX}{secrets.token_hex(8)}"
    silent_s = _SILENT_BEATS * beat_s
    stopped = threading.Event()
    written = time.monotonic()

    def check() -> None:
        silent = time.monotonic() - written > silent_s
        if _is_gone(filesystem, own) or (silent and _others(filesystem, folder, own)):
            with contextlib.suppress(OSError):
                filesystem.delete_file(own)
            raise LeaseLostError

    def beat() -> None:
        nonlocal written
        while not stopped.wait(beat_s):
            with contextlib.suppress(OSError, LeaseLostError):  # the store may be away for a moment
                check()
                _write(filesystem, own)
                check()  # one that took long may have brought back what a successor had deleted
                written = time.monotonic()

    _write(filesystem, own)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        _outlive(filesystem, folder, own, silent_s)
        yield check
    finally:
        stopped.set()
        thread.join()
        with contextlib.suppress(OSError):
            filesystem.delete_file(own)


def _outlive(filesystem: fs.FileSystem, folder: str, own: str, silent_s: float) -> None:
    """Waits until every other run has either shown that it lives or been silent long enough."""
    before = _others(filesystem, folder, own)
    if not before:
        return
    deadline = time.monotonic() + silent_s
    while time.monotonic() < deadline:
        time.sleep(silent_s / 10)
        now = _others(filesystem, folder, own)
        if any(before.get(path) != written for path, written in now.items()):
            raise LeaseTakenError
    for path in before:
        with contextlib.suppress(OSError):
            filesystem.delete_file(path)


def _others(filesystem: fs.FileSystem, folder: str, own: str) -> dict[str, bytes]:
    """What the other runs have written last, by object."""
    found: dict[str, bytes] = {}
    for info in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if info.base_name.startswith(_PREFIX) and info.path != own:
            with contextlib.suppress(FileNotFoundError), filesystem.open_input_stream(info.path) as stream:
                found[info.path] = stream.read()
    return found


def _is_gone(filesystem: fs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type is not fs.FileType.File)


def _write(filesystem: fs.FileSystem, path: str) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(secrets.token_hex(8).encode())
