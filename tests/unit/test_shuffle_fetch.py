"""Fetching from this worker's disk and over HTTP from another's, and what counts as lost."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from jobrunner.control.messages import BlockOwner, LossKind, MapOutputs
from jobrunner.errors import Denied
from jobrunner.ids import AttemptId, JobId, SessionId, StageName, Token
from jobrunner.planner.plan import ShufflePlan
from jobrunner.shuffle.blocks import block_path
from jobrunner.shuffle.exchange import BlocksRequest
from jobrunner.shuffle.fetch import Fetched, LostOutput, fetch_runs
from jobrunner.shuffle.reduce import reduce_partition
from jobrunner.shuffle.reducers import Sum
from jobrunner.shuffle.runs import FileRun
from jobrunner.shuffle.server import blocks_handler
from jobrunner.shuffle.writer import MapOutputWriter

JOB, STAGE = JobId("j-" + "0" * 26), StageName("map")
PLAN = ShufflePlan(
    reducers=2, hash_version=1, buffer_bytes_max=1 << 20, merge_runs_max=8, batch_rows_max=64,
    fetch_bytes_max=1 << 20, fetch_retries_max=2, fetch_timeout_ms=2_000, compression="none",
)  # fmt: skip
MAPS = 4


@contextmanager
def served(handler: Callable[[web.Request], Any]) -> Iterator[str]:
    """The handler on a port of its own, in a thread; gives its address."""
    loop = asyncio.new_event_loop()
    sock = socket.create_server(("127.0.0.1", 0))
    app = web.Application()
    app.router.add_post("/blocks", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.SockSite(runner, sock).start()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def outputs(tmp_path: Path) -> MapOutputs:
    """MAPS map outputs: even ones on worker 0's disk, odd ones on worker 1's (whose address is to be set)."""
    digests, sizes = [], []
    for number in range(MAPS):
        path = path_of(tmp_path, number)
        writer = MapOutputWriter(tmp_path, path, attempt_of(number), Token(10 + number), 2, PLAN, Sum())
        writer.add([(f"k{i}", number + 1) for i in range(500)])
        summary = writer.finish()
        digests.append(summary.digest)
        sizes.append(summary.bytes)
    owners = [BlockOwner(SessionId(1), "d0", "127.0.0.1:1"), BlockOwner(SessionId(2), "d1", "127.0.0.1:1")]
    tokens = [10 + number for number in range(MAPS)]
    return MapOutputs(1, owners, [number % 2 for number in range(MAPS)], [0] * MAPS, tokens, digests, sizes)


def attempt_of(number: int) -> AttemptId:
    return AttemptId(JOB, STAGE, number, 0)


def path_of(directory: Path, number: int) -> Path:
    return block_path(directory / f"blocks-{number % 2}", attempt_of(number), Token(10 + number))


def at(outputs: MapOutputs, address: str) -> MapOutputs:
    owners = [outputs.owners[0], msgspec.structs.replace(outputs.owners[1], address=address)]
    return msgspec.structs.replace(outputs, owners=owners)


def fetch(outputs: MapOutputs, directory: Path, reducer: int = 0, plan: ShufflePlan = PLAN) -> Fetched:
    return fetch_runs(
        outputs, reducer, own_directory="d0", blocks_root=directory / "blocks-0", job=JOB, stage=STAGE,
        cluster_token="secret", plan=plan, scratch=directory,
    )  # fmt: skip


@pytest.mark.parametrize("bytes_max", [1 << 20, 0])
def test_local_and_remote_outputs_become_runs_in_map_order(outputs: MapOutputs, tmp_path: Path, bytes_max: int) -> None:
    """Another order would change the order of values and the sums of floats."""
    plan = msgspec.structs.replace(PLAN, fetch_bytes_max=bytes_max)
    got = []
    with served(blocks_handler(tmp_path / "blocks-1")) as address:
        for reducer in range(2):
            fetched = fetch(at(outputs, address), tmp_path, reducer, plan)
            assert fetched.consumed == sum(outputs.digest) % (1 << 64)
            assert all(isinstance(run, FileRun) == (bytes_max == 0) for run in fetched.runs)
            firsts = [next(iter(run.batches())).column("value")[0].as_py() for run in fetched.runs]
            assert firsts == [1, 2, 3, 4]
            got += reduce_partition(fetched.runs, Sum(), plan, tmp_path)
    assert dict(got) == {f"k{i}": 10 for i in range(500)}


@pytest.mark.parametrize("number", [0, 1])
def test_a_deleted_block_is_missing(outputs: MapOutputs, tmp_path: Path, number: int) -> None:
    path_of(tmp_path, number).unlink()
    with served(blocks_handler(tmp_path / "blocks-1")) as address, pytest.raises(LostOutput) as caught:
        fetch(at(outputs, address), tmp_path)
    assert (caught.value.lost, caught.value.kind) == ((attempt_of(number),), LossKind.MISSING)


@pytest.mark.parametrize("where", [20, -60])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_block_is_corrupt(outputs: MapOutputs, tmp_path: Path, number: int, where: int) -> None:
    """Damage in the data and in the index."""
    path = path_of(tmp_path, number)
    data = bytearray(path.read_bytes())
    data[where] ^= 255
    path.write_bytes(data)
    with served(blocks_handler(tmp_path / "blocks-1")) as address, pytest.raises(LostOutput) as caught:
        fetch(at(outputs, address), tmp_path)
    assert (caught.value.lost, caught.value.kind) == ((attempt_of(number),), LossKind.CORRUPT)


@pytest.mark.parametrize("number", [0, 1])
def test_output_with_another_digest_is_not_what_was_recorded(outputs: MapOutputs, tmp_path: Path, number: int) -> None:
    """A reducer would seal a mixture of two runs of a map."""
    outputs.digest[number] ^= 1
    with served(blocks_handler(tmp_path / "blocks-1")) as address, pytest.raises(LostOutput) as caught:
        fetch(at(outputs, address), tmp_path)
    assert (caught.value.lost, caught.value.kind) == ((attempt_of(number),), LossKind.CORRUPT)


def test_a_worker_that_does_not_answer_is_out_of_reach(outputs: MapOutputs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(LostOutput) as caught:
        fetch(at(outputs, address), tmp_path)
    assert caught.value.lost == (attempt_of(1), attempt_of(3))
    assert caught.value.kind == LossKind.UNREACHABLE


def test_an_answer_that_is_cut_off_is_asked_for_again(outputs: MapOutputs, tmp_path: Path) -> None:
    """What came whole is kept; a cut that looked like an end would lose rows."""
    inner = blocks_handler(tmp_path / "blocks-1")
    asked: list[list[int]] = []

    async def cut(request: web.Request) -> web.StreamResponse:
        wanted = msgspec.msgpack.decode(await request.read(), type=BlocksRequest)
        asked.append([partition for partition, _, _ in wanted.maps])
        if len(asked) > 1:
            return await inner(request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"\x01\x00\x00\x00\x00")
        assert request.transport
        request.transport.close()
        return response

    with served(cut) as address:
        assert len(fetch(at(outputs, address), tmp_path).runs) == MAPS
    assert asked == [[1, 3], [1, 3]]


def test_a_wrong_token_is_told_as_such(outputs: MapOutputs, tmp_path: Path) -> None:
    async def refuse(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.Response(status=401)

    with served(refuse) as address, pytest.raises(Denied):
        fetch(at(outputs, address), tmp_path)


def test_a_request_cannot_leave_the_blocks_directory(tmp_path: Path) -> None:
    import http.client

    with served(blocks_handler(tmp_path)) as address:
        for job, stage in (("../x", "map"), (JOB, "../.."), (JOB, "")):
            connection = http.client.HTTPConnection(address, timeout=5)
            connection.request("POST", "/blocks", msgspec.msgpack.encode(BlocksRequest(job, stage, 0, [(0, 0, 1)])))
            assert connection.getresponse().status == 400
            connection.close()
