"""Sorted runs to one sorted stream, and that stream to groups or to folded rows; bounded memory.

Order: by encoded key, then by the position of the run in `runs`, then by position in the run. So equal keys keep the
order of `runs`, whatever the sizes of their batches.
Source: block merge; Knuth, TAOCP 3, section 5.4.1.
"""

import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from jobrunner.shuffle.blocks import PartitionFile
from jobrunner.shuffle.columns import ENCODED, PICKLED, concat_rows
from jobrunner.shuffle.fold import fold_sorted, group_starts
from jobrunner.shuffle.keys import decode_keys
from jobrunner.shuffle.limits import ShuffleLimits
from jobrunner.shuffle.reducers import Ready
from jobrunner.shuffle.runs import FileRun, Run, write_partition


def sort_rows(rows: Any) -> Any:
    """Rows by key; equal keys keep their order (Arrow's sort is stable)."""
    return rows if len(rows) < 2 else rows.take(pc.sort_indices(rows.column("key")))


def merge_batches(runs: Sequence[Run]) -> Iterator[Any]:
    """Merge sorted runs into one sorted stream of batches, none empty; their value types may differ.

    Memory: one batch a run, twice. Opens all runs at once: see `merge_all` for many.
    """
    if len(runs) == 1:
        yield from runs[0].batches()
        return
    heads = [_Head(run) for run in runs]
    heads = [head for head in heads if head.batch is not None]
    while heads:
        slices = _take_safe(heads)
        yield slices[0] if len(slices) == 1 else sort_rows(concat_rows(slices))
        heads = [head for head in heads if head.refill()]


class _Head:
    """A run, its current batch (rows not yet merged, None at the end) and the batch after that."""

    def __init__(self, run: Run) -> None:
        self.source = run.batches()
        self.batch: Any = next(self.source, None)
        self.ahead: Any = next(self.source, None)
        self._open()

    def _open(self) -> None:
        if self.batch is not None:
            self.keys = _Keys(self.batch.column("key"))
            self.last: bytes = self.keys[len(self.keys) - 1]

    def take(self, count: int) -> Any:
        rows, self.batch = self.batch.slice(0, count), self.batch.slice(count)
        self.keys = _Keys(self.batch.column("key"))
        return rows

    def refill(self) -> bool:
        """Go to the next batch if this one is used up; False at the end of the run."""
        if len(self.batch) == 0:
            self.batch, self.ahead = self.ahead, next(self.source, None)
            self._open()
        return self.batch is not None


class _Keys:
    """A key column as a sequence that bisect can search: only the rows it looks at become Python objects."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> bytes:
        key: bytes = self.column[row].as_py()
        return key


def _take_safe(heads: list[_Head]) -> list[Any]:
    """Take from each head the rows that come before anything not yet read, in the order of runs.

    The bound is the least (last key, run) of the runs that go on: rows of that key are safe in this run and in those
    before it, but not in later runs, whose equal keys must wait for the rest of this run's.
    """
    unfinished = [(head.last, number) for number, head in enumerate(heads) if head.ahead is not None]
    if not unfinished:
        return [head.take(len(head.batch)) for head in heads]
    bound, last_run = min(unfinished)
    slices = []
    for number, head in enumerate(heads):
        count = (bisect_right if number <= last_run else bisect_left)(head.keys, bound)
        if count:
            slices.append(head.take(count))
    return slices


def merge_all(runs: Sequence[Run], limits: ShuffleLimits, scratch: Path, fold: Ready | None = None) -> Iterator[Any]:
    """`merge_batches` of any number of runs: passes of merge_runs_max at a time through files in `scratch`.

    With `fold` rows of equal keys are folded on the way, and keys of the result are distinct.
    """
    level = 0
    while len(runs) > limits.merge_runs_max:
        merged: list[Run] = []
        for start in range(0, len(runs), limits.merge_runs_max):
            group = runs[start : start + limits.merge_runs_max]
            path = scratch / f"merge-{level}-{start}.run"
            merged.append(_write_run(path, group, limits, fold))
        _remove_pass(scratch, level - 1)
        runs, level = merged, level + 1
    batches = merge_batches(runs)
    yield from batches if fold is None else fold_batches(batches, fold)
    _remove_pass(scratch, level - 1)


def _write_run(path: Path, group: Sequence[Run], limits: ShuffleLimits, fold: Ready | None) -> FileRun:
    batches = merge_batches(group)
    with PartitionFile(path) as file:
        write_partition(file, batches if fold is None else fold_batches(batches, fold), limits)
        file.finish()
    return FileRun(path, file.offsets[0], file.lengths[0])


def _remove_pass(scratch: Path, level: int) -> None:
    for path in scratch.glob(f"merge-{level}-*.run"):
        path.unlink()


def fold_batches(batches: Iterable[Any], reducer: Ready) -> Iterator[Any]:
    """Fold a sorted stream: keys of the result are distinct. Batches may differ in value type. Raises BadValue."""
    held: Any = None  # The last key's partial result: the next batch may go on with it.
    for batch in batches:
        rows = fold_sorted(batch if held is None else concat_rows([held, batch]), reducer)
        held = rows.slice(len(rows) - 1)
        if len(rows) > 1:
            yield rows.slice(0, len(rows) - 1)
    if held is not None:
        yield held


def grouped(batches: Iterable[Any]) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A sorted stream as (key, values), key by key. `values` streams; it is valid until the next group is asked for,
    and what is left of it then is skipped."""
    cursor = _Groups(iter(batches))
    while cursor.advance():
        yield cursor.group()


class _Groups:
    """Where a sorted stream stands: the current batch, as lists, and its groups."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._starts: list[int] = []  # First row of each group of the batch, and the number of rows.
        self._keys: list[Any] = []
        self._last = b""  # Encoded key of the batch's last group.
        self._next = 0  # Group of the batch to give out next.
        self._open: _Open | None = None  # The batch's last group, which may go on in the next batch.

    def _load(self) -> bool:
        """Read the next batch; False at the end."""
        batch = next(self._batches, None)
        if batch is None:
            return False
        keys, count = batch.column("key"), len(batch)
        firsts = group_starts(keys)
        self._first = keys[0].as_py()
        self._last = keys[count - 1].as_py()
        self._keys = decode_keys(keys.take(firsts)) if len(firsts) < count else decode_keys(keys)
        self._starts = [*firsts.tolist(), count]
        values = batch.column("value")
        self._values: list[Any] = decode_keys(values) if values.type == ENCODED else values.to_pylist()
        self._load_value = pickle.loads if values.type == PICKLED else None
        self._next = 0
        return True

    def _slice(self, group: int) -> Iterator[Any]:
        values = self._values[self._starts[group] : self._starts[group + 1]]
        return iter(values) if self._load_value is None else map(self._load_value, values)

    def advance(self) -> bool:
        """Make a group current; False at the end of the stream."""
        if self._open is not None:
            self._open.skip()
            self._open = None
        return self._next < len(self._keys) or self._load()

    def group(self) -> tuple[Any, Iterator[Any]]:
        number, self._next = self._next, self._next + 1
        if self._next < len(self._keys):
            return self._keys[number], self._slice(number)
        self._open = _Open(self._slice(number), self.more)
        return self._keys[number], self._open

    def more(self) -> Iterator[Any] | None:
        """The rest of the last group from the next batch, if it goes on there."""
        if self._next < len(self._keys):
            return None
        before = self._last
        if not self._load() or self._first != before:
            return None
        self._next = 1
        return self._slice(0)


class _Open:
    """Values of a group that may go on in the next batch."""

    def __init__(self, values: Iterator[Any], more: Callable[[], Iterator[Any] | None]) -> None:
        self._values: Iterator[Any] | None = values
        self._more = more

    def __iter__(self) -> "_Open":
        return self

    def __next__(self) -> Any:
        while self._values is not None:
            for value in self._values:
                return value
            self._values = self._more()
        raise StopIteration

    def skip(self) -> None:
        while self._values is not None:
            self._values = self._more()


def combine_rows(rows: Any, combine: Callable[[Any, Iterator[Any]], Any]) -> list[tuple[Any, Any]]:
    """Run a user's combiner over sorted rows in memory; its output pairs, in order."""
    pairs: list[tuple[Any, Any]] = []
    for key, values in grouped([rows] if len(rows) else []):
        result = combine(key, values)
        if result is not None:
            pairs.extend(result)
    return pairs
