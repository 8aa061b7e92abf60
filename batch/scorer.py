"""The actor: a block of names in, its records out. Whatever an input does, it gets its records."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import pyarrow as pa

from agegender import AgeGenderError, ImageResult, Item, Predictor
from agegender.records import arrow_schema, to_rows
from batch.location import read_bytes

__all__ = ["BLOCK_SCHEMA", "ScoreOptions", "Scorer"]

# What Ray writes: the final columns, and the block that its checkpoint speaks of.
BLOCK_SCHEMA: Final = pa.schema([pa.field("block", pa.int64()), pa.field("id", pa.int64()), *arrow_schema()])

_REPORT_EVERY_S: Final = 0.5


@dataclass(frozen=True)
class ScoreOptions:
    """What the values depend on, beside the model.

    Attributes:
        faces: see `Predictor`.
        min_score: see `Predictor`.
        max_faces: see `Predictor`.
        max_pixels: see `Predictor`.
        max_bytes: a larger file is not read.
    """

    faces: Literal["detect", "whole"] = "detect"
    min_score: float = 0.6
    max_faces: int = 100
    max_pixels: int = 100_000_000
    max_bytes: int = 512_000_000


class Scorer:
    """Loads the chain once, then scores blocks of the manifest."""

    def __init__(self, options: ScoreOptions, model: bytes, device: str, tally: Any) -> None:
        """Loads the chain.

        Args:
            options: what the values depend on.
            model: the artifact, which travels with the job so that no node needs the file.
            device: where the network runs, see `Predictor`.
            tally: handle of a `batch.progress.Tally` actor.
        """
        self._options = options
        self._tally = tally
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            file.write(model)
            file.flush()
            self._predictor = Predictor(
                file.name,
                faces=options.faces,
                min_score=options.min_score,
                max_faces=options.max_faces,
                max_pixels=options.max_pixels,
                device=device,
                threads=1,
            )

    def __call__(self, blocks: pa.Table) -> pa.Table:
        """Rows of `batch.listing.MANIFEST_SCHEMA` -> rows of `BLOCK_SCHEMA`."""
        rows = [row for block in blocks.to_pylist() for row in self._score(block)]
        return pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA)

    def _score(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # The network's last bits depend on which faces share a batch. Blocks never do, so a run that was interrupted
        # gives the same bits as one that was not.
        results = score(self._predictor, block["paths"], block["errors"], max_bytes=self._options.max_bytes)
        statuses: Counter[str] = Counter()
        reported = time.monotonic()
        for number, result in enumerate(results, block["first_id"]):
            statuses[result.status] += 1
            yield from ({"block": block["block"], "id": number, **row} for row in to_rows(result))
            if time.monotonic() - reported > _REPORT_EVERY_S:
                self._tally.report.remote(block["block"], dict(statuses))
                reported = time.monotonic()
        self._tally.report.remote(block["block"], dict(statuses), done=True)


def score(predictor: Predictor, paths: list[str], errors: list[str | None], *, max_bytes: int) -> Iterator[ImageResult]:
    """Names -> results, one for each and in order; a file that cannot be read has a result too.

    Args:
        predictor: the chain.
        paths: names of the inputs.
        errors: what the listing already found wrong with each, or None.
        max_bytes: a larger file is not read.
    """
    unread: dict[int, ImageResult] = {}

    def items() -> Iterator[Item]:
        for position, (path, error) in enumerate(zip(paths, errors, strict=True)):
            try:
                if error is not None:
                    raise OSError(0, error)
                item = Item(read_bytes(path, max_bytes=max_bytes), path)
            except (OSError, ValueError, AgeGenderError, pa.ArrowException) as failure:
                unread[position] = _unread(path, failure)
                item = Item(b"", path)  # keeps its place; its result is replaced
            yield item

    for position, result in enumerate(predictor.stream(items())):
        yield unread.pop(position, result)


def _unread(path: str, failure: Exception) -> ImageResult:
    known = isinstance(failure, (AgeGenderError, OSError))
    return ImageResult.from_error(path, failure if known else OSError(0, str(failure)))
