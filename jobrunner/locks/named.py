"""Named locks: who holds each, who is in line, and which stay closed for a while because a holder failed.

    Acquire ──► in line ──first, and nothing stands against it──► held ──Release, session closed──► the next in line
                                                                   └─session expired, forced──► delayed ──EndDelay──┘

Exclusive or shared; first come, first served in both, so that readers do not starve a writer. Each grant has a token
above all earlier ones. Applied in log order, the same on every master: no clock here, a delay is ended by an entry.
Sources: Burrows, The Chubby lock service, OSDI 2006, section 2.4 (sequencers, lock-delay).
"""

from collections.abc import Callable, Iterator
from itertools import islice

import msgspec

from jobrunner.control.locks import Acquire, AnyOutcome, Busy, Forced, Granted, LockInfo, LockOwner, Queued
from jobrunner.errors import Refused
from jobrunner.ids import ClientId, JobId, Token
from jobrunner.locks.limits import LockLimits

FORCED_KEPT_MAX = 100
WAITERS_SHOWN_MAX = 100

Ticket = tuple[ClientId, int]


class Place(msgspec.Struct, frozen=True):
    """One request for a lock: in line (token 0), holding it, or, after a failure, keeping it closed."""

    client: ClientId
    ticket: int
    shared: bool
    delay_ms: int
    owner: str
    since_ms: int  # When this began; for display.
    token: Token = Token(0)


class NamedLock:
    """One lock. `job`: the job whose output it is; such a holder has no session and no token."""

    __slots__ = ("delays", "holders", "job", "waiters")

    def __init__(self) -> None:
        self.holders: dict[Ticket, Place] = {}
        self.waiters: dict[Ticket, Place] = {}  # First come first.
        self.delays: dict[Token, Place] = {}
        self.job: JobId | None = None

    def is_free(self, *, shared: bool) -> bool:
        """Whether nothing that holds it, or keeps it closed, stands against this mode."""
        if self.job is not None:
            return False
        standing = [*self.holders.values(), *self.delays.values()]
        return all(place.shared for place in standing) if shared else not standing

    def owner(self) -> str:
        """Who stands against a request, for people."""
        if self.job is not None:
            return f"job {self.job}"
        for place in self.holders.values():
            return place.owner
        for place in self.delays.values():
            return f"{place.owner} (failed; closed for {place.delay_ms} ms after that)"
        for place in self.waiters.values():
            return f"{place.owner} (in line)"
        return ""


class NamedLocks:
    def __init__(self, next_token: Callable[[], Token]) -> None:
        self._next_token = next_token
        self.locks: dict[str, NamedLock] = {}  # Those with a holder, a waiter or a delay.
        self.of_client: dict[ClientId, dict[Ticket, str]] = {}  # Where each client holds or waits.
        self.delayed: dict[Token, str] = {}  # Where each delay is.
        self.forced: list[Forced] = []  # The last FORCED_KEPT_MAX.
        self.granted: list[Ticket] = []  # By the last entry, to those who waited; not state.

    # --- clients -----------------------------------------------------------------------------------------------------

    def acquire(
        self, client: ClientId, ticket: int, request: Acquire, *, owner: str, at_ms: int, limits: LockLimits
    ) -> AnyOutcome:
        """Granted, Queued, or Busy if it must not wait. Raises Refused."""
        self._check(request, limits)
        lock = self.locks.get(request.name) or NamedLock()
        place = Place(client, ticket, request.shared, request.delay_ms, owner, at_ms)
        if not lock.waiters and lock.is_free(shared=request.shared):
            self.locks[request.name] = lock
            return Granted(self._grant(request.name, lock, place, at_ms))
        if not request.wait:
            return Busy(lock.owner())
        if len(lock.waiters) >= limits.waiters_max:
            raise Refused(f"lock {request.name}: {len(lock.waiters)} are in line: locks.waiters_max")
        lock.waiters[client, ticket] = place
        self.of_client.setdefault(client, {})[client, ticket] = request.name
        return Queued(len(lock.waiters) - 1)

    def _check(self, request: Acquire, limits: LockLimits) -> None:
        if not request.name or len(request.name.encode()) > limits.name_bytes_max:
            raise Refused(f"a lock's name has 1 to {limits.name_bytes_max} bytes")
        if not 0 <= request.delay_ms <= limits.delay_ms_max:
            raise Refused(f"delay: found {request.delay_ms} ms, allowed: 0 to {limits.delay_ms_max} ms")
        if request.name not in self.locks and len(self.locks) >= limits.locks_max:
            raise Refused(f"there are {len(self.locks)} locks: locks.locks_max")

    def outcome(self, client: ClientId, name: str, ticket: int) -> Granted | Queued | None:
        """What a ticket has now."""
        lock = self.locks.get(name)
        if lock is None:
            return None
        held = lock.holders.get((client, ticket))
        if held is not None:
            return Granted(held.token)
        if (client, ticket) in lock.waiters:
            return Queued(list(lock.waiters).index((client, ticket)))
        return None

    def tokens(self, client: ClientId) -> set[Token]:
        """Of all locks that a client holds."""
        places = self.of_client.get(client, {}).items()
        held = [self.locks[name].holders.get(ticket) for ticket, name in places]
        return {place.token for place in held if place is not None}

    def release(self, client: ClientId, name: str, ticket: int, at_ms: int) -> bool:
        """Give back lock or place in line, without delay; False if there was none. True only if it was held."""
        lock = self.locks.get(name)
        if lock is None:
            return False
        held = lock.holders.pop((client, ticket), None)
        waited = lock.waiters.pop((client, ticket), None)
        if held is not None or waited is not None:
            self._forget_place((client, ticket))
            self._pass_on(name, lock, at_ms)
        return held is not None

    def end_client(self, client: ClientId, at_ms: int, *, failed: bool) -> None:
        """The session is over: its places in line go, its locks are released, or closed for a while if it failed."""
        places = self.of_client.pop(client, {})
        for ticket, name in places.items():
            lock = self.locks[name]
            lock.waiters.pop(ticket, None)
            held = lock.holders.pop(ticket, None)
            if held is not None and failed:
                self._delay(name, lock, held, at_ms)
        for name in dict.fromkeys(places.values()):  # Only now: the dead must not be granted what they waited for.
            self._pass_on(name, self.locks[name], at_ms)

    # --- what else frees or takes a lock -----------------------------------------------------------------------------

    def end_delay(self, token: Token, at_ms: int) -> bool:
        """The time after a failure is over. False if it was before (a repeat)."""
        name = self.delayed.pop(token, None)
        if name is None:
            return False
        lock = self.locks[name]
        del lock.delays[token]
        self._pass_on(name, lock, at_ms)
        return True

    def force(self, name: str, token: Token, reason: str, at_ms: int) -> None:
        """An operator takes the lock from a holder, who may be alive: closed for its delay. Raises Refused."""
        lock = self.locks.get(name)
        if lock is not None and lock.job is not None:
            raise Refused(f"lock {name} is held by job {lock.job}: kill the job")
        held = [place for place in lock.holders.values() if place.token == token] if lock is not None else []
        if lock is None or not held:
            raise Refused(f"lock {name} is not held under token {token}")
        place = held[0]
        ticket = (place.client, place.ticket)
        del lock.holders[ticket]
        self._forget_place(ticket)
        self.forced = [*self.forced, Forced(name, place.owner, token, reason, at_ms)][-FORCED_KEPT_MAX:]
        self._delay(name, lock, place, at_ms)
        self._pass_on(name, lock, at_ms)

    def reserve(self, name: str, job: JobId) -> str:
        """Give the lock to a job; "" if it has it, else who stands against it. Safe to repeat."""
        lock = self.locks.get(name) or NamedLock()
        if lock.job != job and not (not lock.waiters and lock.is_free(shared=False)):
            return lock.owner()
        lock.job = job
        self.locks[name] = lock
        return ""

    def unreserve(self, name: str, job: JobId, at_ms: int) -> None:
        """The job is done with it. Safe to repeat."""
        lock = self.locks.get(name)
        if lock is not None and lock.job == job:
            lock.job = None
            self._pass_on(name, lock, at_ms)

    # --- showing -----------------------------------------------------------------------------------------------------

    def infos(self, prefix: str, after: str) -> Iterator[LockInfo]:
        """By name."""
        for name in sorted(name for name in self.locks if name.startswith(prefix) and name > after):
            lock = self.locks[name]
            first = dict(islice(lock.waiters.items(), WAITERS_SHOWN_MAX))
            yield LockInfo(
                name,
                _owners(lock.holders),
                _owners(first),
                len(lock.waiters),
                _owners(lock.delays),
                lock.job or "",
            )

    # ---

    def _grant(self, name: str, lock: NamedLock, place: Place, at_ms: int) -> Token:
        held = msgspec.structs.replace(place, token=self._next_token(), since_ms=at_ms)
        lock.holders[place.client, place.ticket] = held
        self.of_client.setdefault(place.client, {})[place.client, place.ticket] = name
        return held.token

    def _delay(self, name: str, lock: NamedLock, place: Place, at_ms: int) -> None:
        if place.delay_ms:
            lock.delays[place.token] = msgspec.structs.replace(place, since_ms=at_ms)
            self.delayed[place.token] = name

    def _pass_on(self, name: str, lock: NamedLock, at_ms: int) -> None:
        """Grant to those first in line, as many as may hold it together; forget a lock that nobody wants."""
        while lock.waiters:
            ticket, place = next(iter(lock.waiters.items()))
            if not lock.is_free(shared=place.shared):
                return
            del lock.waiters[ticket]
            self._grant(name, lock, place, at_ms)
            self.granted.append(ticket)
        if not lock.holders and not lock.delays and lock.job is None:
            del self.locks[name]

    def _forget_place(self, ticket: Ticket) -> None:
        places = self.of_client.get(ticket[0], {})
        places.pop(ticket, None)
        if not places:
            self.of_client.pop(ticket[0], None)


def _owners(places: dict[Ticket, Place] | dict[Token, Place]) -> list[LockOwner]:
    return [
        LockOwner(place.owner, place.client, place.token, place.shared, place.since_ms) for place in places.values()
    ]
