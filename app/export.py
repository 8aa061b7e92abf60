"""Tables as the files that the pages give away."""

import io

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

__all__ = ["to_csv", "to_parquet"]


def to_csv(table: pa.Table) -> bytes:
    """The table as CSV with a head line."""
    sink = io.BytesIO()
    pyarrow.csv.write_csv(table, sink)
    return sink.getvalue()


def to_parquet(table: pa.Table) -> bytes:
    """The table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
