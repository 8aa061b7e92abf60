"""The actor: a block of names in, its records out. Whatever an input does, it gets its records."""

import faulthandler
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from agegender import AgeGenderError, ImageResult, Item
from agegender.image import quiet_pillow
from agegender.process import keep_freed_memory
from agegender.records import arrow_schema, to_rows
from batch.gpu import BATCH_SIZE, RemoteModel
from batch.location import FileTooLargeError, read_bytes
from batch.progress import BlockReport, Listener
from batch.request import ScoreOptions

if TYPE_CHECKING:
    from agegender import Predictor

__all__ = ["BLOCK_SCHEMA", "Scorer", "score"]

# What Ray writes: the final columns, and the block that its checkpoint speaks of.
BLOCK_SCHEMA: Final = pa.schema([pa.field("block", pa.int64()), pa.field("id", pa.int64()), *arrow_schema()])

_REPORT_EVERY_S: Final = 0.5

# More than any image takes, or half a gigabyte at a megabyte a second. Where Python takes it by the clock on the wall,
# as on macOS, a machine that sleeps that long ends its processes too, and their blocks are done again.
_STUCK_S: Final = 600

_DIED: Final = "the process that worked on this file died, each time"


class Scorer:
    """Loads the chain once, then scores blocks of the manifest."""

    def __init__(self, options: ScoreOptions, model: bytes | list[Any], tally: Listener) -> None:
        """Loads the chain.

        Args:
            options: what the values depend on.
            model: the artifact, with which this process predicts; or actors that do, see `start_models`.
            tally: is told of what is done.
        """
        quiet_pillow()
        keep_freed_memory()
        self._max_bytes = options.max_bytes
        self._tally = tally
        self._report = BlockReport()
        self._input_s: dict[str, float] = {}
        self._input = ""
        self._told = 0.0
        predictor = partial(options.predictor, threads=1, on_stage=self._on_stage)
        if isinstance(model, bytes):
            self._predictor = predictor(model, device="cpu")
        else:
            self._predictor = predictor(RemoteModel(model), batch_size=BATCH_SIZE)

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """Rows of `batch.listing.MANIFEST_SCHEMA` -> rows of `BLOCK_SCHEMA`."""
        try:
            rows = [row for block in blocks.to_pylist() for row in self._score(block)]
        finally:
            faulthandler.cancel_dump_traceback_later()
        return pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA)

    def _score(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # The network's last bits depend on which faces share a batch. Blocks never do, so a run that was interrupted
        # gives the same bits as one that was not.
        number, paths = block["block"], block["paths"]
        careful, fatal = self._tally.begin(number)
        errors = [_DIED if path in fatal else error for path, error in zip(paths, block["errors"], strict=True)]
        self._report, self._input_s = BlockReport(), {}
        self._told = time.monotonic()
        self._stay_alive()
        results = score(self._predictor, paths, errors, lambda path: self._read(number, path, careful))
        for id_, result in enumerate(results, block["first_id"]):
            first = not self._report.statuses
            self._report.statuses[result.status] += 1
            yield from ({"block": number, "id": id_, **row} for row in to_rows(result))
            self._tell(number, at_once=first)
        self._report.add(BlockReport(slowest=[(seconds, path) for path, seconds in self._input_s.items()]))
        self._tally.report(number, self._report, done=True)

    def _tell(self, block: int, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._told > _REPORT_EVERY_S:
            self._tally.report(block, self._report)
            self._told = time.monotonic()
            self._stay_alive()

    def _stay_alive(self) -> None:
        """Puts off the end of this process, which is all that helps where an input makes it stand still."""
        faulthandler.dump_traceback_later(_STUCK_S, exit=True)

    def _read(self, block: int, path: str, careful: bool) -> bytes:
        if careful:
            self._tally.take(block, path)
        self._input = path
        started = time.perf_counter()
        try:
            return read_bytes(path, max_bytes=self._max_bytes)
        finally:
            self._on_stage("read", time.perf_counter() - started)
            self._tell(block)  # results may be long in coming; see batch.job

    def _on_stage(self, stage: str, seconds: float) -> None:
        stages_s = self._report.stages_s
        stages_s[stage] = stages_s.get(stage, 0.0) + seconds
        if stage == "predict":
            self._stay_alive()  # a model that is elsewhere has suspended that
        else:  # predicting is of many inputs together
            self._input_s[self._input] = self._input_s.get(self._input, 0.0) + seconds


def score(
    predictor: "Predictor", paths: Sequence[str], errors: Sequence[str | None], read: Callable[[str], bytes]
) -> Iterator[ImageResult]:
    """Names -> results, one for each and in order; a file that cannot be read has a result too.

    Args:
        predictor: the chain.
        paths: names of the inputs.
        errors: what is already known to be wrong with each, or None.
        read: name -> bytes.
    """
    unread: dict[int, ImageResult] = {}

    def items() -> Iterator[Item]:
        for position, (path, error) in enumerate(zip(paths, errors, strict=True)):
            try:
                data = _read_unless(error, path, read)
            except (OSError, ValueError, MemoryError, AgeGenderError, pa.ArrowException) as failure:
                unread[position] = _unread(path, failure)
                data = b""  # keeps its place; its result is replaced
            yield Item(data, path)

    for position, result in enumerate(predictor.stream(items())):
        yield unread.pop(position, result)


def _read_unless(error: str | None, path: str, read: Callable[[str], bytes]) -> bytes:
    if error == _DIED:
        raise AgeGenderError(error)
    if error is not None:
        raise OSError(0, error)
    return read(path)


def _unread(path: str, failure: Exception) -> ImageResult:
    if isinstance(failure, FileTooLargeError):
        return ImageResult(path, "too_large", str(failure))
    known = isinstance(failure, (AgeGenderError, OSError, MemoryError))
    return ImageResult.from_error(path, failure if known else OSError(0, str(failure)))
