"""What only time brings to clients' sessions and locks: the leader's memory of who was heard, and of running delays.

A new leader gives every session and every delay its full time again. Time counts while listening (see liveness.py).
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

from jobrunner.ids import ClientId, Token
from jobrunner.locks.limits import LockLimits
from jobrunner.locks.service import LockService
from jobrunner.master.commands import AnyCommand, EndClient, EndDelay, SetLockLimits

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """Deadlines of many things, each with its own time, in the caller's monotonic seconds."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._first = float("inf")  # Not later than the earliest deadline: a look at the clock costs nothing.

    def follow(self, durations_ms: Mapping[K, int], now: float) -> None:
        """Watch exactly these; new ones get their full time."""
        self._at = {key: self._at.get(key, now + duration / 1000) for key, duration in durations_ms.items()}
        self._first = min(self._at.values(), default=float("inf"))

    def renew(self, key: K, duration_ms: int, now: float) -> None:
        if key in self._at:
            self._at[key] = now + duration_ms / 1000

    def add_gap(self, seconds: float) -> None:
        self._at = {key: at + seconds for key, at in self._at.items()}
        self._first += seconds

    def due(self, now: float) -> list[K]:
        if now < self._first:
            return []
        self._first = min(self._at.values(), default=float("inf"))
        return [key for key, at in self._at.items() if at <= now]


class LockTimers:
    """`limits`: what the leader's settings say; None: leave the state's as they are."""

    def __init__(self, limits: LockLimits | None = None) -> None:
        self._limits = limits
        self._clients: Deadlines[ClientId] = Deadlines()
        self._delays: Deadlines[Token] = Deadlines()
        self._version = -1
        self._delayed: dict[Token, str] = {}
        self._ending: set[ClientId] = set()

    def renew(self, service: LockService, client: ClientId, now: float) -> None:
        """The client was heard."""
        session = service.clients.live.get(client)
        if session is not None and client not in self._ending:
            self._clients.renew(client, session.ttl_ms, now)

    def is_ending(self, client: ClientId) -> bool:
        """Its end has been proposed: it may not be told any more that it lives."""
        return client in self._ending

    def add_gap(self, seconds: float) -> None:
        self._clients.add_gap(seconds)
        self._delays.add_gap(seconds)

    def proposals(self, service: LockService, now: float) -> Iterator[tuple[str, AnyCommand]]:
        """Commands that are due, each with a key that says what it is about."""
        self._follow(service, now)
        for client in self._clients.due(now):
            self._ending.add(client)
            ttl_s = service.clients.live[client].ttl_ms / 1000
            yield f"end client {client}", EndClient(client, True, f"no keepalive for {ttl_s:g} s")
        for token in self._delays.due(now):
            yield f"end delay {token}", EndDelay(token)
        if self._limits is not None and service.limits != self._limits:
            yield "lock limits", SetLockLimits(self._limits)

    def _follow(self, service: LockService, now: float) -> None:
        if self._version != service.clients.version:
            self._version = service.clients.version
            live = service.clients.live
            self._clients.follow({id: session.ttl_ms for id, session in live.items()}, now)
            self._ending = {id for id in self._ending if id in live}
        if self._delayed != service.names.delayed:
            self._delayed = dict(service.names.delayed)
            delays = {token: service.names.locks[name].delays[token].delay_ms for token, name in self._delayed.items()}
            self._delays.follow(delays, now)
