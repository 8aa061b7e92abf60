"""Ray for the duration of a job: a cluster's, or a private one that leaves nothing behind."""

import contextlib
import glob
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Final

import ray

from agegender.process import core_count, directory_lock
from batch.errors import BatchError, JobError, RequestError, first_line
from batch.interrupts import children_outlast_terminal, told_if_killed
from batch.request import Resources

__all__ = ["quiet", "running_engine", "worker_count"]

# Reading, filtering by the checkpoint and writing each hold a logical CPU; with fewer than four a resumed run hangs.
_SPARE_CPUS: Final = 3
_OBJECT_STORE_BYTES: Final = 256 * 2**20
_SCRATCH: Final = "agegender-ray-"
_STARTS: Final = 3
_ANSWER_S: Final = 10.0
_ANY_CLUSTER: Final = "auto"  # Ray's word for one that runs on this machine
_CLIENT: Final = "ray://"


@contextlib.contextmanager
def running_engine(resources: Resources) -> Iterator[None]:
    """Ray is up inside this context.

    Raises:
        JobError: it does not start.
        RequestError: it has fewer GPUs than asked for, or the address is none that the job can use.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _scratch() as folder, told_if_killed(), quiet(os.path.join(folder, "engine.log")):
        try:
            _start_interruptibly(resources, folder)
            _check_gpus(resources)
            yield
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has set back to the system's own


def worker_count(resources: Resources) -> int:
    """How many processes work on images."""
    if resources.workers:
        return resources.workers
    if resources.address:
        return max(1, int(ray.cluster_resources().get("CPU", 1)) - _SPARE_CPUS)
    return core_count()


def _start_interruptibly(resources: Resources, folder: str) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with children_outlast_terminal():
            _start(resources, folder)
    except SystemExit:  # of Ray's own handler, which says nothing
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)


def _start(resources: Resources, folder: str) -> None:
    """Starts or joins Ray. It gives itself 30 s, which a machine that is busy with other things may not keep."""
    if resources.address:
        _check_answers(resources.address)
    for attempt in range(_STARTS):
        cluster = {"address": resources.address} if resources.address else _private_cluster(resources, folder)
        try:
            ray.init(**cluster, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            refusal = _refusal(error, resources.address)
            if refusal or attempt + 1 == _STARTS:
                raise refusal or JobError(
                    f"Ray did not start: {first_line(error)} Nothing is lost; try again."
                ) from error


def _refusal(error: Exception, address: str | None) -> BatchError | None:
    """What to tell of a start where trying again cannot help; None where it may."""
    if address == _ANY_CLUSTER:
        return RequestError(
            f"no Ray cluster runs on this machine, as {address} asks for; start one, or see --address and RAY_ADDRESS"
        )
    if address:
        return JobError(f"Ray does not join {address}: {first_line(error)}; see --address and RAY_ADDRESS")
    if "AF_UNIX path length" in str(error):
        return JobError(
            f"{tempfile.gettempdir()} is too long a name for the directory of Ray's sockets; "
            "set TMPDIR to a shorter one"
        )
    if isinstance(error, UnicodeEncodeError):
        return JobError(
            f"{tempfile.gettempdir()} is a name that Ray cannot use in this locale; set TMPDIR to an ASCII name"
        )
    return None


def _check_gpus(resources: Resources) -> None:
    there = int(ray.cluster_resources().get("GPU", 0))
    if resources.device != "cpu" and there < resources.gpus:
        raise RequestError(f"--gpus {resources.gpus} was asked for, but Ray finds {there}; ask for that many or fewer")


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes, without a word."""
    if address == _ANY_CLUSTER:
        return
    if address.startswith(_CLIENT):  # Ray's client refuses tasks with streams of results, as all of Ray Data's are
        raise RequestError(
            f"Ray Data does not run behind {address}; on a node of the cluster give HOST:PORT or auto, elsewhere use "
            "`ray job submit`"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise RequestError(
            f"{address} is no address of a Ray cluster; give HOST:PORT or auto, or local for a private one, see "
            "--address and RAY_ADDRESS"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(f"no Ray cluster answers at {address} ({error}); see --address and RAY_ADDRESS") from error


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A directory for Ray's sockets and logs; those that killed runs have left go too."""
    for old in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f"{_SCRATCH}*")):
        with contextlib.suppress(OSError), directory_lock(old):
            shutil.rmtree(old, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        folder = _own_folder(stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder(stack: contextlib.ExitStack) -> str:
    """Creates and locks a directory; tries again if another run deleted it as abandoned before the lock."""
    while True:
        folder = tempfile.mkdtemp(prefix=_SCRATCH)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            stack.enter_context(directory_lock(folder))
            if os.path.isdir(folder):
                return folder


@contextlib.contextmanager
def quiet(log: str) -> Iterator[None]:
    """Sends to a file what the engine's libraries print, and write to stderr beside Python.

    What this program writes to `sys.stderr` still gets there; what it has to say on stdout goes to a stream that it has
    kept, see `__main__`.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with (
        open(log, "w") as file,
        open(os.dup(saved), "w", encoding=sys.stderr.encoding, errors="backslashreplace") as stream,
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(file),
    ):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _private_cluster(resources: Resources, folder: str) -> dict[str, Any]:
    # Ray would keep a token in the home directory, readable by all; a token in the environment is kept nowhere.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return {
        "address": "local",
        "num_cpus": worker_count(resources) + _SPARE_CPUS,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": os.path.join(folder, "ray"),  # which Ray opens to everybody; the one around it stays closed
    }
