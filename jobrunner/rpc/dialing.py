"""Opening a connection, and keeping one open: dial, wait for its end, dial again after a pause."""

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec

from jobrunner.clock import Clock
from jobrunner.errors import Denied, JobrunnerError, Refused, Unavailable
from jobrunner.rpc.connection import Connection, Peer, transport_of
from jobrunner.rpc.messages import PROTOCOL, Hello, Role, Turned, Welcome
from jobrunner.spec.settings import Settings

logger = logging.getLogger(__name__)

Decode = Callable[[bytes], msgspec.Struct]
OnPush = Callable[[Connection, msgspec.Struct], None]
OnConnection = Callable[[Connection], None]

_CLOSE_S = 0.1  # Wait for the peer's half of a closing handshake, after a frame that was refused.
_PIECE_BYTES = 65_536


def new_session(cluster_token: str) -> aiohttp.ClientSession:
    """An HTTP session that shows the cluster's token. Close it at the end."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {cluster_token}"},
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


class _Callbacks:
    """The handler of a dialled connection: it takes pushes and replies, no requests."""

    def __init__(self, decode: Decode, on_push: OnPush | None, on_close: OnConnection | None) -> None:
        self._decode = decode
        self._on_push = on_push
        self._on_close = on_close

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        return self._decode(body)

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        raise Refused(f"{type(message).__name__}: callers take no requests")

    def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
        if self._on_push:
            self._on_push(peer, message)

    def on_open(self, peer: Connection) -> None:
        pass

    def on_close(self, peer: Connection) -> None:
        if self._on_close:
            self._on_close(peer)


async def connect(
    address: str,
    *,
    cluster_id: str,
    cluster_token: str = "",
    role: Role,
    identity: str = "",
    name: str = "",
    expects: str = "",
    decode: Decode,
    on_push: OnPush | None = None,
    on_close: OnConnection | None = None,
    settings: Settings,
    timeout_s: float,
    session: aiohttp.ClientSession | None = None,
    clock: Clock | None = None,
) -> Connection:
    """An open connection to the server at `address`, served in a task of its own until it is closed.

    `expects` is the identity the server must have, "" for any. `session` (of `new_session`) is shared and stays open;
    without it the connection has one of its own, with `cluster_token`. Nothing is received before the caller's next
    await. Raises Denied (token, cluster, protocol or identity), Unavailable (not reached in time).
    """
    own_session = new_session(cluster_token) if session is None else None
    hello = Hello(PROTOCOL, cluster_id, role, identity, name, expects)
    wire: aiohttp.ClientWebSocketResponse | None = None
    try:
        async with asyncio.timeout(timeout_s):
            wire = await _upgrade(session or own_session, address, settings)
            welcome = await _shake_hands(wire, hello, address)
    except BaseException as error:
        if wire is not None and (transport := transport_of(wire)):
            transport.abort()
        if own_session:
            await own_session.close()
        if isinstance(error, TimeoutError):
            raise Unavailable(f"{address} did not answer within {timeout_s:g} s", address=address) from None
        if isinstance(error, aiohttp.ClientError | OSError):
            raise Unavailable(f"{address} cannot be reached: {_reason(error)}", address=address) from None
        raise
    peer = Peer(welcome.role, welcome.identity, welcome.name, address)
    handler = _Callbacks(decode, on_push, on_close)
    connection = Connection(wire, peer, handler=handler, settings=settings, clock=clock)
    connection.start(own_session.close if own_session else None)
    return connection


async def _upgrade(
    session: aiohttp.ClientSession | None, address: str, settings: Settings
) -> aiohttp.ClientWebSocketResponse:
    assert session is not None
    try:
        return await session.ws_connect(
            f"http://{address}/rpc",
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),
            autoping=False,
            autoclose=False,
            compress=0,
            max_msg_size=settings.limits.frame_bytes_max + 1,
        )
    except aiohttp.WSServerHandshakeError as error:
        if error.status in (401, 403):
            what = "wrong token" if error.status == 401 else "refuses this address as its own"
            raise Denied(f"{address}: {what}", address=address) from None
        raise Unavailable(f"{address} answers with HTTP status {error.status}", address=address) from None


async def _shake_hands(wire: aiohttp.ClientWebSocketResponse, hello: Hello, address: str) -> Welcome:
    await wire.send_bytes(msgspec.msgpack.encode(hello))
    message = await wire.receive()
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise Unavailable(f"{address} closed the connection", address=address)
    try:
        answer: Welcome | Turned = msgspec.msgpack.decode(message.data, type=Welcome | Turned)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Denied(f"{address} does not speak protocol {PROTOCOL}: {error}", address=address) from None
    if isinstance(answer, Turned):
        raise Denied(f"{address}: {answer.reason}", address=address)
    if answer.protocol != hello.protocol or answer.cluster_id != hello.cluster_id:
        raise Denied(f"{address} is of cluster {answer.cluster_id}, protocol {answer.protocol}", address=address)
    if hello.expects and answer.identity != hello.expects:
        raise Denied(f"{address} is {answer.identity}, not {hello.expects}", address=address)
    return answer


async def fetch(session: aiohttp.ClientSession, address: str, path: str, *, bytes_max: int, timeout_s: float) -> bytes:
    """The body of GET http://address/path, with the token of `session` (of `new_session`).

    Raises Unavailable (not reached, cut off, server in trouble), Denied, Refused (no such thing there; field `status`;
    or larger than `bytes_max`).
    """
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s), session.get(f"http://{address}{path}") as response:
            if response.status in (401, 403):
                raise Denied(f"{address}: GET {path} is refused", address=address)
            if response.status >= 500:
                raise Unavailable(f"{address}: GET {path} gave status {response.status}", address=address)
            if response.status != 200:
                raise Refused(f"{address} has no {path}", address=address, status=response.status)
            async for piece in response.content.iter_chunked(_PIECE_BYTES):
                size += len(piece)
                if size > bytes_max:
                    raise Refused(f"{address}: {path} is larger than {bytes_max} bytes", address=address)
                pieces.append(piece)
    except TimeoutError:
        raise Unavailable(f"{address}: GET {path} took longer than {timeout_s:g} s", address=address) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{address}: GET {path}: {_reason(error)}", address=address) from None
    return b"".join(pieces)


def _reason(error: Exception) -> str:
    """aiohttp's own text of a failed connect speaks of SSL settings and call tuples."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else str(error)


class Backoff:
    """Pauses that double from `start_s` to `max_s`, each between half and all of its size by chance."""

    def __init__(self, start_s: float, max_s: float, chance: random.Random) -> None:
        self._start_s = start_s
        self._max_s = max_s
        self._chance = chance
        self._next_s = start_s

    def pause_s(self) -> float:
        pause = self._next_s * self._chance.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        return pause

    def reset(self) -> None:
        self._next_s = self._start_s


class Dialer:
    """Keeps one connection open for ever: `connection` while there is one, else `failure` says why not.

    `on_up` runs before anything is received on the new connection; `on_down` once for every `on_up`.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Connection]],
        *,
        on_up: OnConnection,
        on_down: OnConnection,
        on_failure: Callable[[], Any],
        backoff: Backoff,
        steady_s: float,
    ) -> None:
        self.connection: Connection | None = None
        self.failure: JobrunnerError | None = None
        self._dial = dial
        self._on_up = on_up
        self._on_down = on_down
        self._on_failure = on_failure
        self._backoff = backoff
        self._steady_s = steady_s  # A connection that lived this long was a good one: its loss is redialled at once.
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._keep())

    async def stop(self) -> None:
        """Dial no more and abort the connection; `on_down` is not called."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.connection is not None:
            self.connection.abort("stopped")
            self.connection = None

    async def _keep(self) -> None:
        while True:
            try:
                connection = await self._dial()
            except JobrunnerError as error:
                if self.failure is None or str(error) != str(self.failure):
                    logger.log(logging.WARNING if isinstance(error, Denied) else logging.DEBUG, "%s", error)
                self.failure = error
                self._guarded(self._on_failure)
            else:
                await self._hold(connection)
            await asyncio.sleep(self._backoff.pause_s())

    async def _hold(self, connection: Connection) -> None:
        since = self._loop.time()
        self.connection, self.failure = connection, None
        self._guarded(self._on_up, connection)
        await connection.closed.wait()
        self.connection = None
        self.failure = Unavailable(f"the connection to {connection.peer} was lost")
        self._guarded(self._on_down, connection)
        if self._loop.time() - since >= self._steady_s:
            self._backoff.reset()

    def _guarded(self, callback: Callable[..., Any], *arguments: Connection) -> None:
        try:
            callback(*arguments)
        except Exception:
            logger.exception("a callback of a link failed")
