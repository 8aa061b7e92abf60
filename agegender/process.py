"""What this process has of the machine: its cores, the memory that it freed, and the directories that it locks."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["core_count", "directory_lock", "keep_freed_memory"]

# HEAP_MAX_SIZE of glibc's arena.c on 64 bits.
_HEAP_BYTES: Final = 64 * 2**20

# More than a batch needs, less than an image of the largest size, after which a worker shall not stay that large.
_KEPT_BYTES: Final = 256 * 2**20

# Of both versions of Linux's control groups.
_GROUPS: Final = Path("/sys/fs/cgroup")
_OWN_GROUPS: Final = Path("/proc/self/cgroup")
_QUOTAS: Final = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def core_count() -> int:
    """How many cores this process may use; where the system does not say, as macOS does not, all of them.

    No more than a container's quota, rounded up: more processes than that would keep halting each other.
    """
    if sys.platform == "linux":
        return math.ceil(min([len(os.sched_getaffinity(0)), *_quotas()]))
    return os.cpu_count() or 1


def _quotas() -> Iterator[float]:
    """Cores at a time, of each control group that limits them."""
    for group in _groups():
        for names in _QUOTAS:
            with suppress(OSError, ValueError):  # it has none: no such file, or the word `max`
                quota, period = (int(word) for name in names for word in (group / name).read_text().split())
                if quota > 0:
                    yield quota / period


def _groups() -> Iterator[Path]:
    """Folders of the control groups around this process; a container sees its own as the outermost."""
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds or "cpu" in kinds.split(","):  # of version 2, or of version 1
                group = _GROUPS / ("cpu" if kinds else "") / path.lstrip("/")
                yield from (group, *group.parents)


@contextmanager
def directory_lock(path: str | Path) -> Iterator[None]:
    """Holds a directory alone while the context lasts, at most as long as this process lives.

    Raises:
        BlockingIOError: it is held already, by another process or by this one.
        OSError: it is missing, no directory, or a link.
    """
    import fcntl  # here, since Windows has none

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def keep_freed_memory(*, most_bytes: int | None = _KEPT_BYTES) -> None:
    """Stops glibc from handing big buffers back to the kernel, which clears each page anew when they are wanted again.

    A network asks for the same buffers with every batch. For whole processes that do little else, such as workers.
    Nothing happens where there is no glibc. Constants: glibc's malloc.h.

    Args:
        most_bytes: what is free beyond this goes back; None keeps all. Heaps of threads other than the first stay
            whole; they hold no buffer of more than 64 MB.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1 if most_bytes is None else most_bytes)
        # All threads but the first take from heaps of this size. An empty one goes, unless as much is to stay free.
        libc.mallopt(m_top_pad, _HEAP_BYTES)
