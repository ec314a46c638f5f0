"""Which reducer a key belongs to, and what a map output amounts to: one versioned hash, jrhash1.

jrhash1 of an encoded key is 64 bits, the same on every machine, in every process and in every version that calls it
1: the golden values in tests never change. `partition = (hash >> 32) * R >> 32`.
The digest of a map output is the sum modulo 2^64 of a hash of each row: it does not depend on the order of rows, so it
tells whether a map that ran again gave the same rows.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from jobrunner.shuffle.columns import column_offsets, is_mean

HASH_VERSION = 1

Words = np.ndarray[Any, np.dtype[np.uint64]]

_M1, _M2, _G = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_MASK = np.array([(1 << (8 * i)) - 1 for i in range(8)] + [(1 << 64) - 1], dtype=np.uint64)
_LONG = 256  # Rows longer than this are hashed one by one, so that one long key does not cost a pass for each 8 bytes.


def _mix(x: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def hash_column(column: Any) -> Words:
    """jrhash1 of each row of a binary or large_binary array without nulls."""
    if len(column) == 0:
        return np.empty(0, np.uint64)
    offsets = column_offsets(column)
    lengths, start = offsets[1:] - offsets[:-1], int(offsets[0])
    size = int(offsets[-1]) - start
    padded = np.zeros(size + 8, np.uint8)  # So that 8-byte loads never overrun.
    if size:
        padded[:size] = np.frombuffer(column.buffers()[2], dtype=np.uint8)[start : start + size]
    words = np.lib.stride_tricks.as_strided(padded[:8].view("<u8"), shape=(size + 1,), strides=(1,))
    starts = offsets[:-1] - start
    hashes = _mix((lengths.astype(np.uint64) + np.uint64(1)) * _G)
    rows = np.flatnonzero(lengths <= _LONG)
    at = 0
    while True:
        rows = rows[lengths[rows] > at]
        if not len(rows):
            break
        word = words[starts[rows] + at] & _MASK[np.minimum(lengths[rows] - at, 8)]
        hashes[rows] = _mix((hashes[rows] ^ word) * _G)
        at += 8
    for row in np.flatnonzero(lengths > _LONG).tolist():
        body = padded[starts[row] : starts[row] + lengths[row]]
        digest = hashlib.blake2b(body.data, digest_size=8).digest()
        hashes[row] = np.uint64(int.from_bytes(digest, "little"))
    return hashes


def partition_of(hashes: Words, reducers: int) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """The reducer of each key hash, in [0, reducers). `reducers` is at most 2^32."""
    return (((hashes >> np.uint64(32)) * np.uint64(reducers)) >> np.uint64(32)).astype(np.uint32)


def rows_digest(keys: Any, values: Any) -> int:
    """Sum modulo 2^64 over rows of hash(key, value); `values` is of any type of columns.py but ENCODED."""
    return int(np.add.reduce(_mix(_mix(hash_column(keys)) ^ _hash_values(values)), dtype=np.uint64))


def _hash_values(values: Any) -> Words:
    if pa.types.is_large_binary(values.type):
        return hash_column(values) * _M2
    if is_mean(values):
        return _mix(_hash_values(values.field(0)) ^ _hash_values(values.field(1)) * _M2)
    bits: Words = np.frombuffer(values.buffers()[1], np.uint64)[values.offset : values.offset + len(values)]
    return _mix(bits + (_G if pa.types.is_int64(values.type) else _M1))
