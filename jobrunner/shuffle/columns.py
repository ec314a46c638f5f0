"""Rows as columns: `key` (binary, encoded by keys.py) and `value` (int64, float64, or large_binary holding pickles).

The type of a value column follows from the values alone: all exact ints of 64 bits, all exact floats, else pickles.
"""

import pickle
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

PICKLED = pa.large_binary()


def rows_schema(value_type: Any) -> Any:
    return pa.schema([("key", pa.binary()), ("value", value_type)])


def make_rows(keys: Any, values: Any) -> Any:
    """A pa.RecordBatch of two columns of equal length."""
    return pa.RecordBatch.from_arrays([keys, values], schema=rows_schema(values.type))


def value_column(values: Sequence[Any]) -> Any:
    """Values as a column of the narrowest type that gives each of them back exactly."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        try:
            return pa.array(np.array(array("q", values)), pa.int64())
        except OverflowError:
            pass
    if kinds == {float}:
        return pa.array(np.array(values, np.float64))
    return pickled_column([pickle.dumps(value, 5) for value in values])


def pickled_column(pickles: Sequence[bytes]) -> Any:
    return pa.array(pickles, PICKLED)


def as_pickled(rows: Any) -> Any:
    """The same rows with pickled values."""
    values = rows.column("value")
    if values.type == PICKLED:
        return rows
    return make_rows(rows.column("key"), pickled_column([pickle.dumps(value, 5) for value in values.to_pylist()]))


def values_list(values: Any) -> list[Any]:
    """A value column as Python values."""
    plain: list[Any] = values.to_pylist()
    return list(map(pickle.loads, plain)) if values.type == PICKLED else plain


def one_type(types: Sequence[Any]) -> Any:
    """The value type that rows of all of `types` can have; int64 if there are none."""
    distinct = set(types)
    if not distinct:
        return pa.int64()
    return distinct.pop() if len(distinct) == 1 else PICKLED


def concat_rows(batches: Sequence[Any]) -> Any:
    """Batches as one pa.RecordBatch, in order; pickled if their types differ. At least one batch."""
    if len(batches) == 1:
        return batches[0]
    if one_type([batch.schema.field("value").type for batch in batches]) == PICKLED:
        batches = [as_pickled(batch) for batch in batches]
    columns = [pa.concat_arrays([batch.column(i) for batch in batches]) for i in range(2)]
    return pa.RecordBatch.from_arrays(columns, schema=batches[0].schema)


def rows_bytes(rows: Any) -> int:
    """Encoded size: keys, values, and 8 bytes a row for where they begin; a function of the rows alone."""
    return _size(rows.column("key")) + _size(rows.column("value")) + 8 * len(rows) if len(rows) else 0


def cut_rows(rows: Any, *, rows_max: int, bytes_max: int) -> Iterator[Any]:
    """Slices of at most `rows_max` rows and, unless one row is larger, `bytes_max` bytes."""
    count = len(rows)
    if count == 0:
        return
    if rows_bytes(rows) * min(rows_max, count) <= bytes_max * count and rows.column("value").type != PICKLED:
        for start in range(0, count, rows_max):
            yield rows.slice(start, rows_max)
        return
    ends = _ends(rows.column("key")) + _ends(rows.column("value")) + np.arange(1, count + 1) * 8
    start, base = 0, 0
    while start < count:
        stop = int(np.searchsorted(ends, base + bytes_max, side="right"))
        stop = min(max(stop, start + 1), start + rows_max, count)
        yield rows.slice(start, stop - start)
        start, base = stop, int(ends[stop - 1])


def column_offsets(column: Any) -> Any:
    """Where each row of a binary column begins in its data buffer, and where the last one ends (int64)."""
    kind = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column) + 1].astype(np.int64)


def _is_binary(column: Any) -> bool:
    return bool(pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type))


def _size(column: Any) -> int:
    if not _is_binary(column):
        return 8 * len(column)
    offsets = column_offsets(column)
    return int(offsets[-1] - offsets[0])


def _ends(column: Any) -> Any:
    """Bytes of the column up to and including each row."""
    if not _is_binary(column):
        return np.arange(1, len(column) + 1, dtype=np.int64) * 8
    offsets = column_offsets(column)
    return offsets[1:] - offsets[0]
