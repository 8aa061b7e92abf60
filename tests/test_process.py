"""agegender.process: what changes all of a process, in one of its own; and locked directories."""

import errno
import fcntl
import os
import platform
import subprocess
import sys

import pytest

from agegender.process import core_count, directory_lock

_PAGES_CLEARED_AGAIN = """
import resource
import threading
from agegender.process import keep_freed_memory

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


_RESIDENT_AFTER_A_LARGE_IMAGE = """
import psutil
from agegender.process import keep_freed_memory

keep_freed_memory()
before = psutil.Process().memory_info().rss
buffer = bytearray(2**30)
del buffer
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_process_does_not_stay_as_large_as_its_largest_image():
    run = subprocess.run(
        [sys.executable, "-c", _RESIDENT_AFTER_A_LARGE_IMAGE], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 2**29


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A directory in place of Linux's control groups, with none in it."""
    monkeypatch.setattr("agegender.process._GROUPS", tmp_path)
    monkeypatch.setattr("agegender.process._OWN_GROUPS", tmp_path / "own")
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="others do not say")
def test_cores_are_those_that_the_process_may_use(groups):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert core_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert core_count() == len(allowed)


@pytest.mark.skipif(sys.platform != "linux", reason="others have no control groups")
@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        pytest.param("0::/", {"cpu.max": "200000 100000"}, 2, id="a container"),
        pytest.param("0::/", {"cpu.max": "150000 100000"}, 2, id="a part of a core"),
        pytest.param("0::/", {"cpu.max": "6400000 100000"}, 8, id="more than there are"),
        pytest.param("0::/", {"cpu.max": "max 100000"}, 8, id="no quota"),
        pytest.param("0::/", {}, 8, id="the outermost group"),
        pytest.param("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, id="a service"),
        pytest.param("0::/c", {"a/cpu.max": "300000 100000"}, 8, id="another service"),
        pytest.param(
            "0::/\n4:cpu,cpuacct:/docker/1",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
            id="a container, version 1",
        ),
        pytest.param(
            "4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, id="no quota, version 1"
        ),
    ],
)
def test_cores_are_no_more_than_a_quota_gives(own, files, cores, groups, monkeypatch):
    (groups / "own").write_text(f"{own}\n")
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{content}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert core_count() == cores


def test_cores_where_the_system_does_not_say_which(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert core_count() == os.cpu_count()


def test_a_directory_is_locked_once_at_a_time(tmp_path):
    with directory_lock(tmp_path):
        script = f"from agegender.process import directory_lock\nwith directory_lock({str(tmp_path)!r}): pass"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "BlockingIOError" in other.stderr
        with pytest.raises(BlockingIOError), directory_lock(str(tmp_path)):
            pass
    with directory_lock(tmp_path):
        pass


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent), lambda path: None])
def test_what_is_no_directory_is_not_locked(make, tmp_path):
    """A pipe, which would wait for a writer; a link; nothing."""
    make(tmp_path / "name")
    with pytest.raises(OSError, match="name"), directory_lock(tmp_path / "name"):
        pass


@pytest.mark.parametrize("failure", [BlockingIOError(errno.EAGAIN, "held"), OSError(errno.ENOLCK, "no locks")])
def test_a_directory_that_cannot_be_locked_is_closed(failure, tmp_path, monkeypatch):
    taken = []

    def flock(descriptor, _):
        taken.append(descriptor)
        raise failure

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(type(failure)), directory_lock(tmp_path):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taken[0])
