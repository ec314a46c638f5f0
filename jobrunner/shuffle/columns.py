"""Rows as columns: `key` (binary, encoded by keys.py) and `value`, of one of these types:

    int64, float64                  all exact ints of 64 bits, all exact floats
    struct(total, count)            partial results of Mean(): a tuple in Python; total is int64 or float64
    binary                          encoded as keys are; only on the way to a reducer with sorted values
    large_binary                    pickles: everything else
The type of a value column follows from the values alone.
"""

import pickle
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

PICKLED = pa.large_binary()
ENCODED = pa.binary()


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
    return make_rows(rows.column("key"), pickled_values(values))


def pickled_values(values: Any) -> Any:
    """A value column as pickles of its values."""
    if values.type == PICKLED:
        return values
    return pickled_column([pickle.dumps(value, 5) for value in values_list(values)])


def mean_column(totals: Any, counts: Any = None) -> Any:
    """Partial results of Mean(): sums, and of how many values each is one (1 if not given)."""
    if counts is None:
        counts = pa.array(np.ones(len(totals), np.int64))
    return pa.StructArray.from_arrays([totals, counts], names=["total", "count"])


def is_mean(values: Any) -> bool:
    return bool(pa.types.is_struct(values.type))


def values_list(values: Any) -> list[Any]:
    """A value column as Python values; not of ENCODED ones, which keys.py reads."""
    assert values.type != ENCODED
    if is_mean(values):
        return list(zip(values.field(0).to_pylist(), values.field(1).to_pylist(), strict=True))
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
        return _fixed_bytes(column) * len(column)
    offsets = column_offsets(column)
    return int(offsets[-1] - offsets[0])


def _fixed_bytes(column: Any) -> int:
    return 16 if is_mean(column) else 8


def _ends(column: Any) -> Any:
    """Bytes of the column up to and including each row."""
    if not _is_binary(column):
        return np.arange(1, len(column) + 1, dtype=np.int64) * _fixed_bytes(column)
    offsets = column_offsets(column)
    return offsets[1:] - offsets[0]
