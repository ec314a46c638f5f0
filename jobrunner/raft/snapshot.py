"""A snapshot: the machine's bytes after an index, which replace the log up to there; as a file, and in pieces.

    file  magic 6 "JRSNAP", version u16, meta length u32, data length u64, crc u32 of all the rest, meta, data
    meta  msgpack: (index, term, members)

Everything is little-endian. The crc covers header, meta and data, so a file is whole and right or it is refused. The
same bytes go to a follower that is too far behind for the log, piece by piece, each with a crc of its own; the whole is
checked again before it replaces anything.
"""

import struct
import zlib
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from jobrunner.errors import CorruptData, LogTooNew
from jobrunner.raft.messages import Member, SnapshotPiece

VERSION = 1
_MAGIC = b"JRSNAP"
_HEAD = struct.Struct("<6sHIQ")
_CRC = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


class _Meta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    index: int
    term: int
    members: tuple[Member, ...]


_decoder = msgspec.msgpack.Decoder(_Meta)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`data` is the machine's, after the entry at `index`, which is of `term`."""

    index: int
    term: int
    members: tuple[Member, ...]
    data: bytes = field(repr=False)


class Source(Protocol):
    """A stored snapshot that can be read piece by piece, also when a newer one has replaced it."""

    index: int
    term: int
    size: int

    def read(self, offset: int, length: int) -> bytes: ...


def encode_snapshot(snapshot: Snapshot) -> bytes:
    meta = _encoder.encode(_Meta(snapshot.index, snapshot.term, snapshot.members))
    head = _HEAD.pack(_MAGIC, VERSION, len(meta), len(snapshot.data))
    crc = zlib.crc32(snapshot.data, zlib.crc32(meta, zlib.crc32(head)))
    return b"".join((head, _CRC.pack(crc), meta, snapshot.data))


def decode_snapshot(data: bytes, path: str) -> Snapshot:
    """Raises CorruptData if any bit of it is not as it was written, LogTooNew."""
    start = _HEAD.size + _CRC.size
    if len(data) < start or not data.startswith(_MAGIC):
        raise CorruptData(f"{path} is no snapshot", path=path, offset=0)
    _, version, meta_length, length = _HEAD.unpack_from(data)
    if version > VERSION:
        raise LogTooNew(f"{path}: snapshot version {version}; this program knows {VERSION}", path=path, version=version)
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    body = memoryview(data)[start:]
    if len(body) != meta_length + length or zlib.crc32(body, zlib.crc32(data[: _HEAD.size])) != crc:
        raise CorruptData(f"{path}: the snapshot is damaged or cut off", path=path, offset=0)
    try:
        meta = _decoder.decode(body[:meta_length])
    except msgspec.MsgspecError as error:
        raise LogTooNew(f"{path}: the snapshot is of a newer form ({error})", path=path) from None
    return Snapshot(meta.index, meta.term, meta.members, bytes(body[meta_length:]))


def piece_of(source: Source, *, term: int, offset: int, bytes_max: int) -> SnapshotPiece:
    data = source.read(offset, bytes_max)
    return SnapshotPiece(term, source.index, source.term, offset, source.size, zlib.crc32(data), data)


@dataclass(slots=True)
class Incoming:
    """A snapshot that arrives. Any mismatch starts again at what is here, or at 0."""

    index: int
    term: int
    size: int
    data: bytearray = field(default_factory=bytearray, repr=False)

    def is_of(self, piece: SnapshotPiece) -> bool:
        return (self.index, self.term, self.size) == (piece.index, piece.snapshot_term, piece.size)

    def add(self, piece: SnapshotPiece) -> Snapshot | None:
        """The snapshot, when this piece completes it. A piece that does not fit, or is damaged, adds nothing."""
        if piece.offset != len(self.data) or zlib.crc32(piece.data) != piece.crc or not piece.data:
            return None
        if len(self.data) + len(piece.data) > self.size:
            self.data.clear()
            return None
        self.data += piece.data
        if len(self.data) < self.size:
            return None
        try:
            snapshot = decode_snapshot(bytes(self.data), "a snapshot from the leader")
        except CorruptData:
            snapshot = None
        if snapshot is None or (snapshot.index, snapshot.term) != (self.index, self.term):
            self.data.clear()
            return None
        return snapshot
