"""Named locks from Python: `with client.lock("warehouse/orders", ttl=10, wait=60) as lock: ...`

A lock keeps others out while its holder is heard; nothing stops a program that was paused from waking after that. So
call `lock.check()` before each step that matters, and give `lock.token` to whatever stores the result: a token is
higher than all that were granted before it.
"""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from jobrunner.api.remote import Remote
from jobrunner.api.sessions import LockSession, lease_now
from jobrunner.control.locks import Acquire, Answered, AnyOutcome, AwaitGrant, Busy, Granted, Queued, Release, Released
from jobrunner.errors import LockBusy, LockInDoubt, LockLost, Refused, SessionEnded, Unavailable
from jobrunner.ids import Token
from jobrunner.locks.holder import Hold

logger = logging.getLogger(__name__)

_POLL_MS = 5_000
_LOOK_S = 0.02

OnDoubt = Callable[["Lock"], None]


class Lock:
    """One named lock, for one holder at a time: threads that want to exclude each other take a Lock each."""

    def __init__(
        self,
        remote: Remote,
        session: Callable[[], LockSession],
        name: str,
        *,
        shared: bool,
        wait_s: float | None,
        delay_ms: int,
        on_doubt: OnDoubt | None,
    ) -> None:
        self.name = name
        self.shared = shared
        self._remote = remote
        self._new_session = session
        self._wait_s = wait_s
        self._delay_ms = delay_ms
        self._on_doubt = on_doubt
        self._session: LockSession | None = None
        self._ticket = 0
        self._token: Token | None = None
        self._told = threading.Event()

    @property
    def token(self) -> Token:
        """Higher than the token of every grant before. Raises LockLost before the first."""
        if self._token is None:
            raise LockLost(f"lock {self.name} is not held", name=self.name)
        return self._token

    @property
    def state(self) -> Hold:
        """HELD; IN_DOUBT: the masters were silent for the ttl, it may come back; LOST: it will not."""
        if self._session is None or self._token is None or self._session.is_gone(self._token):
            return Hold.LOST
        return self._session.state

    def check(self) -> None:
        """Raises LockInDoubt or LockLost unless the lock is held now."""
        state = self.state
        if state is Hold.IN_DOUBT:
            raise LockInDoubt(f"lock {self.name} is in doubt: no master confirmed it in time", name=self.name)
        if state is Hold.LOST:
            raise LockLost(f"lock {self.name} is lost", name=self.name)

    def acquire(self) -> None:
        """Take it, waiting in line as long as allowed. Raises LockBusy, LockLost, Refused, Unavailable, Unknown."""
        if self._session is not None:
            raise Refused(f"this Lock of {self.name} is in use: make another one for another holder")
        session = self._new_session()
        deadline = lease_now() + self._wait_s if self._wait_s is not None else None
        ticket = session.number()
        outcome: AnyOutcome | None = None
        try:
            request = Acquire(self.name, self.shared, self._wait_s != 0, self._delay_ms)
            outcome = session.ask(request, sequence=ticket)
            while isinstance(outcome, Queued) and (deadline is None or lease_now() < deadline):
                outcome = self._await(session, ticket, deadline)
            if not isinstance(outcome, Granted):
                raise self._not_granted(outcome)
        except BaseException:
            if not isinstance(outcome, Busy):  # Then it never stood in line.
                self._give_up(session, ticket)
            raise
        self._session, self._ticket, self._token = session, ticket, outcome.token
        self._told.clear()
        session.hold(outcome.token, self._turned)
        self._wait_for_word()

    def _await(self, session: LockSession, ticket: int, deadline: float | None) -> AnyOutcome:
        left_ms = _POLL_MS if deadline is None else max(1, min(_POLL_MS, int((deadline - lease_now()) * 1000) + 1))
        message = AwaitGrant(session.client, self.name, ticket, left_ms)
        try:
            return self._remote.call(message, Answered, patience_ms=left_ms).outcome
        except SessionEnded as error:
            raise LockLost(f"{error}: its place in line for {self.name} is lost", name=self.name) from error

    def _not_granted(self, outcome: AnyOutcome) -> Refused:
        if isinstance(outcome, Released):
            return LockLost(f"lock {self.name}: the place in line is gone", name=self.name)
        owner = outcome.owner if isinstance(outcome, Busy) else ""
        text = f"lock {self.name} is not free" + (f": {owner}" if owner else f" after {self._wait_s:g} s")
        return LockBusy(text, name=self.name, owner=owner)

    def _give_up(self, session: LockSession, ticket: int) -> None:
        """Leave the line, or what was granted meanwhile. Who cannot say so lets the session end."""
        if session.state is Hold.LOST:
            return
        try:
            session.ask(Release(self.name, ticket), deadline_s=2.0)
        except LockLost:
            pass
        except (Unavailable, Refused):
            session.abandon()

    def _wait_for_word(self) -> None:
        """A grant counts only under a lease that runs: one that is in doubt is confirmed first, or lost."""
        while self.state is Hold.IN_DOUBT:
            self._told.wait(_LOOK_S)
        if self.state is Hold.LOST:
            self.release()
            raise LockLost(f"lock {self.name} was lost before it was used", name=self.name)

    def release(self) -> bool:
        """Give it back; True if it was held without a break until now. Safe to repeat."""
        session, token = self._session, self._token
        if session is None or token is None:
            return False
        self._session = None
        session.drop(token)
        if session.state is Hold.LOST or session.is_gone(token):
            return False
        try:
            outcome = session.ask(Release(self.name, self._ticket), deadline_s=2 * session.ttl_s)
        except LockLost:
            return False
        except Unavailable:
            session.abandon()  # Nobody knows whether it is held; after its ttl it is not.
            return False
        return isinstance(outcome, Released) and outcome.held

    def _turned(self) -> None:
        self._told.set()
        if self._on_doubt is not None and self.state is not Hold.HELD:
            try:
                self._on_doubt(self)
            except Exception:
                logger.exception("on_doubt of lock %s", self.name)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises LockLost if the lock was lost while the body ran, unless the body failed by itself."""
        if not self.release() and kind is None:
            raise LockLost(f"lock {self.name} was lost while it was used", name=self.name)
