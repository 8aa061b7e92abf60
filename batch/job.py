"""The pipeline: manifest -> blocks -> actors that score -> parts, with a checkpoint behind each.

`read_parquet` and `write_parquet` stand at the two ends because Ray Data's checkpoint is exact only between them.
"""

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from batch.errors import JobError
from batch.output import Output
from batch.progress import BlockReport, Tally
from batch.scorer import BLOCK_SCHEMA, ScoreOptions, Scorer

__all__ = ["Resources", "score_manifest"]

# Reading, filtering by the checkpoint and writing each hold a logical CPU; with fewer than four a resumed run hangs.
_SPARE_CPUS: Final = 3
_OBJECT_STORE_BYTES: Final = 256 * 2**20
_SCRATCH: Final = "agegender-ray-"
_STARTS: Final = 3
_POLL_S: Final = 0.25
_STUCK_S: Final = 300
_TALLY_S: Final = 5


@dataclass(frozen=True)
class Resources:
    """Where the job runs.

    Attributes:
        address: of a Ray cluster; None starts a private one on this machine.
        workers: actors that score; 0 takes a core each.
        device: where the network runs, see `Predictor`.
    """

    address: str | None = None
    workers: int = 0
    device: str = "cpu"


def score_manifest(
    output: Output,
    options: ScoreOptions,
    model: bytes,
    resources: Resources,
    on_progress: Callable[[BlockReport], None],
) -> None:
    """Scores what the manifest holds and the checkpoint does not, into `output.parts`.

    Args:
        output: a directory with a run that has begun.
        options: what the values depend on.
        model: the artifact.
        resources: where the job runs.
        on_progress: called several times a second, in this thread, with what this call has come to. What it raises
            ends the job.

    Raises:
        JobError: the job cannot go on.
    """
    with _ray(resources):
        tally = _RemoteTally(ray.remote(num_cpus=0)(Tally).remote())
        pipeline = _Pipeline(output, options, model, resources, tally)
        pipeline.start()
        while pipeline.is_alive():
            pipeline.join(_POLL_S)
            if pipeline.is_alive():
                _poll(tally, on_progress)
        if pipeline.error is not None:
            raise JobError(_explain(pipeline.error)) from pipeline.error
        _poll(tally, on_progress)


def _poll(tally: "_RemoteTally", on_progress: Callable[[BlockReport], None]) -> None:
    with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
        on_progress(tally.total())


class _RemoteTally:
    """A `Tally` in an actor of its own, for all to call."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, block: int) -> tuple[bool, list[str]]:
        return cast("tuple[bool, list[str]]", ray.get(self._actor.begin.remote(block)))

    def take(self, block: int, path: str) -> None:
        ray.get(self._actor.take.remote(block, path))

    def report(self, block: int, report: BlockReport, done: bool = False) -> None:
        self._actor.report.remote(block, report, done)

    def total(self) -> BlockReport:
        return cast("BlockReport", ray.get(self._actor.total.remote(), timeout=_TALLY_S))


class _Pipeline(threading.Thread):
    """Runs Ray Data's blocking call aside, so that the main thread can show progress and take Ctrl-C."""

    def __init__(
        self, output: Output, options: ScoreOptions, model: bytes, resources: Resources, tally: _RemoteTally
    ) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._output = output
        self._constructor = {
            "options": options,
            "model": model,
            "device": resources.device,
            "tally": tally,
        }
        self._workers = _worker_count(resources)

    def run(self) -> None:
        try:
            _configure(self._output)
            self._execute()
        except Exception as error:  # the main thread raises it
            self.error = error

    def _execute(self) -> None:
        output = self._output
        blocks = ray.data.read_parquet(output.manifest, filesystem=output.filesystem)
        outcomes = blocks.repartition(target_num_rows_per_block=1).map_batches(
            Scorer,
            fn_constructor_kwargs=self._constructor,
            compute=ActorPoolStrategy(min_size=1, max_size=self._workers),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=1,
        )
        outcomes.write_parquet(output.parts, filesystem=output.filesystem, schema=BLOCK_SCHEMA, compression="zstd")


def _configure(output: Output) -> None:
    checkpoint = CheckpointConfig(
        "block", output.checkpoint, delete_checkpoint_on_success=False, override_filesystem=output.filesystem
    )
    checkpoint.checkpoint_actor_pool_max_size = 1
    checkpoint.checkpoint_actor_memory_bytes = 200 * 2**20
    context = DataContext.get_current()
    context.checkpoint_config = checkpoint
    context.execution_no_progress_timeout_s = _STUCK_S
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _worker_count(resources: Resources) -> int:
    if resources.workers:
        return resources.workers
    if resources.address:
        return max(1, int(ray.cluster_resources().get("CPU", 1)) - _SPARE_CPUS)
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _ray(resources: Resources) -> Iterator[None]:
    """Ray for the duration of a job: a cluster's, or a private one that leaves nothing behind."""
    with _scratch() as folder, _quiet(os.path.join(folder, "engine.log")):
        _start(resources, folder)
        try:
            yield
        finally:
            ray.shutdown()


def _start(resources: Resources, folder: str) -> None:
    """Starts or joins Ray. It gives itself 30 s, which a machine that is busy with other things may not keep."""
    for attempt in range(_STARTS):
        cluster = {"address": resources.address} if resources.address else _private_cluster(resources, folder)
        try:
            ray.init(**cluster, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if resources.address or attempt + 1 == _STARTS:
                raise JobError(f"Ray did not start: {_first_line(error)} Nothing is lost; try again.") from error


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A directory for Ray's sockets and logs; those that killed runs have left go too."""
    for old in glob.glob(os.path.join(tempfile.gettempdir(), f"{_SCRATCH}*")):
        with contextlib.suppress(OSError), _lock(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=_SCRATCH)
    try:
        with _lock(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """Holds a directory as long as this process lives; BlockingIOError if another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet(log: str) -> Iterator[None]:
    """Sends what the engine's libraries write to stderr to a file; what this program writes there still gets there."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(log, "wb") as file, open(os.dup(saved), "w") as stream, contextlib.redirect_stderr(stream):
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
        "num_cpus": _worker_count(resources) + _SPARE_CPUS,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": folder,
    }


def _explain(error: Exception) -> str:
    """The sentence behind the engine's error."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return "the disk is full; free some space and run the same command again to go on"
    return f"the engine stopped: {_last_line(causes[-1])}; what is done stays done"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
