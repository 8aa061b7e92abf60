"""An output of the batch job, read column by column: a million rows cost what their few narrow columns cost."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from agegender.records import arrow_schema
from batch.errors import OutputError, first_line
from batch.location import normalize
from batch.output import Output
from batch.summary import GOOD, is_input, value_counts

__all__ = ["INTERVAL_WIDTH", "SORTABLE", "Scores", "Selection", "read_summary"]

# Read once and held: about 50 bytes a row. Paths and errors stay in the files until rows of them are shown.
_NARROW: Final = [field for field in arrow_schema().names if field not in ("path", "error", "x1", "y1", "x2", "y2")]

INTERVAL_WIDTH: Final = "interval width"
SORTABLE: Final = ("age", INTERVAL_WIDTH, "gender_probability", "score", "faces", "path")

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Which rows are asked for, and in what order.

    Attributes:
        statuses: those of these statuses; all if empty.
        genders: those of these genders; all if empty.
        ages: least and largest age in years; None for all rows, also those without a face.
        least_probability: of the gender, 0 for all rows, also those without a face.
        least_score: of the detector, 0 for all rows.
        path_part: what the path contains, whatever the case of its letters.
        sort_by: one of `SORTABLE`, or empty for the order of the files.
        descending: the largest first.
    """

    statuses: tuple[str, ...] = ()
    genders: tuple[str, ...] = ()
    ages: tuple[float, float] | None = None
    least_probability: float = 0.0
    least_score: float = 0.0
    path_part: str = ""
    sort_by: str = ""
    descending: bool = False


class Scores:
    """The Parquet files of one directory. Safe to share between threads."""

    def __init__(self, name: str) -> None:
        """Opens them and reads their narrow columns.

        Args:
            name: the directory, local or in an object store.

        Raises:
            OutputError: there is no Parquet file, or one that the batch job did not write.
            ValueError: the name is not a valid one.
        """
        output = _output(name)
        self._dataset = _open(output)
        self._narrow = _read(output, self._dataset, _NARROW)

    @staticmethod
    def fingerprint(name: str) -> tuple[tuple[str, int | None, int], ...]:
        """Changes when the files of a directory do.

        Raises:
            OutputError: there is no such directory, or it cannot be reached.
            ValueError: the name is not a valid one.
        """
        return tuple((info.path, info.mtime_ns, info.size) for info in _files(_output(name)))

    def __len__(self) -> int:
        return len(self._narrow)

    @property
    def statuses(self) -> dict[str, int]:
        """Inputs by status, the most frequent first."""
        counts = value_counts(self._of_inputs("status"))
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

    @property
    def faces_per_image(self) -> dict[int, int]:
        """Inputs that were looked at, by their number of faces."""
        looked_at = pc.is_in(self._narrow["status"], pa.array(GOOD))
        faces = self._narrow["faces"].filter(pc.and_(is_input(self._narrow["face"]), looked_at))
        return dict(sorted(value_counts(faces).items()))

    @property
    def genders(self) -> list[str]:
        """Those that occur."""
        return sorted(self._narrow["gender"].unique().drop_null().to_pylist())

    @property
    def faces(self) -> int:
        """Number of faces."""
        return len(self) - self._narrow["age"].null_count

    @property
    def median_age(self) -> float | None:
        """Of all faces, years; None where there is no face."""
        median: float | None = pc.quantile(self._narrow["age"], 0.5)[0].as_py()
        return median

    def ages(self, gender: str) -> npt.NDArray[np.float32]:
        """Ages in years of all faces of a gender."""
        return _values(self._narrow["age"].filter(pc.equal(self._narrow["gender"], gender)))

    @property
    def interval_widths(self) -> npt.NDArray[np.float32]:
        """Widths of the age interval of all faces, years."""
        return _values(self._interval_width())

    def select(self, selection: Selection) -> Rows:
        """Numbers of the rows that are asked for, in the order that is asked for; those without a value come last."""
        masks = self._masks(selection)
        rows = np.arange(len(self), dtype=np.int64)
        if masks:
            mask = masks[0]
            for each in masks[1:]:
                mask = pc.and_(mask, each)
            rows = rows[pc.fill_null(mask, False).to_numpy()]
        if not selection.sort_by:
            return rows
        order = "descending" if selection.descending else "ascending"
        column = self._column(selection.sort_by).take(pa.array(rows))
        return rows[pc.sort_indices(pa.table({"key": column}), [("key", order)]).to_numpy()]

    def rows(self, numbers: Rows) -> pa.Table:
        """All columns of some rows, in their order."""
        # In the files' order each of them is opened once.
        order = np.argsort(numbers, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        rows = self._dataset.take(pa.array(numbers[order]), columns=arrow_schema().names)
        return rows.take(pa.array(back))

    def _masks(self, wanted: Selection) -> list[pa.ChunkedArray]:
        masks = []
        for name, values in (("status", wanted.statuses), ("gender", wanted.genders)):
            if values:
                masks.append(pc.is_in(self._narrow[name], pa.array(values)))
        if wanted.ages:
            age = self._narrow["age"]
            masks += [pc.greater_equal(age, wanted.ages[0]), pc.less_equal(age, wanted.ages[1])]
        for name, least in (("gender_probability", wanted.least_probability), ("score", wanted.least_score)):
            if least:
                masks.append(pc.greater_equal(self._narrow[name], least))
        if wanted.path_part:
            masks.append(pc.match_substring(self._column("path"), wanted.path_part, ignore_case=True))
        return masks

    def _column(self, name: str) -> pa.ChunkedArray:
        if name == INTERVAL_WIDTH:
            return self._interval_width()
        if name in self._narrow.column_names:
            return self._narrow[name]
        return self._dataset.to_table(columns=[name])[name]

    def _interval_width(self) -> pa.ChunkedArray:
        return pc.subtract(self._narrow["age_high"], self._narrow["age_low"])

    def _of_inputs(self, name: str) -> pa.ChunkedArray:
        return self._narrow[name].filter(is_input(self._narrow["face"]))


def read_summary(name: str) -> dict[str, Any]:
    """What a finished run says of itself; empty where none is finished, one is being added to, or it cannot be read."""
    output = Output(normalize(name))
    try:
        return {} if output.finished() is None else output.summary()
    except (OutputError, OSError):
        return {}


def _output(name: str) -> Output:
    name = normalize(name)
    try:
        return Output(name)
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{name} cannot be reached: {first_line(error)}") from error


def _files(output: Output) -> list[Any]:
    try:
        files = [] if _is_file(output) else output.list("")
        files = [info for info in files if info.base_name.endswith(".parquet") and info.size]
        lack = None if files else _lack(output)
    except (OSError, ValueError) as error:
        verb = "read" if output.is_local else "reached"
        raise OutputError(f"{output.name} cannot be {verb}: {first_line(error)}") from error
    if lack:
        raise OutputError(lack)
    return files


def _is_file(output: Output) -> bool:
    """Of a local name; a store lists nothing below a file, and may forbid to ask for more than the list."""
    return output.is_local and output.filesystem.get_file_info(output.base).is_file


def _lack(output: Output) -> str:
    """Why a directory has no rows."""
    if output.begun():
        return (
            f"the run in {output.name} is not finished; its rows appear when it is; repeat the command to resume it "
            "if it was stopped"
        )
    here = output.filesystem.get_file_info(output.base)
    if here.type is fs.FileType.NotFound:
        return f"{output.name} does not exist; give the directory that `make batch` wrote"
    if here.is_file:
        return f"{output.name} is a file; give the directory around it"
    return f"{output.name} holds no Parquet files; give the directory that `make batch` wrote"


def _open(output: Output) -> ds.Dataset:
    """Reads in the types of the batch job, in which all columns can be filtered and sorted; a copy may have others."""
    paths = [info.path for info in _files(output)]
    try:
        own = pq.read_schema(paths[0], filesystem=output.filesystem)
        dataset = ds.dataset(paths, format="parquet", filesystem=output.filesystem, schema=arrow_schema())
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(output, error) from error
    for field in arrow_schema():
        if field.name not in own.names:
            raise OutputError(f"{output.name} holds Parquet of something else: it has no column {field.name}")
        if _kind(stored := own.field(field.name).type) != _kind(field.type):
            raise OutputError(
                f"{output.name} holds Parquet of something else: its column {field.name} is {stored}, not {field.type}"
            )
    return dataset


def _kind(stored: pa.DataType) -> str:
    """What other programs that copy an output keep of a type."""
    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    if pa.types.is_integer(stored) or pa.types.is_floating(stored):
        return "number"
    is_text = any(is_(stored) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    return "text" if is_text else str(stored)


def _read(output: Output, dataset: ds.Dataset, columns: list[str]) -> pa.Table:
    try:
        return dataset.to_table(columns=columns).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(output, error) from error


def _unreadable(output: Output, error: Exception) -> OutputError:
    kind = "Parquet that this account may not read" if isinstance(error, PermissionError) else "a damaged Parquet file"
    return OutputError(f"{output.name} holds {kind}: {first_line(error)}")


def _values(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    return np.asarray(column.drop_null().to_numpy(), np.float32)
