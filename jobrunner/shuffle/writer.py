"""The map side: pairs in, one block file out; buffered, combined, spilled and merged in bounded memory.

    pairs ─► buffer ─► rows ─► combine ─► held ─► sorted spills ─► merge ─► block file
             (chunks)          (folded)   (≤ half the buffer)      (fold)

What is combined and what is spilled depends on the pairs alone (their number and encoded bytes, and how they are cut
into calls of `add`), never on time or free memory: so a map that runs again on the same input writes the same rows.
A ready-made reducer must be given as `combine`: rows are then its partial results. A combiner of the user runs while it
pays: once it leaves more than 3/4 of 100,000 rows it is not called again.
With `sort_values`, and for Distinct(), keys of rows are composite (composite.py): key and value, and 0 for a value.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobrunner.errors import TaskError
from jobrunner.ids import AttemptId, Token
from jobrunner.shuffle.blocks import PartitionFile
from jobrunner.shuffle.buffer import CHUNK, BadPair, KeyBuffer, ValueBuffer, chunks, is_steady, unzip
from jobrunner.shuffle.columns import concat_rows, make_rows, rows_bytes, value_column
from jobrunner.shuffle.composite import compose, encode_values, split_composite
from jobrunner.shuffle.fold import count_rows, fold_rows, gather_rows
from jobrunner.shuffle.keys import UnsupportedKey, decode_keys, encode_keys
from jobrunner.shuffle.limits import ShuffleLimits, batch_bytes, buffer_bytes
from jobrunner.shuffle.merge import combine_rows, merge_all, sort_rows
from jobrunner.shuffle.partition import hash_column, partition_of, rows_digest
from jobrunner.shuffle.reducers import BadValue, Count, Distinct, First, Max, Min, Ready, TopK
from jobrunner.shuffle.runs import FileRun, RowsRun, Run, even_batches, write_partition
from jobrunner.shuffle.tables import rows_of, table_pieces

ROWS_MAX = 500_000  # Rows in the buffer before they become columns: keeps Arrow's group_by in the cache.

_PAY_ROWS = 100_000

Combine = Ready | Callable[[Any, Iterator[Any]], Any]


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """A finished map output: what MapDone says of it."""

    digest: int
    rows: int
    bytes: int
    spills: int


class MapOutputWriter:
    """Writes the block file of one map attempt to `path`; spills go to `scratch_dir`, which must exist.

    Give it pairs with `add` (or bare keys with `add_keys`, or tables with `add_table`), then call `finish` once. Raises
    UnsupportedKey, BadPair and BadValue for what user code gave. Not for several threads.
    """

    def __init__(
        self,
        scratch_dir: Path,
        path: Path,
        attempt: AttemptId,
        token: Token,
        reducers: int,
        plan: ShuffleLimits,
        combine: Combine | None = None,
        partition_fn: Callable[[Any, int], int] | None = None,
        *,
        sort_values: bool = False,
    ) -> None:
        self._scratch, self._path = scratch_dir, path
        self._attempt, self._token = attempt, token
        self._reducers, self._limits = reducers, plan
        self._fold = combine if isinstance(combine, Ready) else None
        self._combine = None if isinstance(combine, Ready) else combine
        self._partition_fn = partition_fn
        self._half = buffer_bytes(plan) // 2
        self._keys = KeyBuffer()
        self._values = ValueBuffer(None if isinstance(combine, TopK) else self._fold)
        self._counting = isinstance(combine, Count)  # Then values are not kept at all.
        self._composite = "sort_values" if sort_values else "Distinct()" if isinstance(combine, Distinct) else ""
        self._keeps = self._fold is None or isinstance(combine, Min | Max | First | TopK)  # Values as they are.
        self._careful = False  # Values may change after they were yielded: pickle each at once.
        self._chunk = 1
        self._rows = 0  # In the buffer.
        self._held: list[Any] = []  # Rows that left the buffer; not yet sorted.
        self._held_bytes = 0
        self._spills: list[list[Run]] = []  # Per spill, one run a reducer.
        self._combined_in = self._combined_out = 0

    def add(self, pairs: Iterable[Any]) -> None:
        """Take (key, value) pairs (tuples or lists) in order."""
        source = iter(pairs)
        while self._add_careful(source) if self._careful else self._add_chunk(source):
            pass

    def _add_chunk(self, source: Iterator[Any]) -> bool:
        """One chunk; False if there was nothing left."""
        chunk = list(islice(source, self._chunk))
        if not chunk:
            return False
        keys, values = unzip(chunk)
        before = self._keys.bytes + self._values.bytes
        if self._composite:
            self._keys.add_column(compose(encode_keys(keys), encode_values(keys, values, why=self._composite)))
        else:
            self._keys.add(keys)
            if not self._counting:
                self._values.add(values, keys)
                self._careful = self._keeps and not is_steady(values[-1])
        if self._chunk < CHUNK or len(keys) == CHUNK:
            self._size_chunk(len(keys), self._keys.bytes + self._values.bytes - before)
        self._grown(len(keys))
        return True

    def _size_chunk(self, rows: int, size: int) -> None:
        """The next chunk holds an eighth of the buffer at most; it starts at 1 pair, to see what pairs are like."""
        fitting = self._half // 4 * rows // (size + 1)
        self._chunk = max(1, min(CHUNK, fitting, self._chunk * 8))

    def _add_careful(self, source: Iterator[Any]) -> bool:
        """One chunk whose values are pickled as they come; False if there was nothing left."""
        dumps = pickle.dumps
        keys, pickles = [], []
        size = 0
        for pair in islice(source, CHUNK):
            (key,), (value,) = unzip([pair])
            keys.append(key)
            pickles.append(dumps(value, 5))
            size += len(pickles[-1])
            if size >= self._half // 4:
                break
        if keys:
            self._keys.add(keys)
            self._values.add_pickles(pickles)
            self._grown(len(keys))
        return bool(keys)

    def add_keys(self, keys: Iterable[Any]) -> None:
        """Take bare keys, each once. Only with Count()."""
        assert self._counting, "bare keys are for Count()"
        for chunk in chunks(keys):
            self._keys.add(chunk)
            self._grown(len(chunk))

    def add_table(self, given: Any) -> int:
        """Take a pa.RecordBatch or pa.Table of columns key and value (value not needed with Count()); return its rows.

        Raises BadPair for another. The result is that of `add` of its rows as pairs, combined in larger pieces.
        """
        for keys, values in table_pieces(given, bytes_max=self._half // 2, bare=self._counting):
            self._flush()
            rows = rows_of(keys, values, self._fold, composite=self._composite)
            self._keep(self._run_combine(rows) if self._combine is not None and self._combine_pays() else rows)
        return len(given)

    def _grown(self, rows: int) -> None:
        self._rows += rows
        if self._rows >= ROWS_MAX or self._keys.bytes + self._values.bytes + 8 * self._rows >= self._half:
            self._flush()

    def _flush(self) -> None:
        """Buffer to held rows."""
        if not self._rows:
            return
        self._rows = 0
        self._keep(self._take_rows())

    def _keep(self, rows: Any) -> None:
        """Rows that are combined to held rows, which spill once they exceed half of the buffer."""
        self._hold(rows)
        if self._held_bytes >= self._half:
            if self._fold is not None and len(self._held) > 1:
                rows = fold_rows(concat_rows(self._held), self._fold)
                self._held, self._held_bytes = [], 0
                self._hold(rows)
            if self._fold is None or self._held_bytes >= self._half // 2:
                self._spill()

    def _hold(self, rows: Any) -> None:
        self._held.append(rows)
        self._held_bytes += rows_bytes(rows)

    def _take_rows(self) -> Any:
        """The buffer as combined rows."""
        keys = self._keys.take()
        if self._counting:
            return count_rows(keys)
        rows = make_rows(keys, self._zeros(len(keys)) if self._composite else self._values.take())
        if isinstance(self._fold, TopK):
            return gather_rows(rows, self._fold)
        if self._fold is not None:
            return fold_rows(rows, self._fold)
        if self._combine is not None and self._combine_pays():
            return self._run_combine(rows)
        return rows

    @staticmethod
    def _zeros(count: int) -> Any:
        return pa.array(np.zeros(count, np.int64))

    def _combine_pays(self) -> bool:
        return self._combined_in < _PAY_ROWS or self._combined_out * 4 <= self._combined_in * 3

    def _run_combine(self, rows: Any) -> Any:
        assert self._combine is not None
        rows = sort_rows(rows)
        sorted_rows = make_rows(*split_composite(rows.column("key"))) if self._composite else rows
        pairs = combine_rows(sorted_rows, self._combine)
        self._combined_in += len(rows)
        self._combined_out += len(pairs)
        if not pairs:
            return rows.slice(0, 0)
        try:
            return self._combined_rows(pairs)
        except (BadPair, BadValue, UnsupportedKey) as error:  # Not the map's, in whose time it is found.
            name = getattr(self._combine, "__qualname__", type(self._combine).__qualname__)
            raise TaskError(f"combine function {name}: {error}") from error

    def _combined_rows(self, pairs: list[Any]) -> Any:
        keys, values = unzip(pairs)
        if not self._composite:
            return make_rows(encode_keys(keys), value_column(values))
        composite = compose(encode_keys(keys), encode_values(keys, values, why=self._composite))
        return make_rows(composite, self._zeros(len(keys)))

    def _spill(self) -> None:
        """Held rows to one sorted run a reducer, in a file under the scratch directory."""
        path = self._scratch / f"spill-{len(self._spills)}.run"
        with PartitionFile(path) as file:
            for rows in self._partitions(concat_rows(self._held)):
                write_partition(file, [rows] if len(rows) else [], self._limits)
            file.finish()
        self._spills.append(
            [FileRun(path, *where) for where in zip(file.offsets, file.lengths, strict=True)],
        )
        self._held, self._held_bytes = [], 0

    def _partitions(self, rows: Any) -> Iterator[Any]:
        """Rows of each reducer in turn, sorted by key; equal keys in order of emission."""
        rows = sort_rows(rows)
        if self._reducers == 1:
            yield rows
            return
        keys = rows.column("key")
        where = self._partition_numbers(split_composite(keys)[0] if self._composite else keys)
        rows = rows.take(np.argsort(where, kind="stable"))
        ends = np.cumsum(np.bincount(where, minlength=self._reducers)).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield rows.slice(start, end - start)

    def _partition_numbers(self, keys: Any) -> Any:
        """The reducer of each row."""
        if self._partition_fn is None:
            numbers = partition_of(hash_column(keys), self._reducers)
            return numbers.astype(np.uint16) if self._reducers <= 65_536 else numbers  # 16 bits: radix sort.
        found = []
        for key in decode_keys(keys):
            number = self._partition_fn(key, self._reducers)
            if not isinstance(number, int) or not 0 <= number < self._reducers:
                allowed = f"an int from 0 to {self._reducers - 1}"
                raise TaskError(f"partition() gave {number!r:.100} for key {key!r:.200}, expected {allowed}")
            found.append(number)
        return np.array(found, np.uint32)

    def finish(self, counters: Callable[[], dict[str, int]] = dict) -> BlockSummary:
        """Merge what there is into the block file and give it its name; it is not synced. Call once.

        `counters`: to be kept in the file; asked for when nothing is combined any more.
        """
        self._flush()
        if self._fold is not None and len(self._held) > 1:
            self._held = [fold_rows(concat_rows(self._held), self._fold)]
        spills = len(self._spills)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        digest, rows = 0, 0
        with PartitionFile(self._path.with_suffix(".tmp")) as file:
            for batches in self._final_partitions():
                counted = _Digest(batches)
                rows += write_partition(file, counted, self._limits)
                digest += counted.digest
            digest &= (1 << 64) - 1
            size = file.publish(
                self._path, attempt=self._attempt, token=self._token, digest=digest, counters=counters()
            )
        for runs in self._spills:
            Path(getattr(runs[0], "path")).unlink(missing_ok=True)  # noqa: B009
        return BlockSummary(digest, rows, size, spills)

    def _final_partitions(self) -> Iterator[Iterable[Any]]:
        """For each reducer, its sorted batches."""
        held = concat_rows(self._held) if self._held else make_rows(KeyBuffer().take(), ValueBuffer(None).take())
        self._held = []
        for reducer, rows in enumerate(self._partitions(held)):
            if not self._spills:
                yield even_batches([rows] if len(rows) else [], self._limits)
                continue
            runs: list[Run] = [spill[reducer] for spill in self._spills]
            runs.append(RowsRun(rows, self._limits.batch_rows_max, batch_bytes(self._limits)))
            yield merge_all(runs, self._limits, self._scratch, self._fold)


class _Digest:
    """Batches passing by, summed up."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.digest = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.digest += rows_digest(batch.column("key"), batch.column("value"))
            yield batch
