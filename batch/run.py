"""One run from its request to its summary: look first, list, score, publish."""

import contextlib
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from typing import Final

import pyarrow.parquet as pq

from batch.errors import JobError, OutputError, RequestError, SourceError, TooManyBadError, reason_of
from batch.listing import KNOWN, Input, Listing, blocks_of, digest
from batch.location import normalize
from batch.output import Output, Run, now
from batch.progress import BlockReport, Progress, bad_count
from batch.request import Request, same_command
from batch.summary import bad_text, summary_text

# What takes seconds to import is imported where it is needed: a wrong call is answered before. This process has no use
# for torch at all; those that score import it.

__all__ = ["run_batch"]

_MIDDLE: Final = (0.1, 0.9)

# A worker may outlive a killed driver and commit a block whose outcomes the next run has just deleted. The gap shows at
# the end; a second round fills it.
_ROUNDS: Final = 2

# Of these the outcomes' last bits may depend.
_LIBRARIES: Final = ("numpy", "onnxruntime", "opencv-python-headless", "pillow", "torch")

# Of the core, what shapes no outcome.
_NOT_OUTCOMES: Final = ("__main__.py", "client.py", "draw.py")


@dataclass(frozen=True)
class _Job:
    """What a call has to do.

    Attributes:
        request: what the caller asks for.
        output: where the outcomes go.
        listing: of the sources.
        wanted: what the run is, but for its inputs.
        model: the artifact.
        say: takes each message to people.
        started: when the call began, `time.monotonic`.
    """

    request: Request
    output: Output
    listing: Listing
    wanted: Run
    model: bytes
    say: Callable[[str], None]
    started: float


def run_batch(request: Request, say: Callable[[str], None]) -> None:
    """Does what is asked for, or what is left of it.

    Args:
        request: what the caller asks for.
        say: takes each message to people.

    Raises:
        SourceError: a source cannot be used.
        OutputError: the output cannot be used as asked.
        RequestError: the model cannot be loaded, or an option is out of its range.
        JobError: the engine did not start, or stopped.
        TooManyBadError: see `Request.max_bad`.
        KeyboardInterrupt: it was interrupted; once there is something to go on with, it says how.
    """
    started = time.monotonic()
    output = Output(normalize(request.out))
    sources = [normalize(source, may_match=True) for source in request.sources]
    listing = Listing(sources, output.name, request.follow_links)
    listing.check()
    output.check_ours()
    wanted, model = _identify(request, listing)  # tells of wrong options before anything is listed or written
    job = _Job(request, output, listing, wanted, model, say, started)
    if request.dry_run:
        _preview(job)
        return
    output.check_writable()
    run: Run | None = None
    with (
        _told(lambda: same_command(request.mode) if run else "the same command"),
        output.locked(),
        ThreadPoolExecutor(1) as aside,
        _engine(request, output, aside),
    ):
        run = _settle(job)
        if run is not None:
            _finish(job, run)


def _preview(job: _Job) -> None:
    """Tells what the call would do, or refuses it as that would; only reads."""
    mode, output = job.request.mode, job.output
    unfinished, finished = (None, None) if mode == "overwrite" else _earlier(job)
    if finished is not None and mode == "resume":
        _tell_finished(job)
        return
    if unfinished is not None:
        job.say(
            f"The call would go on with the run of {unfinished.created} ({unfinished.inputs:,} files); "
            "what is done of it is not taken off the figures below."
        )
    from batch.preview import preview

    adds = mode == "append" or (unfinished is not None and unfinished.first_id > 0)
    preview(job.request, job.listing, _known(output)[0] if adds else None, job.say)


@contextlib.contextmanager
def _told(command: Callable[[], str]) -> Iterator[None]:
    """Says which command goes on after an interrupt, and after what a disk or an object store refuses in the middle."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{command()} goes on from here") from None
    except OSError as error:
        raise JobError(f"{reason_of(error)}; {_stays(command())}") from error


def _stays(command: str) -> str:
    return f"what is done stays done, and {command} goes on"


def _engine(request: Request, output: Output, aside: Executor) -> contextlib.AbstractContextManager[None]:
    """Ray, unless it can have nothing to do; what else the job needs is imported while it starts."""
    finished = request.mode == "resume" and output.run() is None and output.finished() is not None
    if finished:
        return contextlib.nullcontext()
    from batch.engine import running_engine

    aside.submit(import_module, "batch.job")
    return running_engine(request.resources)


def _identify(request: Request, listing: Listing) -> tuple[Run, bytes]:
    """What the run is, but for its inputs; looks at model and options, to fail before anything has begun."""
    from agegender import AgeGenderError
    from agegender.spec import read_artifact

    try:
        spec, model = read_artifact(request.model)
        request.options.check()
    except (AgeGenderError, ValueError) as error:
        raise RequestError(str(error)) from error
    run = Run(
        id=secrets.token_hex(4),
        created=now(),
        version=f"{version('agegender')}+{_code_digest()}",
        model=spec.identity(hashlib.sha256(model).hexdigest()),
        options={**request.options.affecting_outcomes(), "follow_links": request.follow_links, "gpus": _gpus(request)},
        sources=list(listing.sources),
        inputs=0,
        blocks=0,
        libraries={name: version(name) for name in _LIBRARIES},
    )
    return run, model


def _gpus(request: Request) -> str | None:
    """Where processes predict for others, as far as the last bits depend on it; None where each does so for itself."""
    return request.resources.device if request.resources.gpus else None


def _code_digest() -> str:
    """Eight digits of the code that the outcomes come from: the core, and what reads files and scores them here."""
    core = [each for each in files("agegender").iterdir() if each.name.endswith(".py")]
    sources = [each for each in core if each.name not in _NOT_OUTCOMES]
    sources += [files("batch") / name for name in ("gpu.py", "location.py", "scorer.py")]
    combined = hashlib.sha256()
    for source in sorted(sources, key=str):
        combined.update(source.read_bytes())
    return combined.hexdigest()[:8]


def _settle(job: _Job) -> Run | None:
    """The run to work on: the one that was interrupted, or a new one; None if nothing is left to do."""
    output = job.output
    if job.request.mode == "overwrite":
        return _begin_anew(job)
    unfinished, finished = _earlier(job)
    if unfinished is not None:
        output.reopen()
        job.say(f"Going on with the run of {unfinished.created} ({unfinished.inputs:,} files).")
        return unfinished
    if finished is None:
        return _begin_anew(job)
    if job.request.mode == "append":
        return _append(job, finished)
    output.clear_run()
    _tell_finished(job)
    return None


def _earlier(job: _Job) -> tuple[Run | None, Run | None]:
    """The unfinished run that the output holds or else the finished one, if the call may go on with it; only reads."""
    output, wanted = job.output, job.wanted
    if (unfinished := output.run()) is not None:
        replaced = "it and all that it was to be added to" if unfinished.first_id else "it"
        _require_same(output, unfinished, wanted, "an unfinished run", replaced)
        return unfinished, None
    finished = output.finished()
    if finished is not None:
        sources = finished.sources if job.request.mode == "append" else wanted.sources
        _require_same(output, finished, replace(wanted, sources=sources), "a finished run")
    elif output.files():
        raise OutputError(
            f"{output.name} holds results of a run that is not there any more; "
            "give another output directory, or --overwrite to replace them"
        )
    return None, finished


def _tell_finished(job: _Job) -> None:
    summary = job.output.summary()
    job.say(summary_text(summary, job.output.name))
    job.say(
        f"Nothing to do: this run was finished at {summary['finished']}. "
        "To score files that came later, add --append; to start anew, --overwrite."
    )


def _begin_anew(job: _Job) -> Run:
    """A run from the beginning. What was there goes when all sources have been listed, and not when one fails."""
    output, listing = job.output, job.listing
    if output.run() is None:
        output.clear_run()  # of listings that were killed
    if (run := _list(job, job.wanted)) is None:
        left_out = ", ".join(f"{count:,} ({reason})" for reason, count in listing.excluded.items())
        hint = f"left out were {left_out}" if left_out else "check the name, or give another source"
        raise SourceError(f"found no files in {', '.join(listing.sources)}; {hint}")
    output.clear(but=run)
    output.begin(run)
    return run


def _require_same(output: Output, old: Run, wanted: Run, what: str, replaced: str = "it") -> None:
    if (difference := old.difference(wanted)) is not None:
        raise OutputError(
            f"{output.name} holds {what} of another kind: {difference}; "
            f"give another output directory, or --overwrite to replace {replaced}"
        )


def _append(job: _Job, finished: Run) -> Run | None:
    output, wanted = job.output, job.wanted
    output.clear_run()  # of a run that ended while it tidied up, or while it listed
    known, first_id = _known(output)
    sources = [*finished.sources, *(source for source in wanted.sources if source not in finished.sources)]
    first_id = max(first_id, output.summary()["inputs"])  # even if files of the output were taken away
    excluded = _left_out_before(finished, job.listing)
    run = _list(job, replace(wanted, sources=sources, first_id=first_id, excluded=excluded), known)
    if run is None:
        job.say(f"Nothing to add: all files in {', '.join(job.listing.sources)} are in the output.")
    else:
        output.begin(run)
    return run


def _left_out_before(finished: Run, listing: Listing) -> dict[str, int]:
    """What a finished run has left out, unless the listing that adds to it counts all of that again."""
    again = set(finished.sources) <= set(listing.sources)
    return {} if again else finished.excluded or {}


def _known(output: Output) -> tuple[set[bytes], int]:
    """Digests of the names in the output, and the first number beyond those of its inputs."""
    known: set[bytes] = set()
    first_id = 0
    for batch in output.batches(["path", "id"]):
        known.update(digest(name) for name in batch["path"].to_pylist())
        first_id = max(first_id, 1 + max(batch["id"].to_pylist(), default=-1))
    return known, first_id


def _list(job: _Job, run: Run, known: set[bytes] | None = None) -> Run | None:
    """Lists the sources into the run's manifest, of which nothing stays if that fails; None if they hold nothing.

    Args:
        job: the job.
        run: what the run is, but for its inputs; `excluded` is of listings before.
        known: see `Listing.inputs`.
    """
    job.say(f"Listing {', '.join(job.listing.sources)}")
    try:
        inputs, blocks = _write_manifest(job.output, run, job.listing.inputs(known))
    except BaseException:
        with contextlib.suppress(OSError, JobError):  # what ended the listing is told
            job.output.drop(run)
        raise
    if not inputs:
        job.output.drop(run)
        return None
    excluded = Counter(run.excluded or {}) + job.listing.excluded
    there = excluded.pop(KNOWN, 0)
    job.say(f"Found {inputs:,} files" + (f"; {there:,} others are in the output already." if there else "."))
    return replace(run, inputs=inputs, blocks=blocks, excluded=dict(excluded))


def _write_manifest(output: Output, run: Run, inputs: Iterable[Input]) -> tuple[int, int]:
    """Returns how many inputs it holds, and in how many blocks."""
    manifest = output.manifest(run)
    output.filesystem.create_dir(manifest, recursive=True)
    count = blocks = 0
    for number, shard in enumerate(blocks_of(inputs, first_id=run.first_id)):
        path = f"{manifest}/blocks-{number:05}.parquet"
        with output.filesystem.open_output_stream(path) as stream:
            pq.write_table(shard, stream, row_group_size=64)
        output.sync(path)
        count += sum(len(paths) for paths in shard["paths"].to_pylist())
        blocks += shard.num_rows
    return count, blocks


def _finish(job: _Job, run: Run) -> None:
    """Scores what is left, puts the outcomes into place and tells of them."""
    from batch.publish import check_counted, committed_parts, describe, publish

    output = job.output
    parts, counts = committed_parts(output, run)
    if counts.inputs:
        job.say(f"{counts.inputs:,} of {run.inputs:,} files were done before.")
    before, watch, rounds = counts.inputs, _Watch(run, counts.statuses, job.request), 0
    while counts.inputs < run.inputs and rounds < _ROUNDS:
        watch.begin(counts.statuses)
        _score(job, run, watch)
        parts, counts = committed_parts(output, run)
        rounds += 1
    watch.judge(counts.statuses)
    publish(output, run, parts)
    ended = time.monotonic()
    counted = describe(output)
    check_counted(output, run, counted["inputs"])
    summary = {
        **counted,
        "seconds": round(ended - job.started, 3),
        "startup_s": round(watch.startup_s(job.started), 3),
        "images_per_s": round(watch.images_per_s(counts.inputs - before, ended), 2),
        "steady_images_per_s": round(watch.steady_images_per_s(), 2),
        "stages_s": {stage: round(value, 3) for stage, value in watch.report.stages_s.items()},
        "slowest": [{"path": path, "seconds": round(value, 4)} for value, path in watch.report.slowest],
        "finished": now(),
        "run": asdict(run),
    }
    output.finish(summary)
    job.say(summary_text(summary, output.name))


def _score(job: _Job, run: Run, watch: "_Watch") -> None:
    from batch.job import score_manifest

    request = job.request
    try:
        score_manifest(job.output, run, request.options, job.model, request.resources, watch.see)
    except JobError as error:
        raise JobError(f"{error}; {_stays(same_command(request.mode))}") from error
    finally:
        watch.close()


class _Watch:
    """Shows the progress of a run, and stops it when too much fails."""

    def __init__(self, run: Run, before: Counter[str], request: Request) -> None:
        self._run = run
        self._before = before
        self._max_bad = request.max_bad
        self._same_command = same_command(request.mode)
        self._statuses: Counter[str] = before.copy()
        self._progress = Progress(run.inputs, before=sum(before.values()))
        self._earlier = BlockReport()
        self._first: tuple[float, int] | None = None  # when there were results, and how many
        self._middle: dict[float, tuple[float, int]] = {}  # the same, when that share of what was left to do was done
        self.report = BlockReport()

    def begin(self, before: Counter[str]) -> None:
        """A round begins, with these outcomes so far. Times and speeds are of all rounds together."""
        self._before, self._earlier = before, self.report

    def see(self, report: BlockReport) -> None:
        """Takes what this round has come to so far."""
        self.report = BlockReport()
        for each in (self._earlier, report):
            self.report.add(each)
        scored, total = sum(report.statuses.values()), self._run.inputs - sum(self._before.values())
        if scored and self._first is None:
            self._first = time.monotonic(), scored
        for share in _MIDDLE:
            if scored >= share * total:
                self._middle.setdefault(share, (time.monotonic(), scored))
        self._statuses = self._before + report.statuses
        self._progress.show(sum(self._statuses.values()), bad_count(self._statuses))
        self.judge(self._statuses)

    def close(self) -> None:
        self._progress.close(sum(self._statuses.values()), bad_count(self._statuses))

    def startup_s(self, started: float) -> float:
        return self._first[0] - started if self._first else 0.0

    def images_per_s(self, done: int, ended: float) -> float:
        """Speed after the first results, of which none counts for it."""
        if self._first is None:
            return 0.0
        since, first = self._first
        return (done - first) / max(ended - since, 1e-3)

    def steady_images_per_s(self) -> float:
        """Speed between a tenth and nine tenths of the work: all workers run, and none has ended; 0 if not known."""
        if len(self._middle) < len(_MIDDLE):
            return 0.0
        (began, first), (ended, last) = (self._middle[share] for share in _MIDDLE)
        return (last - first) / (ended - began) if ended > began else 0.0

    def judge(self, statuses: Counter[str]) -> None:
        """Ends the run once its limit cannot be met any more. Inputs come sorted, and those so far are no sample."""
        inputs = self._run.inputs
        if self._max_bad is not None and _exceeds(self._max_bad, bad_count(statuses), inputs):
            raise TooManyBadError(
                f"stopped after {sum(statuses.values()):,} inputs: {bad_text(statuses, inputs)}, more than "
                f"--max-bad {self._max_bad} allows; {self._same_command} with a higher --max-bad goes on from here"
            )


def _exceeds(max_bad: str, bad: int, inputs: int) -> bool:
    if max_bad.endswith("%"):
        return bad * 100 > Fraction(max_bad[:-1]) * inputs
    return bad > int(max_bad)
