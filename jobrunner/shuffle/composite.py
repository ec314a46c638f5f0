"""Composite keys: key and value in one encoding, so that sorting by it sorts the values of each key.

    composite = encoded key, each 00 as 00 ff + 00 + encoded value

Its byte order is the order of keys and, within a key, the canonical order of values. What sorts, spills and merges rows
by key thereby does so by value too, in the same bounded memory; only the reducer's number and the groups look at the
key alone. `sort_values` and `Distinct()` use it; rows then have 0 for a value.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobrunner.shuffle.columns import column_offsets, make_rows
from jobrunner.shuffle.keys import UnsupportedKey, encode_key, encode_keys
from jobrunner.shuffle.reducers import BadValue

_END = b"\x00"


def encode_values(keys: Sequence[Any], values: Sequence[Any], *, why: str) -> Any:
    """Values in the encoding of keys (pa.BinaryArray). Raises BadValue naming key and value, and `why` it is needed."""
    try:
        return encode_keys(values)
    except UnsupportedKey as error:
        for key, value in zip(keys, values, strict=True):
            try:
                encode_key(value)
            except UnsupportedKey:
                shown = f"{value!r:.200} of type {type(value).__name__}"
                message = f"{why} cannot take value {shown} of key {key!r:.200}: it has no canonical order"
                raise BadValue(message, reducer=why, key=repr(key)) from error
        raise


def compose(keys: Any, values: Any) -> Any:
    """Encoded keys and encoded values as one column of composite keys."""
    if len(keys) == 0:
        return keys
    nested = pc.replace_substring(keys, _END, b"\x00\xff")
    return pc.binary_join_element_wise(nested, values, pa.scalar(_END, pa.binary()))


def split_composite(column: Any) -> tuple[Any, Any]:
    """Encoded keys and encoded values of a column of composite keys."""
    count = len(column)
    if count == 0:
        return column, column
    offsets = column_offsets(column)
    raw = np.frombuffer(column.buffers()[2], np.uint8)[: offsets[-1]]
    zeros = np.flatnonzero(raw == 0)
    # A zero of the key is followed by ff, the one that ends it by the kind of the value, which is less.
    zeros = zeros[raw[np.minimum(zeros + 1, len(raw) - 1)] != 0xFF]
    cuts = np.empty(3 * count + 1, np.int32)
    cuts[0::3] = offsets
    cuts[1::3] = zeros[np.searchsorted(zeros, offsets[:-1])]
    cuts[2::3] = cuts[1::3] + 1
    parts = pa.Array.from_buffers(pa.binary(), 3 * count, [None, pa.py_buffer(cuts), column.buffers()[2]])
    places = np.arange(0, 3 * count, 3)
    keys = pc.replace_substring(parts.take(pa.array(places)), b"\x00\xff", _END)
    return keys, parts.take(pa.array(places + 2))


def split_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Rows of composite keys as rows of keys and encoded values, a `pa.binary()` column."""
    for batch in batches:
        yield make_rows(*split_composite(batch.column("key")))
