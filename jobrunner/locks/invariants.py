"""What must always hold of a LockService; checked after every step in tests and in the simulator."""

from collections.abc import Iterator

from jobrunner.locks.kv import CHANGE_BYTES, KvStore
from jobrunner.locks.named import NamedLock, NamedLocks, Ticket
from jobrunner.locks.service import LockService


def broken_locks(service: LockService) -> Iterator[str]:
    """Everything that does not hold."""
    yield from _clients(service)
    for name, lock in service.names.locks.items():
        yield from (f"lock {name}: {text}" for text in _lock(service, lock))
    yield from _indexes(service.names)
    yield from _keys(service, service.keys)


def _clients(service: LockService) -> Iterator[str]:
    live = service.clients.live
    if {session.key: id for id, session in live.items()} != service.clients.by_key:
        yield "sessions by key disagree with the live ones"
    for session in live.values():
        if any(number < session.lowest for number in session.answers):
            yield f"client {session.id}: an answer is kept that it has acknowledged"
        if len(session.answers) > service.limits.unanswered_max:
            yield f"client {session.id}: {len(session.answers)} answers are kept"


def _lock(service: LockService, lock: NamedLock) -> Iterator[str]:
    standing = [*lock.holders.values(), *lock.delays.values()]
    if len(standing) > 1 and not all(place.shared for place in standing):
        yield f"{len(standing)} hold it or keep it closed, one of them alone"
    if lock.job is not None and standing:
        yield f"job {lock.job} and others hold it"
    if not standing and lock.job is None and not lock.waiters:
        yield "nobody holds it or waits for it, and it is there"
    first = next(iter(lock.waiters.values()), None)
    if first is not None and lock.is_free(shared=first.shared):
        yield f"{first.owner} waits for what is free"
    for place in [*lock.holders.values(), *lock.waiters.values()]:
        if place.client not in service.clients.live:
            yield f"client {place.client} is in it, and its session is over"
    tokens = [place.token for place in standing]
    if len(set(tokens)) != len(tokens) or 0 in tokens:
        yield f"tokens {tokens}"
    if any(place.token for place in lock.waiters.values()):
        yield "who waits has a token"


def _indexes(names: NamedLocks) -> Iterator[str]:
    places: dict[Ticket, str] = {}
    delayed = {}
    for name, lock in names.locks.items():
        for ticket in [*lock.holders, *lock.waiters]:
            places[ticket] = name
        for token in lock.delays:
            delayed[token] = name
    listed = {ticket: name for tickets in names.of_client.values() for ticket, name in tickets.items()}
    if listed != places:
        yield f"places by client {listed}, by lock {places}"
    if names.delayed != delayed:
        yield f"delays listed {names.delayed}, by lock {delayed}"


def _keys(service: LockService, keys: KvStore) -> Iterator[str]:
    size = sum(len(key.encode()) + len(item.value) for key, item in keys.items.items())
    if keys.bytes != size:
        yield f"{keys.bytes} bytes of keys are counted, in truth {size}"
    owned = {(item.client, key) for key, item in keys.items.items() if item.client}
    if owned != {(client, key) for client, of in keys.of_client.items() for key in of}:
        yield "ephemeral keys by client disagree with the keys"
    for client, key in owned:
        if client not in service.clients.live:
            yield f"key {key} is there, and the session it goes with is over"
    for item in keys.items.values():
        if not 0 < item.created <= item.modified <= keys.revision:
            yield f"key {item.key}: created {item.created}, modified {item.modified}, revision {keys.revision}"
    revisions = [change.revision for change in keys.history]
    if revisions != sorted(revisions) or (revisions and not keys.compacted < revisions[0] <= revisions[-1]):
        yield f"history from {revisions[:1]} with everything up to {keys.compacted} dropped"
    kept = sum(len(change.key.encode()) + len(change.value or b"") + CHANGE_BYTES for change in keys.history)
    if keys.history_bytes != kept:
        yield f"{keys.history_bytes} bytes of history are counted, in truth {kept}"
