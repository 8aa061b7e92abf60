"""How the process treats memory that was freed."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Stops glibc from handing big buffers back to the kernel, which clears each page anew when they are wanted again.

    A network asks for the same buffers with every batch. For whole processes that do little else, such as workers:
    what they once took they keep. Nothing happens where there is no glibc. Constants: glibc's malloc.h.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
