"""agegender.memory in a process of its own, since it changes all of one."""

import platform
import subprocess
import sys

import pytest

_PAGES_CLEARED_AGAIN = """
import resource
import threading
from agegender.memory import keep_freed_memory

def use():
    buffers = [bytearray(20 * 2**20) for _ in range(4)]  # more than one of glibc's heaps holds

def look():
    use()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

{call}
look()
other = threading.Thread(target=look)
other.start()
other.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(("call", "kept"), [("keep_freed_memory()", True), ("", False)])
def test_freed_memory_stays_in_every_thread(call, kept):
    script = _PAGES_CLEARED_AGAIN.format(call=call)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, other = (int(line) for line in run.stdout.split())
    assert (first < 1000, other < 1000) == (kept, kept)
