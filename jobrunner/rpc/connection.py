"""One connection, either end: a WebSocket, its channel, and the two loops that move bytes between them.

The reader decodes, resolves calls, hands pushes over in order and starts one task a request; it never waits for
anything but its socket's input. The writer task alone waits for the peer to read. `push`, `call` and replies only
queue: when the queue is full a push is refused, a call is Unavailable, and a peer that leaves its own replies unread,
or does not read at all for session.ttl_ms, is aborted.
"""

import asyncio
import contextlib
import logging
import socket as sockets
from collections.abc import Awaitable, Callable, Coroutine
from math import inf
from typing import Any, Protocol, cast

import aiohttp
import msgspec

from jobrunner.clock import Clock, SystemClock
from jobrunner.errors import JobrunnerError, SpecError, Unavailable, Unknown
from jobrunner.rpc.channel import BadFrame, Channel, raised_there
from jobrunner.rpc.messages import Envelope, Failure, Push, Reply, Request
from jobrunner.spec.settings import Settings

logger = logging.getLogger(__name__)

_AT_ONCE_BYTES = 16_384  # Less than any transport's high-water mark.
_FLUSH_S = 0.2  # How long `close` lets the writer empty its queue: a peer that reads needs a millisecond.
_UNACKNOWLEDGED_TTLS = 3  # Sent bytes that a host leaves unacknowledged for so many session.ttl_ms end the connection.


class Handler(Protocol):
    """What the owner of an end does with what arrives. All but `on_request` return at once."""

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        """A message of a peer in this role. Whatever it raises closes the connection."""
        ...

    async def on_request(self, peer: "Connection", message: msgspec.Struct) -> msgspec.Struct:
        """The reply, or a JobrunnerError that the caller will see. Cancelled when nobody waits any more."""
        ...

    def on_push(self, peer: "Connection", message: msgspec.Struct) -> None: ...

    def on_open(self, peer: "Connection") -> None: ...

    def on_close(self, peer: "Connection") -> None:
        """Once for every `on_open`, some time after the end."""
        ...


class Wire(Protocol):
    """What both of aiohttp's WebSockets offer."""

    async def receive(self) -> Any: ...

    def send_bytes(self, data: bytes) -> Coroutine[Any, Any, None]: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end, from the handshake; `address` is where it was dialled, or where it dials from."""

    role: str
    identity: str
    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name or self.role} at {self.address}"


class Connection:
    """An open connection to `peer`. `closed` is set at its end, for good; `frames_received` shows signs of life."""

    def __init__(
        self, wire: Wire, peer: Peer, *, handler: Handler, settings: Settings, clock: Clock | None = None
    ) -> None:
        self.peer = peer
        self.role, self.identity, self.name, self.address = peer.role, peer.identity, peer.name, peer.address
        self.closed = asyncio.Event()
        self.frames_received = 0
        self._wire = wire
        self._transport = transport_of(wire)
        self._wrote_this_turn = False
        self._handler = handler
        self._clock = clock or SystemClock()
        self._channel = Channel(
            frame_bytes_max=settings.limits.frame_bytes_max,
            queue_bytes_max=settings.raft.queue_bytes_max,
            calls_max=settings.limits.calls_max,
        )
        self._stall_s = settings.session.ttl_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._futures: dict[int, asyncio.Future[msgspec.Struct]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}  # By request.
        self._runner: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None  # The writer waits here for something to write.
        self._writing_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf  # Deadline that it is armed for.
        _limit_unacknowledged(wire, settings.session.ttl_ms * _UNACKNOWLEDGED_TTLS)

    def __repr__(self) -> str:
        return f"<Connection to {self.peer}{', closed' if self.closed.is_set() else ''}>"

    # --- for its owner ---

    def push(self, message: msgspec.Struct | bytes) -> bool:
        """Send without an answer; bytes are one msgpack value already. False: dropped (queue full, or closed).

        Raises SpecError if it does not fit a frame.
        """
        if self.closed.is_set():
            return False
        if not self._channel.push(message):
            if self._writing_since is not None and self._clock.now() - self._writing_since > self._stall_s:
                self._end(f"nothing read for {self._stall_s:g} s, and the queue is full")
            return False
        self._flush()
        return True

    def ask(self, message: msgspec.Struct | bytes, *, timeout_s: float) -> "tuple[int, asyncio.Future[msgspec.Struct]]":
        """Start a call: its id for `forget`, and its outcome. `call` is the usual way; errors are the same."""
        if self.closed.is_set():
            raise Unavailable(f"the connection to {self.peer} is closed")
        call = self._channel.call(message, now=self._clock.now(), timeout_s=timeout_s)
        future: asyncio.Future[msgspec.Struct] = self._loop.create_future()
        self._futures[call] = future
        self._flush()
        self._arm_timer()
        return call, future

    def forget(self, call: int) -> bool:
        """Nobody waits for this call any more. Returns whether it was sent, so that it may be carried out."""
        return self._futures.pop(call, None) is not None and self._channel.forget(call)

    async def call(self, message: msgspec.Struct | bytes, timeout_s: float) -> msgspec.Struct:
        """Ask and wait for the reply.

        Raises Unavailable (was not sent), Unknown (sent; then the connection or the time ran out), SpecError (fits no
        frame), or the error that the peer raised.
        """
        call, future = self.ask(message, timeout_s=timeout_s)
        try:
            return await future
        finally:
            self.forget(call)

    def abort(self, reason: str = "aborted") -> None:
        """End it now; what is unsent is dropped. Dead peers are aborted: a closing handshake would wait for them."""
        self._end(reason)

    async def close(self) -> None:
        """End it after what is queued was written, for which a peer that reads has time enough."""
        until = self._clock.now() + _FLUSH_S
        while not self.closed.is_set() and self._clock.now() < until:
            if not self._channel.queue_bytes and self._writing_since is None:
                return self._end("closed", linger=True)
            await asyncio.sleep(0.002)
        return self._end("closed, not all was sent")

    def start(self, at_end: Callable[[], Awaitable[None]] | None = None) -> None:
        """`run` in a task of its own, and then `at_end`. Nothing is received before the caller's next await."""

        async def run() -> None:
            try:
                await self.run()
            finally:
                if at_end is not None:
                    await at_end()

        self._runner = self._loop.create_task(run())

    async def run(self) -> None:
        """Serve the connection to its end. Runs once."""
        self._writer = self._loop.create_task(self._write())
        self._guarded("on_open", self._handler.on_open, self)
        try:
            reason = await self._read()
        except BadFrame as error:
            reason = str(error)
            logger.warning("closing the connection to %s: %s", self.peer, error)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            self._end("stopped")
            raise
        self._end(reason)

    # --- the two loops ---

    async def _read(self) -> str:
        """Take frames in until the end; returns its reason."""
        while not self.closed.is_set():
            message = await self._wire.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                return "closed by the peer" if message.data is None else f"{message.type.name}: {message.data}"
            self.frames_received += 1
            for envelope in self._channel.receive(message.data, now=self._clock.now()):
                self._take_in(envelope)
            if self._channel.queue_bytes:
                self._flush()
            self._arm_timer()
        return "closed"

    def _take_in(self, envelope: Envelope) -> None:
        if self.closed.is_set():
            return
        if isinstance(envelope, Reply):
            self._resolve(envelope.id, self._decoded(envelope.body))
        elif isinstance(envelope, Failure):
            self._resolve(envelope.id, raised_there(envelope))
        elif isinstance(envelope, Request):
            message = self._decoded(envelope.body)
            self._tasks[envelope.id] = self._loop.create_task(self._serve(envelope.id, message))
        else:
            assert isinstance(envelope, Push)
            self._guarded("on_push", self._handler.on_push, self, self._decoded(envelope.body))

    def _decoded(self, body: msgspec.Raw) -> msgspec.Struct:
        try:
            return self._handler.decode(self.role, bytes(body))
        except Exception as error:  # Its words are the peer's, so any failure to read them is the peer's.
            raise BadFrame(f"a message that cannot be read: {type(error).__name__}: {error}") from None

    async def _write(self) -> None:
        try:
            while True:
                frame = self._channel.take()
                if frame is None:
                    self._wake = self._loop.create_future()
                    await self._wake
                    continue
                self._writing_since = self._clock.now()
                await self._wire.send_bytes(frame)
                self._writing_since = None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            self._end(f"{type(error).__name__}: {error}")

    def _flush(self) -> None:
        """See that what is queued is written: the first of a turn of the loop at once, the rest of it as one frame."""
        if self._wake is None or self._wake.done():
            return  # The writer is at work.
        if self._wrote_this_turn or self._channel.queue_bytes > _AT_ONCE_BYTES or not self._is_idle():
            self._wake.set_result(None)
        elif frame := self._channel.take():
            self._wrote_this_turn = True
            self._loop.call_soon(self._next_turn)
            self._write_at_once(frame)

    def _is_idle(self) -> bool:
        transport = self._transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0

    def _next_turn(self) -> None:
        self._wrote_this_turn = False

    def _write_at_once(self, frame: bytes) -> None:
        # `send_bytes` suspends only when the transport's buffer is above its high-water mark, which a small frame on an
        # empty buffer cannot reach. So its first step is all of it, and the hop to the writer task is saved.
        sending = self._wire.send_bytes(frame)
        try:
            sending.send(None)
        except StopIteration:
            return
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            self._end(f"{type(error).__name__}: {error}")
            return
        sending.close()
        self._end("the transport refused a small frame")

    # --- requests of the peer ---

    async def _serve(self, request: int, message: msgspec.Struct) -> None:
        try:
            queued = self._channel.answer(request, await self._handler.on_request(self, message))
        except JobrunnerError as error:
            if isinstance(error, SpecError):
                logger.warning("%s from %s: %s", type(message).__name__, self.peer, error)
            queued = self._channel.fail(request, error)
        except Exception:
            logger.exception("%s from %s failed", type(message).__name__, self.peer)
            queued = self._channel.fail(request, Unavailable(f"{type(message).__name__} failed there; see its log"))
        finally:
            self._tasks.pop(request, None)
        if not queued:
            self._end("leaves its replies unread")
        self._flush()

    # --- our calls ---

    def _resolve(self, call: int, outcome: msgspec.Struct | JobrunnerError) -> None:
        future = self._futures.pop(call, None)
        if future is None or future.done():
            return
        if isinstance(outcome, JobrunnerError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _arm_timer(self) -> None:
        """Have `_on_timer` run soon after the channel's earliest deadline."""
        if self._channel.earliest >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._channel.earliest
        # Loops may run a timer a clock tick early, which would arm it again for nothing.
        self._timer = self._loop.call_later(max(self._timer_at - self._clock.now(), 0) + 0.002, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, inf
        expired = self._channel.expire(self._clock.now())
        for call, sent in expired.calls.items():
            self._resolve(call, self._lost(sent, "did not answer in time" if sent else "did not take the call in time"))
        for request in expired.requests:
            if task := self._tasks.pop(request, None):
                task.cancel()
        self._arm_timer()

    def _lost(self, sent: bool, what: str) -> Unavailable:
        text = f"{self.peer} {what}"
        return Unknown(f"{text}; it may or may not have been done") if sent else Unavailable(text)

    # --- the end ---

    def _end(self, reason: str, *, linger: bool = False) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        logger.debug("connection to %s ended: %s", self.peer, reason)
        sent = self._channel.close()
        for call in list(self._futures):  # One that the channel has no more was answered, in a frame not taken in.
            self._resolve(call, self._lost(sent.get(call, True), f"is gone ({reason})"))
        if self._timer is not None:
            self._timer.cancel()
        current = asyncio.current_task(self._loop)
        for task in (*self._tasks.values(), self._writer):
            if task is not None and task is not current:
                task.cancel()
        self._tasks.clear()
        if self._transport is not None:
            self._transport.close() if linger else self._transport.abort()
        if self._writer is not None:  # It ran, so `on_open` was called.
            self._loop.call_soon(self._guarded, "on_close", self._handler.on_close, self)

    def _guarded(self, name: str, callback: Any, *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            logger.exception("%s of the connection to %s failed", name, self.peer)


def transport_of(wire: Wire) -> asyncio.Transport | None:
    """The transport under a WebSocket: aiohttp has no way to abort one, and keeps the transport in its frame writer."""
    return cast("asyncio.Transport | None", getattr(getattr(wire, "_writer", None), "transport", None))


def _limit_unacknowledged(wire: Wire, timeout_ms: int) -> None:
    """Let the kernel end a connection to a host that has vanished; else it retries for a quarter of an hour."""
    sock = wire.get_extra_info("socket")
    option = getattr(sockets, "TCP_USER_TIMEOUT", None)  # Linux only.
    if sock is not None and option is not None and sock.family in (sockets.AF_INET, sockets.AF_INET6):
        with contextlib.suppress(OSError):  # Closed already: its reader will see.
            sock.setsockopt(sockets.IPPROTO_TCP, option, timeout_ms)
