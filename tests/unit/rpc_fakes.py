"""What the tests of rpc with real sockets share: words, a handler, a server, and waiting for a condition."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
import uvloop

from jobrunner.errors import JobrunnerError
from jobrunner.rpc.client import connect
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.server import RpcServer
from jobrunner.spec.settings import LimitsSection, RaftSection, SessionSection, Settings

CLUSTER = "c" * 32
TOKEN = "the-token"
MEMBER = "a" * 32


class Ask(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    text: str
    data: bytes = b""


class Answer(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    text: str
    data: bytes = b""


class Leads(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    epoch: int
    address: str


_decoder = msgspec.msgpack.Decoder(Ask | Answer | Leads)
decode: Callable[[bytes], msgspec.Struct] = _decoder.decode

SETTINGS = Settings(
    limits=LimitsSection(frame_bytes_max=65_536, calls_max=64, call_timeout_ms=3_000, reach_timeout_ms=5_000),
    raft=RaftSection(queue_bytes_max=1_048_576),
    session=SessionSection(beacon_ms=20),
)


class Recorder:
    """A handler that answers with the upper case, and remembers what happened."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.closed: list[Connection] = []
        self.pushed: list[tuple[Connection, msgspec.Struct]] = []
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()  # "wait" is answered when it is set.

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        return decode(body)

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        assert isinstance(message, Ask)
        self.asked.append(message.text)
        if message.text == "wait":
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(message.text)
                raise
        if message.text == "bug":
            raise ZeroDivisionError("a bug of the handler")
        if message.text == "large":
            return Answer("large", bytes(100_000))
        if message.text == "fill":
            return Answer("fill", bytes(60_000))
        return Answer(message.text.upper(), message.data)

    def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
        self.pushed.append((peer, message))

    def on_open(self, peer: Connection) -> None:
        self.opened.append(peer)

    def on_close(self, peer: Connection) -> None:
        self.closed.append(peer)


def run(main: Callable[[], Coroutine[Any, Any, None]], *, loop: str = "uvloop", timeout_s: float = 30) -> None:
    """Run a test's coroutine on a new loop."""

    async def limited() -> None:
        async with asyncio.timeout(timeout_s):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(limited())


async def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serving(handler: Any, **options: Any) -> AsyncIterator[RpcServer]:
    """A running server for `handler`."""
    port = options.pop("port", 0)
    given: dict[str, Any] = {"cluster_id": CLUSTER, "cluster_token": TOKEN, "settings": SETTINGS, "identity": MEMBER}
    server = RpcServer(handler=handler, **(given | options))
    await server.start(port=port)
    try:
        yield server
    finally:
        await server.stop()


async def dial(address: str, **options: Any) -> Connection:
    given: dict[str, Any] = {
        "cluster_id": CLUSTER, "cluster_token": TOKEN, "role": "client", "decode": decode, "settings": SETTINGS,
        "timeout_s": 5,
    }  # fmt: skip
    return await connect(address, **(given | options))


async def outcome(call: Coroutine[Any, Any, Any]) -> JobrunnerError:
    """The error that `call` raises."""
    try:
        result = await call
    except JobrunnerError as error:
        return error
    raise AssertionError(f"no error but {result}")
