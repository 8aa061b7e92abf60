"""The pipeline: manifest -> blocks -> actors that score -> parts, with a checkpoint behind each.

`read_parquet` and `write_parquet` stand at the two ends because Ray Data's checkpoint is exact only between them.
"""

import contextlib
import ctypes
import errno
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch.engine import worker_count
from batch.errors import JobError, reason_of
from batch.gpu import start_models
from batch.listing import shard_count
from batch.output import Output, Run
from batch.progress import BlockReport, Tally
from batch.request import Resources, ScoreOptions
from batch.scorer import BLOCK_SCHEMA, Scorer

__all__ = ["score_manifest"]

# How often the tally is asked, before the first result and after it.
_FIRST_POLL_S, _POLL_S = 0.25, 1.0

_STUCK_S: Final = 3600  # an input on which processes stand still is given up before, see `batch.scorer`
_TALLY_S: Final = 5
_STOP_S: Final = 5

# Ray ends with advice on retries; what it quotes of the other process stands before these words of Python's.
_ADVICE: Final = "To change retry attempts"
_DIRECT_CAUSE: Final = "The above exception was the direct cause"

# With chips they fill two or three of the large blocks a second, and a task that writes one to a disk takes 0.03 s. The
# rest of the second is for slower stores.
_WORKERS_PER_WRITER: Final = 8


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as error:
        raise JobError(_explain(error)) from error


@_explained()
def score_manifest(
    output: Output,
    run: Run,
    options: ScoreOptions,
    model: bytes,
    resources: Resources,
    on_progress: Callable[[BlockReport], None],
) -> None:
    """Scores what the manifest holds and the checkpoint does not, into its parts. Ray must be up.

    Args:
        output: a directory with a run that has begun.
        run: the run.
        options: what the values depend on.
        model: the artifact.
        resources: where the job runs.
        on_progress: called once a second or more often, in this thread, with what this call has come to. What it
            raises ends the job.

    Raises:
        JobError: the job cannot go on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lives as long as we do
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
    tally = _RemoteTally(lasting(Tally).remote())
    pipeline = _Pipeline(output, run, options, model, resources, tally)
    pipeline.start()
    patience = _Patience()
    report: BlockReport | None = None
    try:
        while not pipeline.ended.wait(_POLL_S if report and report.statuses else _FIRST_POLL_S):
            report = _poll(tally, on_progress)
            patience.look(report)
    finally:
        pipeline.stop()
    if pipeline.error is not None:
        raise JobError(_explain(pipeline.error)) from pipeline.error
    _poll(tally, on_progress)


def _poll(tally: "_RemoteTally", on_progress: Callable[[BlockReport], None]) -> BlockReport | None:
    try:
        report = tally.total()
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return None
    on_progress(report)
    return report


class _Patience:
    """Ends a job that stands still, as one does for which a cluster has no processors.

    Ray Data's own guard counts blocks, and one of large images may take longer than any limit that would help.
    """

    def __init__(self) -> None:
        self._last: BlockReport | None = None
        self._since = time.monotonic()

    def look(self, report: BlockReport | None) -> None:
        """Takes what the job has come to; None where that is not known.

        Raises:
            JobError: for an hour no input was read and none was done.
        """
        if report != self._last:
            self._last, self._since = report, time.monotonic()
        elif time.monotonic() - self._since > _STUCK_S:
            raise JobError(f"no input was read or done for {_STUCK_S // 60} minutes")


class _RemoteTally:
    """A `Tally` in an actor of its own, for all to call. When it dies, another begins to count anew."""

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
        self,
        output: Output,
        run: Run,
        options: ScoreOptions,
        model: bytes,
        resources: Resources,
        tally: _RemoteTally,
    ) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self.ended = threading.Event()  # Python before 3.13 takes a thread for ended when a join with it is interrupted
        self._output = output
        self._run = run
        self._constructor = {"options": options, "model": model, "tally": tally}
        if resources.gpus:
            self._model = ray.put(model)  # processes that start again need it as long as the job goes on
            self._constructor["model"] = start_models(self._model, resources)
        self._workers = min(worker_count(resources), run.blocks)  # each takes seconds of a processor to start

    def run(self) -> None:
        try:
            _configure(self._output, self._run)
            self._execute()
        except Exception as error:  # the main thread raises it
            self.error = error
        finally:
            self.ended.set()

    def stop(self) -> None:
        """Ends Ray Data's call, if it has not ended: threads that outlive Ray would start another one."""
        if not self.ended.is_set():
            # There is no other way into a call that blocks; in CPython's C API.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(SystemExit))
            self.ended.wait(_STOP_S)

    def _execute(self) -> None:
        output = self._output
        # A task for each shard, one at a time, and few that write: Ray starts processes for more, each of which takes a
        # second of a processor just when the workers load the network.
        blocks = ray.data.read_parquet(
            output.manifest(self._run),
            filesystem=output.filesystem,
            partitioning=None,
            override_num_blocks=shard_count(self._run.inputs),
            concurrency=1,
        )
        outcomes = blocks.repartition(target_num_rows_per_block=1).map_batches(
            Scorer,
            fn_constructor_kwargs=self._constructor,
            compute=ActorPoolStrategy(min_size=1, initial_size=self._workers, max_size=self._workers),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=1,
        )
        parts = output.parts(self._run)
        writers = math.ceil(self._workers / _WORKERS_PER_WRITER)
        outcomes.write_parquet(
            parts, filesystem=output.filesystem, schema=BLOCK_SCHEMA, compression="zstd", concurrency=writers
        )


def _configure(output: Output, run: Run) -> None:
    checkpoint = CheckpointConfig(
        "block", output.checkpoint(run), delete_checkpoint_on_success=False, override_filesystem=output.filesystem
    )
    checkpoint.checkpoint_actor_pool_max_size = 1
    checkpoint.checkpoint_actor_memory_bytes = 200 * 2**20
    context = DataContext.get_current()
    context.checkpoint_config = checkpoint
    context.use_datasource_v2 = False  # which starts more processes than the manifest has files, seconds each
    context.target_max_block_size = None  # or a block of many outcomes is cut, and only its first piece counts
    context.execution_no_progress_timeout_s = -1  # see _Patience
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, and told in a sentence


def _explain(error: Exception) -> str:
    """The sentence behind the engine's error."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return reason_of(cause)
    telling = ([cause for cause in causes if str(cause).strip()] or causes)[-1]
    line = _last_line(str(telling))
    if line.startswith(_ADVICE):
        line = _last_line(str(error).rpartition(_DIRECT_CAUSE)[0]) or line
    return f"the engine stopped: {line.rstrip('.') or type(telling).__name__}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
