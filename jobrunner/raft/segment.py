"""The format of a log segment: a header, then frames, each a record of what became durable together.

    header  magic 6 "JRRAFT", version u16, member 32 (uuid, zero-padded), first_index u64, seed u32, crc u32 of these
    frame   magic 4 "JRF1", length u32, seed u32, check u32, head u32, payload
    payload kind 1 byte, then msgpack: (term, vote, commit, [(index, term, kind, data), ...])

All integers are little-endian. `check` is the CRC-32 of the payload, started from `seed`, which is the `check` of the
frame before it (of the segment before it, for the first; that is also the header's `seed`): no frame can be lost,
doubled or moved unseen. `head` is the CRC-32 of the frame's first 16 bytes, started from the header's crc, so that a
length can be believed, and so that a frame of another file, copied into a payload, is none of this file's.

The header's layout is fixed for ever; a higher version or an unknown kind of payload means a newer program.

What a crash can leave: at most one frame is written and not yet synced, so only the last frame of the last segment can
be torn. It is taken for torn if it is cut off by the end of the file, or if one of the 512-byte sectors that it lies in
holds only zeros of it (sectors are written whole; a hole is one that was not), and if no whole frame follows.
Anything else that does not check is damage. Source: etcd, server/storage/wal.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from jobrunner.errors import CorruptData, LogTooNew
from jobrunner.ids import MemberId
from jobrunner.raft.messages import Entry
from jobrunner.raft.ready import HardState, Save

VERSION = 1
RECORD = 1  # The kind of payload that this version writes.
SECTOR = 512

_HEADER = struct.Struct("<6sH32sQI")
_FRAME = struct.Struct("<4sIII")
_CRC = struct.Struct("<I")
_FRAME_MAGIC = b"JRF1"
HEADER_BYTES = _HEADER.size + _CRC.size
FRAME_BYTES = _FRAME.size + _CRC.size


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    term: int
    vote: MemberId | None
    commit: int
    entries: tuple[Entry, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Record)


@dataclass(frozen=True, slots=True)
class Header:
    member: MemberId
    first_index: int  # Of the next entry when the segment was begun.
    seed: int
    crc: int  # Of the header itself; starts every frame's `head`.


@dataclass(frozen=True, slots=True)
class Frame:
    offset: int
    length: int  # Of all of it.
    check: int
    save: Save


def encode_header(member: MemberId, *, first_index: int, seed: int) -> tuple[bytes, Header]:
    name = member.encode("ascii")
    assert 0 < len(name) <= 32, member
    data = _HEADER.pack(b"JRRAFT", VERSION, name, first_index, seed)
    crc = zlib.crc32(data)
    return data + _CRC.pack(crc), Header(member, first_index, seed, crc)


def decode_header(data: bytes, path: str) -> Header:
    """Raises CorruptData, LogTooNew. A segment gets its name when its header is durable, so none is ever torn."""
    if len(data) < HEADER_BYTES:
        raise CorruptData(f"{path}: {len(data)} bytes are no log segment", path=path, offset=0)
    magic, version, name, first_index, seed = _HEADER.unpack_from(data)
    (crc,) = _CRC.unpack_from(data, _HEADER.size)
    if magic != b"JRRAFT" or crc != zlib.crc32(data[: _HEADER.size]):
        raise CorruptData(f"{path}: the header of the log segment is damaged (offset 0)", path=path, offset=0)
    if version > VERSION:
        raise LogTooNew(f"{path}: log version {version}; this program knows {VERSION}", path=path, version=version)
    return Header(MemberId(name.rstrip(b"\0").decode("ascii")), first_index, seed, crc)


def encode_frame(save: Save, header: Header, seed: int) -> tuple[bytes, int]:
    """The frame's bytes and its `check`, the seed of the next."""
    state = save.state
    payload = bytes((RECORD,)) + _encoder.encode(_Record(state.term, state.vote, state.commit, save.entries))
    check = zlib.crc32(payload, seed)
    head = _FRAME.pack(_FRAME_MAGIC, len(payload), seed, check)
    return b"".join((head, _CRC.pack(zlib.crc32(head, header.crc)), payload)), check


def decode_payload(payload: bytes, path: str, offset: int) -> Save:
    """The record of a frame that checks. Raises LogTooNew for what a newer program wrote."""
    if payload[:1] != bytes((RECORD,)):
        raise LogTooNew(f"{path}: record of unknown kind {payload[:1].hex()} at offset {offset}", path=path)
    try:
        record = _decoder.decode(payload[1:])
    except msgspec.MsgspecError as error:
        raise LogTooNew(f"{path}: record at offset {offset} is of a newer form ({error})", path=path) from None
    return Save(HardState(record.term, record.vote, record.commit), record.entries)


def read_frames(data: bytes, header: Header, *, path: str, is_last: bool) -> Iterator[Frame]:
    """The frames of a whole segment, in order; stops before a torn tail, which only the last segment may have.

    Raises CorruptData with file and offset for any damage.
    """
    offset, seed = HEADER_BYTES, header.seed
    while offset < len(data):
        length = check_frame(data, offset, header)
        if length is None:
            if not (is_last and _is_torn(data, offset, header) and not _frame_follows(data, offset, header)):
                raise CorruptData(f"{path}: damaged record at offset {offset}", path=path, offset=offset)
            return
        _, _, its_seed, check = _FRAME.unpack_from(data, offset)
        if its_seed != seed:
            raise CorruptData(f"{path}: records are missing before offset {offset}", path=path, offset=offset)
        payload = data[offset + FRAME_BYTES : offset + length]
        yield Frame(offset, length, check, decode_payload(payload, path, offset))
        offset, seed = offset + length, check


def _head_length(data: bytes, offset: int, header: Header) -> int | None:
    """The length of the frame at `offset` if its head checks."""
    if offset + FRAME_BYTES > len(data):
        return None
    magic, length, _, _ = _FRAME.unpack_from(data, offset)
    (head,) = _CRC.unpack_from(data, offset + _FRAME.size)
    if magic != _FRAME_MAGIC or head != zlib.crc32(data[offset : offset + _FRAME.size], header.crc):
        return None
    return FRAME_BYTES + int(length)


def check_frame(data: bytes, offset: int, header: Header) -> int | None:
    """The length of the frame at `offset` if all of it checks."""
    length = _head_length(data, offset, header)
    if length is None or offset + length > len(data):
        return None
    _, _, seed, check = _FRAME.unpack_from(data, offset)
    return length if zlib.crc32(data[offset + FRAME_BYTES : offset + length], seed) == check else None


def _is_torn(data: bytes, offset: int, header: Header) -> bool:
    """Whether the bytes from `offset` to the end can be one frame whose write did not complete."""
    if offset + FRAME_BYTES > len(data):
        return True
    length = _head_length(data, offset, header)
    if length is not None and offset + length > len(data):
        return True
    if length is not None and offset + length < len(data):
        return False
    start = offset
    while start < len(data):
        end = min(start // SECTOR * SECTOR + SECTOR, len(data))
        if not any(data[start:end]):
            return True
        start = end
    return False


def _frame_follows(data: bytes, offset: int, header: Header) -> bool:
    """Whether any whole frame lies after `offset`: then what is at `offset` was durable once."""
    place = data.find(_FRAME_MAGIC, offset + 1)
    while place >= 0:
        if check_frame(data, place, header) is not None:
            return True
        place = data.find(_FRAME_MAGIC, place + 1)
    return False
