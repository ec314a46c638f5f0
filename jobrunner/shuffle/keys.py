"""Keys: one canonical encoding, whose byte order is the order of keys.

    encoded = kind (1 byte) + body          kinds in order: None bool int float Decimal str bytes date datetime tuple

Grouping, ordering and hashing use these bytes, never Python's `==`, `<` or `hash()`: `True`, `1`, `1.0` and `"1"` are
four keys. Within a kind:
- int by value, any size. float by value; -0.0 is 0.0; every NaN is one key, above inf.
- Decimal by value, then by exponent (1.00 before 1.0: two keys); -0 before 0; every quiet NaN is one key, the last.
- str by code point (lone surrogates included); bytes by byte.
- datetime: naive ones by their clock, then aware ones by instant, then by offset (named zones come back as offsets).
- tuple element by element; a prefix is before what it begins.
A subclass of str, int or float (an IntEnum, a numpy.float64) is the plain value it holds. Subclasses of the others, and
any other type, are refused: what came back would not be what was given.
A str is its UTF-8 behind the byte 0x06, so joining keys with "\\x06" encodes a whole list of them at once.
"""

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobrunner.errors import TaskError

STR_TAG = "\x06"  # What a whole list of str keys is joined with.

_NONE, _BOOL, _INT, _FLOAT, _DECIMAL = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"
_STR, _BYTES, _DATE, _NAIVE, _AWARE, _TUPLE = b"\x06", b"\x07", b"\x08", b"\x09", b"\x0a", b"\x0b"

_BIG = struct.Struct(">Q")
_TOP = 1 << 63
_FULL = (1 << 64) - 1
_EPOCH = datetime(1, 1, 1)
_EPOCH_UTC = datetime(1, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FLIP = bytes(255 - i for i in range(256))  # Byte-wise complement: turns an order round.
_NAN_BITS = 0x7FF8000000000000


class UnsupportedKey(TaskError):
    """A key of a type that has no canonical encoding. Fields `value` (its repr, shortened), `kind` (type name)."""


def _unsupported(key: object, why: str = "") -> UnsupportedKey:
    kind = f"{type(key).__module__}.{type(key).__qualname__}".removeprefix("builtins.")
    text = repr(key)
    shown = text if len(text) <= 200 else text[:200] + "..."
    allowed = "None, bool, int, float, str, bytes, date, datetime, Decimal and tuples of these"
    return UnsupportedKey(f"key {shown} of type {kind}{why} (keys are {allowed})", value=shown, kind=kind)


def encode_key(key: object) -> bytes:
    """The canonical encoding. Raises UnsupportedKey naming the value and its type."""
    if type(key) is str:
        return _STR + key.encode("utf-8", "surrogatepass")
    return _encode_plain(key, nested=False)


def _encode_plain(key: object, *, nested: bool) -> bytes:
    encoder = _ENCODERS.get(type(key))
    if encoder is None:
        encoder = _encoder_of_subclass(key)
    return encoder(key, nested)


def _encoder_of_subclass(key: object) -> Callable[[Any, bool], bytes]:
    for kind in (str, int, float):
        if isinstance(key, kind):
            return _ENCODERS[kind]
    raise _unsupported(key)


def _encode_int(key: int, nested: bool) -> bytes:
    """Class 0x80 for 64-bit numbers (8 bytes), around them 0x7f and 0x81 with length and magnitude."""
    key = int(key)
    if -_TOP <= key < _TOP:
        return _INT + b"\x80" + _BIG.pack(key + _TOP)
    magnitude = abs(key).to_bytes((abs(key).bit_length() + 7) // 8, "big")
    body = _BIG.pack(len(magnitude)) + magnitude
    return _INT + b"\x81" + body if key > 0 else _INT + b"\x7f" + body.translate(_FLIP)


def _encode_float(key: float, nested: bool) -> bytes:
    bits = _NAN_BITS if math.isnan(key) else int(_BIG.unpack(struct.pack(">d", key + 0.0))[0])
    return _FLOAT + _BIG.pack(bits ^ _FULL if bits & _TOP else bits | _TOP)


def _encode_decimal(key: Decimal, nested: bool) -> bytes:
    """Classes: 0 -inf, 1 negative, 2 zero, 3 positive, 4 inf, 5 NaN; then adjusted exponent, digits, exponent."""
    if key.is_snan():
        raise _unsupported(key, ", a signalling NaN")
    if key.is_nan():
        return _DECIMAL + b"\x05"
    sign, digits, exponent = key.as_tuple()
    if not isinstance(exponent, int):
        return _DECIMAL + (b"\x00" if sign else b"\x04")
    last = _BIG.pack(exponent + _TOP)
    if not any(digits):
        return _DECIMAL + b"\x02" + (b"\x00" if sign else b"\x01") + last
    text = bytes(digit + 1 for digit in digits).lstrip(b"\x01")
    size = _BIG.pack(len(text) + exponent + _TOP)
    value = size + text.rstrip(b"\x01") + b"\x00"
    return _DECIMAL + (b"\x01" + value.translate(_FLIP) if sign else b"\x03" + value) + last


def _encode_str(key: str, nested: bool) -> bytes:
    body = str.encode(key, "utf-8", "surrogatepass")
    return _STR + _nest(body) if nested else _STR + body


def _encode_bytes(key: bytes, nested: bool) -> bytes:
    return _BYTES + _nest(key) if nested else _BYTES + key


def _nest(body: bytes) -> bytes:
    """Inside a tuple text has an end: 0x00. A zero byte of its own is 00 ff, above any end (a kind is below ff)."""
    return body.replace(b"\x00", b"\x00\xff") + b"\x00"


def _encode_datetime(key: datetime, nested: bool) -> bytes:
    offset = key.utcoffset()
    if offset is None:
        return _NAIVE + _BIG.pack((key.replace(tzinfo=None) - _EPOCH) // _MICROSECOND + _TOP)
    clock = (key.replace(tzinfo=None) - _EPOCH) // _MICROSECOND
    shift = offset // _MICROSECOND
    return _AWARE + _BIG.pack(clock - shift + _TOP) + _BIG.pack(shift + _TOP)


def _encode_tuple(key: tuple[object, ...], nested: bool) -> bytes:
    return _TUPLE + b"".join([_encode_plain(element, nested=True) for element in key]) + b"\x00"


_ENCODERS: dict[type, Callable[[Any, bool], bytes]] = {
    type(None): lambda key, nested: _NONE,
    bool: lambda key, nested: _BOOL + (b"\x01" if key else b"\x00"),
    int: _encode_int,
    float: _encode_float,
    Decimal: _encode_decimal,
    str: _encode_str,
    bytes: _encode_bytes,
    date: lambda key, nested: _DATE + key.toordinal().to_bytes(4, "big"),
    datetime: _encode_datetime,
    tuple: _encode_tuple,
}


def decode_key(data: bytes) -> Any:
    """The key that `data` encodes."""
    if data[0] == 0x06:
        return data[1:].decode("utf-8", "surrogatepass")
    if data[0] == 0x07:
        return data[1:]
    key, end = _decode_at(data, 0)
    assert end == len(data), data
    return key


def _decode_at(data: bytes, at: int) -> tuple[Any, int]:
    """A nested element that begins at `at`, and where it ends."""
    kind, at = data[at], at + 1
    if kind in (0x06, 0x07):
        return _decode_text(data, at, text=kind == 0x06)
    if kind == 0x0B:
        elements = []
        while data[at] != 0:
            element, at = _decode_at(data, at)
            elements.append(element)
        return tuple(elements), at + 1
    return _DECODERS[kind](data, at)


def _decode_text(data: bytes, at: int, *, text: bool) -> tuple[Any, int]:
    end = data.index(0, at)
    while end + 1 < len(data) and data[end + 1] == 0xFF:
        end = data.index(0, end + 2)
    body = data[at:end].replace(b"\x00\xff", b"\x00")
    return (body.decode("utf-8", "surrogatepass") if text else body), end + 1


def _decode_int(data: bytes, at: int) -> tuple[int, int]:
    kind, at = data[at], at + 1
    if kind == 0x80:
        return int(_BIG.unpack_from(data, at)[0]) - _TOP, at + 8
    head = data[at : at + 8]
    size = int(_BIG.unpack(head if kind == 0x81 else head.translate(_FLIP))[0])
    body = data[at + 8 : at + 8 + size]
    magnitude = int.from_bytes(body if kind == 0x81 else body.translate(_FLIP), "big")
    return (magnitude if kind == 0x81 else -magnitude), at + 8 + size


def _decode_float(data: bytes, at: int) -> tuple[float, int]:
    bits = int(_BIG.unpack_from(data, at)[0])
    bits = bits ^ _TOP if bits & _TOP else bits ^ _FULL
    return float(struct.unpack(">d", _BIG.pack(bits))[0]), at + 8


def _decode_decimal(data: bytes, at: int) -> tuple[Decimal, int]:
    kind, at = data[at], at + 1
    if kind in (0, 4, 5):
        return Decimal({0: "-Infinity", 4: "Infinity", 5: "NaN"}[kind]), at
    if kind == 2:
        exponent = int(_BIG.unpack_from(data, at + 1)[0]) - _TOP
        return Decimal((1 - data[at], (0,), exponent)), at + 9
    size = data[at : at + 8]
    end = data.index(b"\x00" if kind == 3 else b"\xff", at + 8)
    text = data[at + 8 : end]
    if kind == 1:
        size, text = size.translate(_FLIP), text.translate(_FLIP)
    exponent = int(_BIG.unpack_from(data, end + 1)[0]) - _TOP
    count = int(_BIG.unpack(size)[0]) - _TOP - exponent
    digits = tuple(digit - 1 for digit in text) + (0,) * (count - len(text))
    return Decimal((0 if kind == 3 else 1, digits, exponent)), end + 9


def _decode_aware(data: bytes, at: int) -> tuple[datetime, int]:
    instant = int(_BIG.unpack_from(data, at)[0]) - _TOP
    shift = int(_BIG.unpack_from(data, at + 8)[0]) - _TOP
    zone = UTC if shift == 0 else timezone(timedelta(microseconds=shift))
    return (_EPOCH + timedelta(microseconds=instant + shift)).replace(tzinfo=zone), at + 16


_DECODERS: dict[int, Callable[[bytes, int], tuple[Any, int]]] = {
    0x01: lambda data, at: (None, at),
    0x02: lambda data, at: (data[at] == 1, at + 1),
    0x03: _decode_int,
    0x04: _decode_float,
    0x05: _decode_decimal,
    0x08: lambda data, at: (date.fromordinal(int.from_bytes(data[at : at + 4], "big")), at + 4),
    0x09: lambda data, at: (_EPOCH + timedelta(microseconds=int(_BIG.unpack_from(data, at)[0]) - _TOP), at + 8),
    0x0A: _decode_aware,
}


# --- whole lists at once: the same bytes as one by one ---------------------------------------------------------------


def joined_keys(text: str, count: int) -> Any:
    """`count` str keys joined with STR_TAG, as an encoded column (pa.BinaryArray). No key may hold STR_TAG."""
    raw = np.frombuffer((STR_TAG + text).encode("utf-8", "surrogatepass"), np.uint8)
    if len(raw) >= 1 << 31:
        raise UnsupportedKey(f"{len(raw)} bytes of keys in one batch; lower shuffle.buffer_bytes_max")
    offsets = np.empty(count + 1, np.int32)
    offsets[:-1] = np.flatnonzero(raw == 0x06)
    offsets[-1] = len(raw)
    return pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(raw)])


def encode_keys(keys: Sequence[Any]) -> Any:
    """A list of keys as an encoded column (pa.BinaryArray). Raises UnsupportedKey."""
    kinds = set(map(type, keys))
    if kinds == {str}:
        text = STR_TAG.join(keys)
        if text.count(STR_TAG) == len(keys) - 1:
            return joined_keys(text, len(keys))
    if kinds == {int}:
        try:
            numbers = np.array(array("q", keys))
        except OverflowError:
            return pa.array(map(encode_key, keys), pa.binary())
        return encode_ints(numbers)
    if kinds == {float}:
        bits = (np.array(keys, np.float64) + 0.0).view(np.uint64).copy()
        bits[np.isnan(np.array(keys, np.float64))] = np.uint64(_NAN_BITS)
        return _fixed(_FLOAT, np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(_TOP)))
    return pa.array(list(map(encode_key, keys)), pa.binary())


def encode_ints(numbers: "np.ndarray[Any, np.dtype[np.int64]]") -> Any:
    """int64 keys as an encoded column."""
    return _fixed(_INT + b"\x80", numbers.view(np.uint64) ^ np.uint64(_TOP))


def _fixed(head: bytes, words: "np.ndarray[Any, np.dtype[np.uint64]]") -> Any:
    """A column of `head` + the word, big-endian."""
    width = len(head) + 8
    cells = np.empty((len(words), width), np.uint8)
    cells[:, : len(head)] = np.frombuffer(head, np.uint8)
    cells[:, len(head) :] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    offsets = np.arange(0, (len(words) + 1) * width, width, dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), len(words), [None, pa.py_buffer(offsets), pa.py_buffer(cells)])


def decode_keys(column: Any) -> list[Any]:
    """The keys of an encoded column (pa.BinaryArray), as a list."""
    tags = pc.binary_slice(column, 0, 1)
    if len(column) and pc.all(pc.equal(tags, pa.scalar(_STR, pa.binary()))).as_py():
        try:
            texts: list[Any] = pc.binary_slice(column, 1).cast(pa.string()).to_pylist()
            return texts
        except pa.ArrowInvalid:  # Lone surrogates are not UTF-8 to Arrow.
            pass
    return list(map(decode_key, column.to_pylist()))
