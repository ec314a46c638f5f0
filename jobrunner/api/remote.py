"""Calls to the masters from ordinary, synchronous code: one event loop in one thread, owned by the Remote.

The loop's thread starts with the first call, so that whoever makes a Remote may still fork before.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec

from jobrunner.errors import Unavailable
from jobrunner.spec.settings import LimitsSection

Reply = TypeVar("Reply", bound=msgspec.Struct)
T = TypeVar("T")

_CLOSE_S = 2.0


class Calls(Protocol):
    """What a Remote needs of rpc.client.Masters."""

    async def call(self, message: Any, *, deadline_s: float, timeout_s: float) -> Any: ...
    async def close(self) -> None: ...


class Remote:
    """The masters behind a blocking face. Safe to use from several threads; close it once."""

    def __init__(self, connect: Callable[[], Awaitable[Calls]], limits: LimitsSection) -> None:
        self._connect = connect
        self._limits = limits
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: asyncio.Task[Calls] | None = None
        self._closed = False

    def call(
        self, message: msgspec.Struct, reply: type[Reply], *, patience_ms: int = 0, deadline_s: float | None = None
    ) -> Reply:
        """The answer to `message`, for which the masters may take `patience_ms` longer than usual.

        Raises what the masters raised; Unavailable or Unknown when none could be reached for `deadline_s`
        (reach_timeout_ms).
        """
        return wait_for(self.spawn(self.ask(message, reply, patience_ms=patience_ms, deadline_s=deadline_s)))

    def start(
        self, message: msgspec.Struct, reply: type[Reply], *, patience_ms: int = 0
    ) -> "concurrent.futures.Future[Reply]":
        """Ask now, look at the answer later."""
        return self.spawn(self.ask(message, reply, patience_ms=patience_ms))

    def close(self) -> None:
        """End the connections and the thread; safe to repeat. Calls that wait are cancelled."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        ending = asyncio.run_coroutine_threadsafe(self._end(), loop)
        try:
            ending.result(_CLOSE_S)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError, OSError, Unavailable):
            pass  # Connections that do not end in time end with the process.
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_S)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Run a coroutine in the Remote's thread. Raises Unavailable after `close`."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise Unavailable("the client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="jobrunner-client", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def ask(
        self, message: msgspec.Struct, reply: type[Reply], *, patience_ms: int = 0, deadline_s: float | None = None
    ) -> Reply:
        """As `call`, within the Remote's thread."""
        if self._calls is None:
            self._calls = asyncio.ensure_future(self._open())
        # Shielded: one caller that gives up must not end the connection that the others wait for.
        calls = await asyncio.shield(self._calls)
        if deadline_s is None:
            deadline_s = self._limits.reach_timeout_ms / 1000
        answer = await calls.call(
            message,
            deadline_s=deadline_s + patience_ms / 1000,
            timeout_s=(self._limits.call_timeout_ms + patience_ms) / 1000,
        )
        assert isinstance(answer, reply), f"{type(message).__name__} was answered by {type(answer).__name__}"
        return answer

    async def _open(self) -> Calls:
        return await self._connect()

    async def _end(self) -> None:
        opened = self._calls is not None and self._calls.done() and not self._calls.cancelled()
        if self._calls is not None and opened and self._calls.exception() is None:
            await self._calls.result().close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def wait_for(future: "concurrent.futures.Future[T]", timeout_s: float | None = None) -> T:
    """The future's result. Raises TimeoutError while it is still on its way; an interrupt (Ctrl-C) cancels it."""
    try:
        return future.result(timeout_s)
    except concurrent.futures.TimeoutError:
        raise
    except BaseException:
        future.cancel()
        raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
