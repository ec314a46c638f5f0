"""Pairs on their way to columns: the per-record loop of a map attempt, kept out of Python's byte code where it can be.

Keys that are all str are joined, values that are all ints or floats go to arrays; a list that is neither is encoded
item by item. Chunks of about 2,000 pairs stay in the processor's cache.
"""

import pickle
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from jobrunner.errors import TaskError
from jobrunner.shuffle.columns import mean_column, pickled_column, pickled_values
from jobrunner.shuffle.keys import STR_TAG, encode_keys, joined_keys
from jobrunner.shuffle.reducers import Mean, Ready, Sum

CHUNK = 2_000

_PAIRS = {tuple, list}
_STEADY = frozenset({type(None), bool, int, float, complex, str, bytes})  # Types whose values never change.


class BadPair(TaskError):
    """Map or combine gave something that is not a (key, value) pair."""


def chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of up to CHUNK items."""
    source = iter(items)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


def unzip(pairs: list[Any]) -> tuple[list[Any], list[Any]]:
    """Keys and values. Raises BadPair naming the first item that is not a tuple or list of two."""
    if set(map(type, pairs)) <= _PAIRS:
        try:
            return [key for key, _ in pairs], list(map(itemgetter(1), pairs))  # Unpacking tells that there are two.
        except ValueError:
            pass
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise BadPair(f"expected (key, value) pairs, got {pair!r:.200} of type {type(pair).__name__}")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


class KeyBuffer:
    """Keys in order, as joined text while all are str, else as encoded columns."""

    def __init__(self) -> None:
        self.bytes = 0  # Encoded, in characters where the text is joined: a function of the keys alone.
        self._texts: list[str] = []
        self._joined = 0
        self._columns: list[Any] = []

    def add(self, keys: list[Any]) -> None:
        """Raises UnsupportedKey."""
        try:
            text = STR_TAG.join(keys)
        except TypeError:
            self.add_column(encode_keys(keys))
            return
        if text.count(STR_TAG) != len(keys) - 1:
            self.add_column(encode_keys(keys))
            return
        self._texts.append(text)
        self._joined += len(keys)
        self.bytes += len(text) + 1

    def add_column(self, column: Any) -> None:
        """Take encoded keys."""
        self._close_texts()
        self._columns.append(column)
        self.bytes += column.nbytes

    def _close_texts(self) -> None:
        if self._texts:
            self._columns.append(joined_keys(STR_TAG.join(self._texts), self._joined))
            self._texts, self._joined = [], 0

    def take(self) -> Any:
        """All keys as one encoded column; the buffer is empty afterwards."""
        self._close_texts()
        columns, self._columns, self.bytes = self._columns, [], 0
        if not columns:
            return pa.array([], pa.binary())
        return columns[0] if len(columns) == 1 else pa.concat_arrays(columns)


class ValueBuffer:
    """Values in order: an array while they are all ints of 64 bits, or all floats, else pickles."""

    def __init__(self, reducer: Ready | None) -> None:
        self.bytes = 0
        self._reducer = reducer
        self._parts: list[array[int] | array[float] | list[bytes]] = []

    def add(self, values: list[Any], keys: list[Any]) -> None:
        """Take mapped values, as `first` of the reducer if there is one; `keys` are for errors. Raises BadValue."""
        if isinstance(self._reducer, Sum | Mean):
            try:
                self._add_ints(values)  # Takes bools as ints, as a sum does.
                return
            except (TypeError, OverflowError):
                pass
        kinds = set(map(type, values))
        if kinds == {float}:
            self._extend("d", array("d", values))
            return
        if kinds == {int}:
            try:
                self._add_ints(values)
                return
            except OverflowError:
                pass
        if self._reducer is not None:
            start = self._reducer.start
            values = [start(key, value) for key, value in zip(keys, values, strict=True)]
        self.add_pickles([pickle.dumps(value, 5) for value in values])

    def _add_ints(self, values: list[Any]) -> None:
        """Raises OverflowError beyond 64 bits, TypeError for what is no int."""
        try:
            self._extend("B", array("B", bytes(values)))  # Ones, mostly: cheaper than array("q", values).
        except ValueError:
            self._extend("q", array("q", values))

    def _extend(self, code: str, more: "array[Any]") -> None:
        last = self._parts[-1] if self._parts else None
        if isinstance(last, array) and last.typecode == code:
            last.extend(more)
        else:
            self._parts.append(more)
        self.bytes += 8 * len(more)

    def add_pickles(self, pickles: list[bytes]) -> None:
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1].extend(pickles)
        else:
            self._parts.append(pickles)
        self.bytes += sum(map(len, pickles)) + 8 * len(pickles)

    def take(self) -> Any:
        """All values as one column; the buffer is empty afterwards."""
        parts, self._parts, self.bytes = self._parts, [], 0
        if not parts:
            return pa.array([], pa.int64())
        columns = [self._column(part) for part in parts]
        if len({column.type for column in columns}) > 1:
            columns = list(map(pickled_values, columns))
        return columns[0] if len(columns) == 1 else pa.concat_arrays(columns)

    def _column(self, part: Any) -> Any:
        if isinstance(part, list):
            return pickled_column(part)
        numbers = pa.array(np.array(part, np.int64 if part.typecode == "B" else None))
        return mean_column(numbers) if isinstance(self._reducer, Mean) else numbers


def is_steady(value: Any) -> bool:
    """Whether a value cannot change after it was yielded (a tuple: as far as its elements)."""
    return type(value) in _STEADY or (type(value) is tuple and all(map(is_steady, value)))
