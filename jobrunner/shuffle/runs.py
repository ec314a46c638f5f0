"""Runs: sorted rows of one reducer, wherever they are: in memory, in a range of a file, fetched bytes.

A run opens when a merge begins to read it and closes at its end, so that thousands of runs do not hold thousands of
files. Their bytes are Arrow IPC streams of rows in canonical key order: mostly one, another where the type of the
values changes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from jobrunner.errors import CorruptData
from jobrunner.shuffle.blocks import PartitionFile
from jobrunner.shuffle.columns import concat_rows, cut_rows, rows_bytes
from jobrunner.shuffle.limits import ShuffleLimits, batch_bytes


class Run(Protocol):
    """Sorted rows of one reducer. May be read more than once."""

    def batches(self) -> Iterator[Any]:
        """Record batches (key, value), none empty. Raises CorruptData."""
        ...


@dataclass(frozen=True, slots=True)
class RowsRun:
    """Rows in memory."""

    rows: Any = field(repr=False)
    rows_max: int
    bytes_max: int

    def batches(self) -> Iterator[Any]:
        return cut_rows(self.rows, rows_max=self.rows_max, bytes_max=self.bytes_max)


@dataclass(frozen=True, slots=True)
class BytesRun:
    """An IPC stream in memory; `source` names it in errors."""

    data: bytes = field(repr=False)
    source: str

    def batches(self) -> Iterator[Any]:
        return _read_batches(pa.py_buffer(self.data), self.source)


@dataclass(frozen=True, slots=True)
class FileRun:
    """An IPC stream in a range of a file, mapped into memory while it is read. The range was checked before."""

    path: Path
    offset: int
    length: int

    def batches(self) -> Iterator[Any]:
        if not self.length:
            return
        with pa.memory_map(str(self.path), "r") as mapped:
            mapped.seek(self.offset)
            yield from _read_batches(mapped.read_buffer(self.length), str(self.path))


def _read_batches(buffer: Any, name: str) -> Iterator[Any]:
    source = pa.BufferReader(buffer)
    options = pa.ipc.IpcReadOptions(use_threads=False)
    try:
        while source.tell() < buffer.size:
            for batch in pa.ipc.open_stream(source, options=options):
                if len(batch):
                    yield batch
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptData(f"{name}: not a stream of rows: {error}", path=name) from error


def write_partition(file: PartitionFile, batches: Iterable[Any], limits: ShuffleLimits) -> int:
    """Write sorted batches as the next partition of `file`; return the number of rows.

    Small batches are joined and large ones cut, so that a reader has one batch of bounded size at a time.
    """
    options = pa.ipc.IpcWriteOptions(
        compression=None if limits.compression == "none" else limits.compression, use_threads=False
    )
    file.begin()
    writer, schema, count = None, None, 0
    for batch in even_batches(batches, limits):
        if writer is None or batch.schema != schema:
            if writer is not None:
                writer.close()
            writer, schema = pa.ipc.new_stream(file, batch.schema, options=options), batch.schema
        writer.write_batch(batch)
        count += len(batch)
    if writer is not None:
        writer.close()
    file.end(count)
    return count


def even_batches(batches: Iterable[Any], limits: ShuffleLimits) -> Iterator[Any]:
    """The same rows in batches of batch_rows_max rows, or fewer where they are large or their type changes."""
    rows_max, bytes_max = limits.batch_rows_max, batch_bytes(limits)
    held: list[Any] = []
    count = size = 0
    for batch in batches:
        if held and held[-1].schema != batch.schema:
            yield from cut_rows(concat_rows(held), rows_max=rows_max, bytes_max=bytes_max)
            held, count, size = [], 0, 0
        held.append(batch)
        count, size = count + len(batch), size + rows_bytes(batch)
        if count >= rows_max or size >= bytes_max:
            *whole, rest = cut_rows(concat_rows(held), rows_max=rows_max, bytes_max=bytes_max)
            yield from whole
            held, count, size = [rest], len(rest), rows_bytes(rest)
    if held:
        yield from cut_rows(concat_rows(held), rows_max=rows_max, bytes_max=bytes_max)
