"""Ready-made reducers over columns: rows in, one row a key out.

Nothing wraps: an int64 sum is taken only if max(abs) * rows stays below 2^63, else Python integers do it. Float sums
run in row order, one after another, so that they are the same on every machine.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobrunner.shuffle.columns import is_mean, make_rows, mean_column, value_column, values_list
from jobrunner.shuffle.keys import decode_key, decode_keys
from jobrunner.shuffle.reducers import Count, Distinct, First, Max, Min, Ready, Sum, TopK

_KERNELS: dict[type[Ready], str] = {Sum: "sum", Count: "sum", Min: "min", Max: "max", Distinct: "min"}
_UFUNCS: dict[type[Ready], Any] = {Sum: np.add, Count: np.add, Min: np.minimum, Max: np.maximum, Distinct: np.minimum}


def fold_rows(rows: Any, reducer: Ready) -> Any:
    """Partial results `rows`, folded; keys in no order. Raises BadValue naming key and value."""
    if len(rows) == 0:
        return rows
    if isinstance(reducer, First):
        return _fold_firsts(rows.take(pc.sort_indices(rows.column("key"))))  # Arrow's sort is stable.
    if vectorises(rows.column("value"), reducer):
        if is_mean(rows.column("value")):
            return _fold_means(rows)
        kernel = _KERNELS[type(reducer)]
        grouped = pa.Table.from_batches([rows]).group_by("key", use_threads=False).aggregate([("value", kernel)])
        grouped = grouped.combine_chunks()
        return make_rows(_whole(grouped.column("key")), _whole(grouped.column(f"value_{kernel}")))
    return _fold_one_by_one(rows, reducer)


def fold_sorted(rows: Any, reducer: Ready) -> Any:
    """`fold_rows` of rows sorted by key; the result is sorted."""
    if isinstance(reducer, First):
        return _fold_firsts(rows)
    if len(rows) < 2 or not vectorises(rows.column("value"), reducer):
        return _fold_one_by_one(rows, reducer)
    if is_mean(rows.column("value")):
        return _sorted(_fold_means(rows))
    if pa.types.is_float64(rows.column("value").type) and isinstance(reducer, Sum):
        # numpy adds in an order of its own; Arrow in row order, but loses the order of keys.
        return _sorted(fold_rows(rows, reducer))
    firsts = group_starts(rows.column("key"))
    if len(firsts) == len(rows):
        return rows
    kernel = _UFUNCS[type(reducer)]
    return make_rows(
        rows.column("key").take(firsts), pa.array(kernel.reduceat(rows.column("value").to_numpy(), firsts))
    )


def _sorted(rows: Any) -> Any:
    return rows.take(pc.sort_indices(rows.column("key")))


def _fold_firsts(rows: Any) -> Any:
    """Of sorted rows, the first of each key."""
    return rows.take(pa.array(group_starts(rows.column("key")))) if len(rows) > 1 else rows


def _fold_means(rows: Any) -> Any:
    """Partial results of Mean() in columns, folded; keys in no order."""
    totals, counts = rows.column("value").field(0), rows.column("value").field(1)
    table = pa.table({"key": rows.column("key"), "total": totals, "count": counts})
    grouped = table.group_by("key", use_threads=False).aggregate([("total", "sum"), ("count", "sum")])
    means = mean_column(_whole(grouped.column("total_sum")), _whole(grouped.column("count_sum")))
    return make_rows(_whole(grouped.column("key")), means)


def gather_rows(rows: Any, reducer: TopK) -> Any:
    """Mapped values to partial results, one row a key, sorted by key. Raises BadValue naming the key."""
    rows = rows.take(pc.sort_indices(rows.column("key")))
    if len(rows) == 0:
        return rows
    firsts = group_starts(rows.column("key"))
    keys = rows.column("key").take(pa.array(firsts))
    values, ends = values_list(rows.column("value")), [*firsts.tolist()[1:], len(rows)]
    gathered: list[Any] = []
    for start, end in zip(firsts.tolist(), ends, strict=True):
        try:
            gathered.append(reducer.gather(values[start:end]))
        except TypeError as error:
            raise reducer.refuse(decode_keys(keys)[len(gathered)], values[start:end], error) from error
    return make_rows(keys, value_column(gathered))


def count_groups(rows: Any) -> Any:
    """Of sorted rows, one row (key, how many) a key; sorted."""
    firsts = group_starts(rows.column("key"))
    counts = np.diff(np.append(firsts, len(rows)))
    return make_rows(rows.column("key").take(pa.array(firsts)), pa.array(counts.astype(np.int64)))


def group_starts(keys: Any) -> Any:
    """First row of each group of equal keys in a sorted column that is not empty (int64 array)."""
    count = len(keys)
    changes = pc.not_equal(keys.slice(1), keys.slice(0, count - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate(([0], np.flatnonzero(changes) + 1))


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def count_rows(keys: Any) -> Any:
    """Rows (key, how many) of an encoded key column; keys in no order."""
    if len(keys) == 0:
        return make_rows(keys, pa.array([], pa.int64()))
    grouped = pa.table({"key": keys}).group_by("key", use_threads=False).aggregate([([], "count_all")])
    return make_rows(_whole(grouped.column("key")), _whole(grouped.column("count_all")))


def vectorises(values: Any, reducer: Ready) -> bool:
    """Whether columns are enough: kernels give exactly what Python gives for these partial results."""
    if isinstance(reducer, First):
        return True
    if is_mean(values):
        return _sums_fit(values.field(0))
    if pa.types.is_float64(values.type):
        if isinstance(reducer, Sum):
            return True
        # Of NaN, and of 0.0 beside -0.0, kernels pick one by version and processor: there the rule is Python's.
        floats = values.to_numpy()
        doubtful = np.isnan(floats) | ((floats == 0) & np.signbit(floats))
        return isinstance(reducer, Min | Max) and not bool(doubtful.any())
    if not pa.types.is_int64(values.type):
        return False
    return isinstance(reducer, Min | Max | Distinct) or _sums_fit(values)


def _sums_fit(values: Any) -> bool:
    """Whether no sum of any of these numbers can wrap; one float can always be added to another."""
    if pa.types.is_float64(values.type):
        return True
    bounds = pc.min_max(values)
    return bool(max(abs(bounds["min"].as_py()), abs(bounds["max"].as_py())) * len(values) < 1 << 63)


def _fold_one_by_one(rows: Any, reducer: Ready) -> Any:
    totals: dict[bytes, Any] = {}
    merge = reducer.merge
    for key, value in zip(rows.column("key").to_pylist(), values_list(rows.column("value")), strict=True):
        if key in totals:
            try:
                totals[key] = merge(totals[key], value)
            except TypeError as error:
                raise reducer.refuse(decode_key(key), value, error) from error
        else:
            totals[key] = value
    return make_rows(pa.array(list(totals), pa.binary()), value_column(list(totals.values())))
