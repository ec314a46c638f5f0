"""A client's session, kept alive from the Remote's thread for as long as the client is open.

open ─► keepalives ─► confirmed: the lease runs on           the masters say it is over, or are silent for too long:
  │                                                          what was granted under it is in doubt, then lost
  └─► ask(operation): numbered, so that it is carried out once
"""

import asyncio
import getpass
import socket
import threading
import time
import uuid
from collections.abc import Callable
from os import getpid

from jobrunner.api.remote import Remote
from jobrunner.control.locks import (
    Answered,
    AnyOperation,
    AnyOutcome,
    Ask,
    ClientOpened,
    CloseClient,
    KeepAlive,
    KeptAlive,
    OpenClient,
)
from jobrunner.control.messages import Ack
from jobrunner.errors import JobrunnerError, LockLost, Refused, SessionEnded, Unavailable
from jobrunner.ids import ClientId, Token
from jobrunner.locks.holder import Hold, Lease

_LOOK_S = 0.02
_CLOSE_S = 2.0

OnTurn = Callable[[], None]


def lease_now() -> float:
    """Seconds that also pass while this machine sleeps, where the system tells: the masters do not sleep with it."""
    boot_time = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(boot_time) if boot_time is not None else time.monotonic()


def own_name() -> str:
    """Who holds a lock, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "?"
    return f"{user}@{socket.gethostname()}:{getpid()}"


class LockSession:
    """Opened by the constructor. Safe to use from several threads. Raises what refuses it, Unavailable."""

    def __init__(self, remote: Remote, *, ttl_ms: int, owner: str) -> None:
        self._remote = remote
        self._mutex = threading.Lock()
        self._sequence = 0
        self._open_requests: set[int] = set()  # Numbers whose answer is not here yet.
        self._held: dict[Token, OnTurn] = {}
        self._gone: set[Token] = set()  # Taken away by an operator.
        self._closed = False
        sent_at = lease_now()
        opened = remote.call(OpenClient(uuid.uuid4().hex, owner, ttl_ms), ClientOpened)
        self.client: ClientId = opened.client
        self._lease = Lease(ttl_ms / 1000, sent_at=sent_at, grace_s=ttl_ms / 1000)
        self._tasks = [remote.spawn(self._keep()), remote.spawn(self._watch())]

    # --- what is granted ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> Hold:
        return Hold.LOST if self._closed else self._lease.state(lease_now())

    @property
    def ttl_s(self) -> float:
        return self._lease.ttl_s

    def hold(self, token: Token, on_turn: OnTurn) -> None:
        """A lock was granted: call `on_turn`, from another thread, when its state may have changed."""
        with self._mutex:
            self._held[token] = on_turn

    def drop(self, token: Token) -> None:
        with self._mutex:
            self._held.pop(token, None)

    def is_gone(self, token: Token) -> bool:
        return token in self._gone

    # --- asking ------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        """The number of the next request."""
        with self._mutex:
            self._sequence += 1
            self._open_requests.add(self._sequence)
            return self._sequence

    def ask(self, operation: AnyOperation, *, sequence: int = 0, deadline_s: float | None = None) -> AnyOutcome:
        """Have an operation carried out once. Raises LockLost if the session is over, Refused, Unavailable, Unknown.

        After Unknown it may have been carried out, and will not be any more once a later request is.
        """
        sequence = sequence or self.number()
        with self._mutex:
            lowest = min(self._open_requests)
        try:
            message = Ask(self.client, sequence, lowest, operation)
            return self._remote.call(message, Answered, deadline_s=deadline_s).outcome
        except SessionEnded as error:
            self._lease.ended()
            raise LockLost(f"{error}: whatever it held is lost") from error
        finally:
            with self._mutex:
                self._open_requests.discard(sequence)

    def abandon(self) -> None:
        """Keep it alive no longer: after its ttl the masters take back whatever it may hold."""
        self._lease.ended()
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Give everything back at once, if the masters can be reached soon; otherwise when the ttl is over."""
        if self._closed:
            return
        over = self.state is Hold.LOST
        self.abandon()
        if not over:
            try:
                self._remote.call(CloseClient(self.client), Ack, deadline_s=min(_CLOSE_S, self._lease.ttl_s))
            except (Unavailable, Refused):
                pass

    # --- in the Remote's loop ----------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Until the session is over."""
        while self.state is not Hold.LOST:
            await asyncio.sleep(self._lease.beat_s)
            with self._mutex:
                held = list(self._held)
            sent_at = lease_now()
            try:
                patience_s = self._lease.ttl_s / 2
                answer = await self._remote.ask(KeepAlive(self.client, held), KeptAlive, deadline_s=patience_s)
            except SessionEnded:
                self._lease.ended()
            except JobrunnerError:
                await asyncio.sleep(_LOOK_S)
            else:
                self._lease.confirmed(sent_at=sent_at, now=lease_now())
                self._take_away(answer.gone)

    def _take_away(self, tokens: list[Token]) -> None:
        for token in tokens:
            with self._mutex:
                on_turn = self._held.pop(token, None)
                if on_turn is not None:
                    self._gone.add(token)
            if on_turn is not None:
                on_turn()

    async def _watch(self) -> None:
        """Tell the locks when the lease changes its state."""
        before = Hold.HELD
        while before is not Hold.LOST:
            await asyncio.sleep(_LOOK_S if before is Hold.IN_DOUBT else min(0.1, self._lease.ttl_s / 20))
            now = self.state
            if now is not before:
                before = now
                with self._mutex:
                    turns = list(self._held.values())
                for on_turn in turns:
                    on_turn()
