"""The block file: the output of one map attempt, on the disk of the worker that ran it.

    magic (8) │ partition 0: Arrow IPC stream │ partition 1 ... │ index: msgpack │ trailer
    trailer: index offset u64, index length u32, crc32 of index u32, magic (8), little-endian

A partition without rows has length 0 and no stream. Rows of a partition are in canonical key order, equal keys in the
order of emission. The file is written under a temporary name and renamed, so whatever has the name was whole; it is not
synced, so after a power cut it may be torn: index and partitions carry checksums, and a damaged file is no file (the
map can run again). Name: JOB/STAGE/<partition>-<attempt>-<token>.jrb under the worker's blocks directory.
Nothing here reads or writes a row, so it needs no pyarrow: the agent serves and scans these files.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from jobrunner.control.messages import BlockOffer
from jobrunner.errors import CorruptData
from jobrunner.failpoints import failpoint
from jobrunner.ids import AttemptId, Token

SUFFIX = ".jrb"
PIECE_BYTES = 1 << 18  # Read at a time, so that no file is ever whole in memory.

_MAGIC = b"JRBLOCK1"
_TRAILER = struct.Struct("<QII8s")


class BlockIndex(msgspec.Struct, frozen=True, array_like=True):
    """What a block file says of itself. Columns have one entry a reducer."""

    attempt: AttemptId
    token: Token
    digest: int
    offsets: list[int]
    lengths: list[int]
    rows: list[int]
    checksums: list[int]  # crc32 of the partition's bytes.
    counters: dict[str, int] = {}  # The map's, for whoever finds the file before its end was reported.


_decoder = msgspec.msgpack.Decoder(BlockIndex)


def block_path(root: Path, attempt: AttemptId, token: Token) -> Path:
    """Where the block file of this attempt is under the blocks directory `root`."""
    return root / attempt.job / attempt.stage / f"{attempt.partition}-{attempt.attempt}-{token}{SUFFIX}"


class PartitionFile:
    """A file under construction: partitions one after another, each with length, rows and checksum.

    Write a partition between `begin` and `end`; it is a binary file to whoever writes rows. Leaving the `with` block
    without `finish` deletes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.rows: list[int] = []
        self.checksums: list[int] = []
        self._file: BinaryIO = open(path, "wb", buffering=1 << 18)  # noqa: SIM115  closed by __exit__ or finish
        self._position = self._file.write(_MAGIC)
        self._checksum = 0
        self._finished = False

    def __enter__(self) -> "PartitionFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._finished:
            self.path.unlink(missing_ok=True)

    def begin(self) -> None:
        self.offsets.append(self._position)
        self._checksum = 0

    def write(self, data: "bytes | memoryview") -> int:
        self._checksum = zlib.crc32(data, self._checksum)
        count = self._file.write(data)
        self._position += count
        return count

    def end(self, rows: int) -> None:
        self.lengths.append(self._position - self.offsets[-1])
        self.rows.append(rows)
        self.checksums.append(self._checksum)

    # What pyarrow asks of a file.
    closed = False

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """All partitions are written and stay: a spill is only read by the process that made it."""
        self._file.close()
        self._finished = True

    def publish(
        self, path: Path, *, attempt: AttemptId, token: Token, digest: int, counters: dict[str, int] | None = None
    ) -> int:
        """Add the index and give the file its name; return its size in bytes."""
        index = msgspec.msgpack.encode(
            BlockIndex(attempt, token, digest, self.offsets, self.lengths, self.rows, self.checksums, counters or {})
        )
        self._file.write(index)
        self._file.write(_TRAILER.pack(self._position, len(index), zlib.crc32(index), _MAGIC))
        self._file.close()
        failpoint("map.block.temp")
        os.replace(self.path, path)
        self._finished = True
        failpoint("map.block.after")
        return self._position + len(index) + _TRAILER.size


def read_index(path: Path) -> BlockIndex:
    """The index of a block file. Raises CorruptData naming the file, FileNotFoundError if there is none."""
    with open(path, "rb") as file:
        return _index_of(file, path)


def _index_of(file: BinaryIO, path: Path) -> BlockIndex:
    size = file.seek(0, os.SEEK_END)
    if size < len(_MAGIC) + _TRAILER.size:
        raise CorruptData(f"{path}: {size} bytes are no block file", path=str(path))
    file.seek(size - _TRAILER.size)
    offset, length, checksum, magic = _TRAILER.unpack(file.read(_TRAILER.size))
    if magic != _MAGIC or offset + length + _TRAILER.size != size:
        raise CorruptData(f"{path}: not a block file, or torn", path=str(path))
    file.seek(offset)
    data = file.read(length)
    if zlib.crc32(data) != checksum:
        raise CorruptData(f"{path}: the index is damaged", path=str(path))
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise CorruptData(f"{path}: the index is not readable: {error}", path=str(path)) from error


def read_range(path: Path, offset: int, length: int) -> Iterator[bytes]:
    """The bytes of a range, in pieces. Raises CorruptData if the file ends before."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while length:
            data = file.read(min(length, PIECE_BYTES))
            if not data:
                raise CorruptData(f"{path}: ends {length} bytes early", path=str(path))
            length -= len(data)
            yield data


def check_partition(path: Path, index: BlockIndex, partition: int) -> None:
    """Read a partition's bytes and compare their checksum; nothing is kept. Raises CorruptData."""
    checksum = 0
    for data in read_range(path, index.offsets[partition], index.lengths[partition]):
        checksum = zlib.crc32(data, checksum)
    if checksum != index.checksums[partition]:
        raise CorruptData(f"{path}: partition {partition} is damaged", path=str(path), partition=partition)


def read_partition_bytes(path: Path, partition: int, index: BlockIndex | None = None) -> bytes:
    """A partition's bytes (an Arrow IPC stream, or nothing), checked. Raises CorruptData, FileNotFoundError."""
    index = index or read_index(path)
    data = b"".join(read_range(path, index.offsets[partition], index.lengths[partition]))
    if zlib.crc32(data) != index.checksums[partition]:
        raise CorruptData(f"{path}: partition {partition} is damaged", path=str(path), partition=partition)
    return data


def scan_blocks(root: Path) -> list[BlockOffer]:
    """Every whole block file under `root`, by attempt; damaged, misnamed and temporary ones are deleted.

    Runs at the start of an agent, before any attempt. Only the index is checked here: a damaged partition is found by
    the reducer that reads it.
    """
    offers = []
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            offer = _offer(root, path) if name.endswith(SUFFIX) else None
            if offer is None:
                path.unlink(missing_ok=True)
            else:
                offers.append(offer)
    return sorted(offers, key=lambda offer: (offer.attempt, offer.token))


def _offer(root: Path, path: Path) -> BlockOffer | None:
    try:
        index = read_index(path)
    except (CorruptData, OSError):
        return None
    if block_path(root, index.attempt, index.token) != path:
        return None
    return BlockOffer(
        index.attempt, index.token, index.digest, sum(index.rows), path.stat().st_size, index.counters
    )  # fmt: skip
