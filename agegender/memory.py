"""How the process treats memory that was freed."""

import ctypes
import sys
from typing import Final

__all__ = ["keep_freed_memory"]

# HEAP_MAX_SIZE of glibc's arena.c on 64 bits.
_HEAP_BYTES: Final = 64 * 2**20


def keep_freed_memory() -> None:
    """Stops glibc from handing big buffers back to the kernel, which clears each page anew when they are wanted again.

    A network asks for the same buffers with every batch. For whole processes that do little else, such as workers:
    what they once took they keep. Nothing happens where there is no glibc. Constants: glibc's malloc.h.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        # All threads but the first take from heaps of this size. An empty one goes, unless as much is to stay free.
        libc.mallopt(m_top_pad, _HEAP_BYTES)
