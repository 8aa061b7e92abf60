"""Parts -> final files: each committed outcome once, sorted, in files of a sensible size, and a summary of them."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from agegender.records import arrow_schema
from batch.errors import IncompleteError
from batch.output import Output, Run
from batch.scorer import BLOCK_SCHEMA
from batch.summary import Counts

__all__ = ["FINAL_SCHEMA", "Part", "check_counted", "committed_parts", "describe", "publish"]

FINAL_SCHEMA: Final = pa.schema([pa.field("id", pa.int64(), metadata={"doc": "number of the input"}), *arrow_schema()])

# About 30 MB compressed, and 100 MB in memory.
_ROWS_PER_FILE: Final = 500_000


@dataclass(frozen=True)
class Part:
    """A file that Ray has written and committed.

    Attributes:
        path: of the file.
        blocks: the blocks in it that no part before it has.
    """

    path: str
    blocks: frozenset[int]


def committed_parts(output: Output, run: Run) -> tuple[list[Part], Counts]:
    """Finds the parts of a run that count, deletes what else is beside them, and counts the outcomes so far.

    A part counts if its checkpoint is committed and both are whole; a block counts once. Ray writes neither file in
    one step, nor to disk before it goes on, so after a crash each may be there in pieces.

    Raises:
        OSError: one cannot be read; nothing is deleted on that account.
    """
    parts: list[Part] = []
    counts = Counts()
    seen: set[int] = set()
    orphans: dict[str, list[fs.FileInfo]] = defaultdict(list)
    for info in output.list(output.parts(run)):
        orphans[info.base_name.rpartition("-")[0]].append(info)  # STEM-0.parquet belongs to STEM.parquet
    for info in output.list(output.checkpoint(run)):
        stem = info.base_name.removesuffix(".parquet")
        files = orphans.get(stem, [])
        table = _read_part(output, info.path, [file.path for file in files])
        if table is None:
            output.remove(info)
            continue
        del orphans[stem]
        blocks = frozenset(table["block"].unique().to_pylist()) - seen
        seen |= blocks
        counts.add(_of_blocks(table, blocks))
        parts.extend([Part(files[0].path, blocks)] if blocks else [])
    for info in itertools.chain.from_iterable(orphans.values()):
        output.remove(info)
    return parts, counts


def _read_part(output: Output, checkpoint: str, files: list[str]) -> pa.Table | None:
    """The part behind a checkpoint, or None if it does not count."""
    if checkpoint.endswith(".pending.parquet") or len(files) != 1:
        return None
    checkpoint_bytes, part_bytes = output.read_bytes(checkpoint), output.read_bytes(files[0])
    try:
        committed = pq.read_table(pa.BufferReader(checkpoint_bytes), columns=["block"])["block"]
        table = pq.read_table(pa.BufferReader(part_bytes), schema=BLOCK_SCHEMA)
    except (OSError, pa.ArrowException):  # not of the disk, which has given all it had
        return None
    return table if committed.equals(table["block"]) else None


def _of_blocks(table: pa.Table, blocks: frozenset[int]) -> pa.Table:
    return table.filter(pc.is_in(table["block"], pa.array(sorted(blocks), pa.int64())))


def publish(output: Output, run: Run, parts: list[Part]) -> None:
    """Writes the final files, first aside, then all into place.

    A call that stood still, and whose place another one took, may go on at any moment. So it touches only what was
    there when it began and what it wrote itself; and the same parts give files of the same names and bytes.

    Args:
        output: a directory with a run.
        run: the run.
        parts: what it has come to.

    Raises:
        IncompleteError: an input has no outcome, and nothing is in place then; or what was put into place is not there.
    """
    staging = output.new_staging()
    sizes = _stage(output, run, parts, staging)
    for name in sizes:
        output.check_held()
        output.filesystem.move(f"{staging}/{name}", output.path(name))
    output.sync(output.base)
    own = {info.base_name: info for info in output.list() if info.base_name.startswith(f"faces-{run.id}-")}
    if {name: info.size for name, info in own.items() if name in sizes} != sizes:
        raise IncompleteError(
            f"files that were put into {output.name} are not there; the same command without --overwrite puts them back"
        )
    for name in own.keys() - sizes.keys():  # of a call that ended while it moved others
        output.remove(own[name])


def _stage(output: Output, run: Run, parts: list[Part], staging: str) -> dict[str, int]:
    """Writes the final files aside; returns their names and sizes in bytes."""
    sizes: dict[str, int] = {}
    seen = np.zeros(run.inputs, bool)
    metadata = _file_metadata(run)
    for number, table in enumerate(_tables(output, parts)):
        places = table["id"].to_numpy() - run.first_id
        if places.min() < 0 or places.max() >= run.inputs:
            raise IncompleteError(f"{output.name} holds outcomes of another run; --overwrite starts anew")
        seen[places] = True
        name = f"faces-{run.id}-{number:05}.parquet"
        with output.filesystem.open_output_stream(f"{staging}/{name}") as stream:
            pq.write_table(table.replace_schema_metadata(metadata), stream, compression="zstd")
            sizes[name] = stream.tell()
        output.sync(f"{staging}/{name}")
    if not seen.all():
        raise IncompleteError(
            f"{np.count_nonzero(~seen)} of {run.inputs} inputs have no outcome; the same command without --overwrite "
            "does them, and --overwrite starts anew"
        )
    return sizes


def _file_metadata(run: Run) -> dict[str, str]:
    """What each final file says of its origin."""
    return {
        "agegender.version": run.version,
        "agegender.model": json.dumps(run.model),
        "agegender.options": json.dumps(run.options),
        "agegender.run": run.id,
        "agegender.created": run.created,
    }


def _tables(output: Output, parts: list[Part]) -> Iterator[pa.Table]:
    """The rows of all parts, in tables of about `_ROWS_PER_FILE` that are sorted by input and face."""
    tables: list[pa.Table] = []
    rows = 0
    for part in sorted(parts, key=lambda part: min(part.blocks)):
        with output.filesystem.open_input_file(part.path) as file:
            tables.append(_of_blocks(pq.read_table(file, schema=BLOCK_SCHEMA), part.blocks))
        rows += tables[-1].num_rows
        if rows >= _ROWS_PER_FILE:
            yield _sorted(tables)
            tables, rows = [], 0
    if tables:
        yield _sorted(tables)


def _sorted(tables: list[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(tables).sort_by([("id", "ascending"), ("face", "ascending")])
    return rows.select(FINAL_SCHEMA.names).cast(FINAL_SCHEMA)


def describe(output: Output) -> dict[str, Any]:
    """Counts over all final files."""
    counts = Counts()
    for batch in output.batches(Counts.COLUMNS):
        counts.add(pa.table(batch))
    return counts.as_dict()


def check_counted(output: Output, run: Run, inputs: int) -> None:
    """Makes sure that nothing came back into the output that doubles rows.

    Args:
        output: a directory with the final files of a run.
        run: the run. Of what it was added to, files may have been taken away.
        inputs: how many inputs all final files hold, see `describe`.

    Raises:
        IncompleteError: they are too many, or too few.
    """
    due = run.first_id + run.inputs
    if inputs > due:
        raise IncompleteError(
            f"{output.name} holds {inputs:,} inputs, though only {due:,} were scored; take out the files that were "
            f"copied there or came back (this run's begin with faces-{run.id}-), and the same command without "
            "--overwrite goes on"
        )
    if inputs < due and not run.first_id:
        raise IncompleteError(
            f"{output.name} holds only {inputs:,} of {due:,} inputs; the same command without --overwrite puts back "
            "the others"
        )
