"""The block server: partitions of block files to reducers on other workers. Runs in the agent, which has no pyarrow.

Bytes go out as they are in the file, a quarter of a megabyte at a time: no decoding, no checksumming, and never a whole
file in memory. The reducer checks. Reading happens in threads, so that a slow disk does not hold up the heartbeats.
Who may ask is decided before: every request to the agent's port shows the cluster's token.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from pathlib import Path

import msgspec
from aiohttp import web

from jobrunner.errors import CorruptData
from jobrunner.ids import AttemptId, StageName, Token, parse_job_id
from jobrunner.shuffle.blocks import PIECE_BYTES, BlockIndex, block_path, read_index, read_range
from jobrunner.shuffle.exchange import HEADER, BlocksRequest, Status

_STAGE = re.compile(r"[\w-]+")
_INDEXES_MAX = 64  # Kept, because all reducers of a wave ask for the same maps.

_decoder = msgspec.msgpack.Decoder(BlocksRequest)


def blocks_handler(root: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler of `POST /blocks` for the block files under `root`."""
    index_of = lru_cache(_INDEXES_MAX)(read_index)

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            asked = _decoder.decode(await request.read())
            parse_job_id(asked.job)
        except (msgspec.MsgspecError, ValueError) as error:
            return web.Response(status=400, text=f"{error}\n")
        if not _STAGE.fullmatch(asked.stage) or asked.reducer < 0:
            return web.Response(status=400, text="no such stage or reducer\n")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        pieces = _pieces(_frames(root, asked, index_of))
        while piece := await asyncio.to_thread(next, pieces, b""):
            await response.write(piece)
        await response.write_eof()
        return response

    return handle


def _frames(root: Path, asked: BlocksRequest, index_of: Callable[[Path], BlockIndex]) -> Iterator[bytes]:
    """Headers and bytes. Raises in the middle if a file ends early: the connection is cut, and the reducer knows."""
    for partition, number, token in asked.maps:
        attempt = AttemptId(parse_job_id(asked.job), StageName(asked.stage), partition, number)
        path = block_path(root, attempt, Token(token))
        try:
            index = index_of(path)
            if not path.exists():  # An index may be remembered longer than its file is there.
                raise FileNotFoundError(path)
            if index.attempt != attempt or index.token != token or asked.reducer >= len(index.lengths):
                raise CorruptData(f"{path}: holds {index.attempt} with {len(index.lengths)} partitions", path=str(path))
        except FileNotFoundError:
            yield HEADER.pack(partition, Status.MISSING, 0, 0, 0)
            continue
        except (CorruptData, OSError):
            yield HEADER.pack(partition, Status.CORRUPT, 0, 0, 0)
            continue
        length, checksum = index.lengths[asked.reducer], index.checksums[asked.reducer]
        yield HEADER.pack(partition, Status.OK, length, checksum, index.digest)
        if length:
            yield from read_range(path, index.offsets[asked.reducer], length)


def _pieces(frames: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of PIECE_BYTES or a little more."""
    held: list[bytes] = []
    size = 0
    for data in frames:
        held.append(data)
        size += len(data)
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
