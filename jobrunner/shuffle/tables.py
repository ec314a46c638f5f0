"""Tables from batch functions to rows of the shuffle: the same rows that pairs of the same values would become.

    key, value (any Arrow type) ─► fold while keys are raw text ─► encode what is left ─► rows
Text and numbers go column by column; nulls, and types that need Python to be understood, value by value.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobrunner.shuffle.buffer import BadPair, ValueBuffer
from jobrunner.shuffle.columns import make_rows, mean_column
from jobrunner.shuffle.composite import compose, encode_values
from jobrunner.shuffle.fold import count_rows, fold_rows, gather_rows, vectorises
from jobrunner.shuffle.keys import encode_ints, encode_keys
from jobrunner.shuffle.reducers import Count, Mean, Ready, Sum, TopK

_STR, _BYTES = b"\x06", b"\x07"


def table_pieces(given: Any, *, bytes_max: int, bare: bool) -> Iterator[tuple[Any, Any]]:
    """Key and value columns (None if `bare`), of about `bytes_max` bytes at most. Raises BadPair."""
    if not isinstance(given, pa.RecordBatch | pa.Table):
        wanted = "a pa.RecordBatch or pa.Table with columns key and value"
        raise BadPair(f"expected {wanted}, got {given!r:.200} of type {type(given).__name__}")
    names = list(given.schema.names)
    wanted_names = [["key"], ["key", "value"], ["value", "key"]] if bare else [["key", "value"], ["value", "key"]]
    if names not in wanted_names:
        allowed = "key, and perhaps value" if bare else "key and value"
        raise BadPair(f"expected a table with columns {allowed}, got columns {', '.join(names) or 'none'}")
    for piece in given.to_batches() if isinstance(given, pa.Table) else [given]:
        if not len(piece):
            continue
        rows_max = max(1, bytes_max * len(piece) // (piece.nbytes + 1))
        for start in range(0, len(piece), rows_max):
            some = piece.slice(start, rows_max)
            yield _plain(some.column("key")), None if bare else _plain(some.column("value"))


def table_pairs(given: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs that a table means, as Python values. Raises BadPair."""
    for keys, values in table_pieces(given, bytes_max=1 << 22, bare=False):
        yield from zip(keys.to_pylist(), values.to_pylist(), strict=True)


def rows_of(keys: Any, values: Any, reducer: Ready | None, *, composite: str = "") -> Any:
    """Rows of the writer, folded if there is a reducer. Raises UnsupportedKey, BadValue."""
    if isinstance(reducer, Count):
        tag, raw = _raw_text(keys)
        return _tagged(count_rows(raw), tag) if tag else count_rows(encode_column(keys))
    if composite:
        zeros = pa.array(np.zeros(len(keys), np.int64))
        rows = make_rows(compose(encode_column(keys), _encode_values(keys, values, composite)), zeros)
        return rows if reducer is None else fold_rows(rows, reducer)
    column = _mapped(keys, values, reducer)
    if reducer is None:
        return make_rows(encode_column(keys), column)
    if isinstance(reducer, TopK):
        return gather_rows(make_rows(encode_column(keys), column), reducer)
    tag, raw = _raw_text(keys)
    if tag and vectorises(column, reducer):
        return _tagged(fold_rows(make_rows(raw, column), reducer), tag)
    return fold_rows(make_rows(encode_column(keys), column), reducer)


def encode_column(keys: Any) -> Any:
    """A column of any Arrow type as encoded keys (pa.BinaryArray). Raises UnsupportedKey."""
    tag, raw = _raw_text(keys)
    if tag:
        return _with_tag(raw, tag)
    if keys.null_count == 0 and pa.types.is_integer(keys.type) and keys.type != pa.uint64():
        return encode_ints(keys.cast(pa.int64()).to_numpy())
    return encode_keys(keys.to_pylist())


def _plain(column: Any) -> Any:
    """Without what only says how values are stored."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if pa.types.is_large_string(kind) or kind == pa.string_view():
        return column.cast(pa.string())
    if pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or kind == pa.binary_view():
        return column.cast(pa.binary())
    return column


def _raw_text(keys: Any) -> tuple[bytes, Any]:
    """Text or bytes without nulls: the tag of its encoding, and the column as bytes; else no tag."""
    if keys.null_count == 0 and pa.types.is_string(keys.type):
        return _STR, keys.view(pa.binary())
    if keys.null_count == 0 and pa.types.is_binary(keys.type):
        return _BYTES, keys
    return b"", None


def _with_tag(raw: Any, tag: bytes) -> Any:
    return pc.binary_join_element_wise(pa.scalar(tag, pa.binary()), raw, pa.scalar(b"", pa.binary()))


def _tagged(rows: Any, tag: bytes) -> Any:
    return make_rows(_with_tag(rows.column("key"), tag), rows.column("value"))


def _mapped(keys: Any, values: Any, reducer: Ready | None) -> Any:
    """Mapped values as the column that the writer's buffer would make of them. Raises BadValue."""
    kind = values.type
    numbers = None
    if values.null_count == 0:
        small = pa.types.is_integer(kind) and kind != pa.uint64()
        if small or (pa.types.is_boolean(kind) and isinstance(reducer, Sum | Mean)):
            numbers = values.cast(pa.int64())
        elif pa.types.is_float64(kind):
            numbers = values
    if numbers is not None:
        return mean_column(numbers) if isinstance(reducer, Mean) else numbers
    buffer = ValueBuffer(None if isinstance(reducer, TopK) else reducer)
    buffer.add(values.to_pylist(), keys.to_pylist())
    return buffer.take()


def _encode_values(keys: Any, values: Any, why: str) -> Any:
    if _raw_text(values)[0]:
        return encode_column(values)
    return encode_values(keys.to_pylist(), values.to_pylist(), why=why)
