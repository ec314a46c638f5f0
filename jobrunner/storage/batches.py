"""Text in for batch functions: pieces of files to record batches with one column, `line` (string).

Lines are those of readers.py, cut from the same bytes; a batch holds about 16 MiB of them, because grouping a few large
batches is faster than many small ones.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from jobrunner.storage.readers import BadInput, LineReader, PlannedFile, PlannedPiece

BATCH_BYTES = 1 << 24


class BatchReader(LineReader):
    """Iterate with `batches`; `place` speaks of the batch given out last."""

    _held_bytes = 0

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Record batches, none empty. Raises what LineReader raises."""
        return map(self._batch, self._pieces_of_bytes())

    def _whole_lines(self, file: BinaryIO, planned: PlannedFile, piece: PlannedPiece) -> Iterator[bytes]:
        held: list[bytes] = []
        for data in super()._whole_lines(file, planned, piece):
            held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes >= BATCH_BYTES:
                whole, held, self._held_bytes = b"".join(held), [], 0
                yield whole
        self._held_bytes = 0
        if held:
            yield b"".join(held)

    def _too_long(self, offset: int) -> None:
        super()._too_long(offset + self._held_bytes)

    def _batch(self, data: bytes) -> pa.RecordBatch:
        try:
            if not data.isascii():
                data.decode("utf-8")
        except UnicodeDecodeError as error:
            data = self._mended(data, error)
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        return pa.RecordBatch.from_arrays([lines_column(data)], names=["line"])

    def _mended(self, data: bytes, error: UnicodeDecodeError) -> bytes:
        try:
            return self._decode_bad(data, error).encode()
        except UnicodeEncodeError:
            raise BadInput(
                f"{self.url}: byte {data[error.start]:#04x} is not UTF-8, and batch functions take nothing else "
                "(input.errors = surrogateescape is for functions of one line)",
                url=self.url, offset=self.place(0).offset,
            ) from error  # fmt: skip


def lines_column(data: bytes) -> pa.Array:
    """Lines of UTF-8 text that is not empty; the last one need not end."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    cuts = np.empty(2 * len(ends) + 1, np.int32)  # Line, line end, line, line end ...
    cuts[0], cuts[1::2], cuts[2::2] = 0, ends, np.minimum(ends + 1, len(data))
    parts = pa.Array.from_buffers(pa.string(), 2 * len(ends), [None, pa.py_buffer(cuts), pa.py_buffer(data)])
    return parts.take(pa.array(np.arange(0, 2 * len(ends), 2)))
