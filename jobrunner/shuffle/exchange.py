"""What a reducer's slot and a worker's agent say to each other: `POST /blocks`.

    request:  msgpack of BlocksRequest
    answer:   for each map, in the order asked: a frame header, then `length` bytes of the partition

An answer that ends early is cut off: what came whole is good, the rest is asked for again.
"""

import struct
from enum import IntEnum

import msgspec

PATH = "/blocks"
MAPS_MAX = 2_000  # In one request: it stays far below what a server takes as a body.


class BlocksRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Partition `reducer` of these map outputs of a stage."""

    job: str
    stage: str
    reducer: int
    maps: list[tuple[int, int, int]]  # (partition, attempt, token)


class Status(IntEnum):
    OK = 0
    MISSING = 1
    CORRUPT = 2


HEADER = struct.Struct("<IBQIQ")  # Map partition, status, length, crc32 of the bytes, digest of the whole output.
