"""A lock service and its clients in one thread, checked after every step."""

import msgspec

from jobrunner.control.locks import Acquire, AnyOutcome, Granted, Release
from jobrunner.ids import ClientId, Token
from jobrunner.locks.invariants import broken_locks
from jobrunner.locks.limits import LockLimits
from jobrunner.locks.service import LockService


class Bench:
    """`clients` by name; each asks under its next number unless told otherwise."""

    def __init__(self, **limits: int) -> None:
        self.tokens = 0
        self.service = LockService(self.next_token)
        self.service.limits = LockLimits(**limits)
        self.numbers: dict[ClientId, int] = {}

    def next_token(self) -> Token:
        self.tokens += 1
        return Token(self.tokens)

    def check(self) -> None:
        broken = list(broken_locks(self.service))
        assert not broken, broken

    def client(self, name: str = "a", ttl_ms: int = 1000) -> ClientId:
        client = self.service.open(f"key-{name}", name, ttl_ms, 0)
        self.numbers.setdefault(client, 0)
        self.check()
        return client

    def ask(self, client: ClientId, operation: object, *, sequence: int = 0, lowest: int = 1) -> AnyOutcome:
        """Answers are kept (lowest 1) unless acknowledged by the caller. Requests cross the wire format."""
        if not sequence:
            self.numbers[client] += 1
            sequence = self.numbers[client]
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(operation), type=type(operation))
        try:
            return self.service.run(client, sequence, lowest, sent, 0)
        finally:
            self.check()

    def lock(self, client: ClientId, name: str = "x", *, shared: bool = False, wait: bool = True, delay: int = 0):  # type: ignore[no-untyped-def]
        """(ticket, outcome)."""
        outcome = self.ask(client, Acquire(name, shared, wait, delay))
        return self.numbers[client], outcome

    def unlock(self, client: ClientId, ticket: int, name: str = "x") -> AnyOutcome:
        return self.ask(client, Release(name, ticket))

    def end(self, client: ClientId, *, failed: bool = True) -> bool:
        ended = self.service.end(client, 0, failed=failed)
        self.check()
        return ended

    def end_delay(self, token: Token) -> bool:
        ended = self.service.names.end_delay(token, 0)
        self.check()
        return ended

    def token(self, client: ClientId, ticket: int, name: str = "x") -> Token | None:
        """The token that a ticket holds, if any."""
        outcome = self.service.names.outcome(client, name, ticket)
        return outcome.token if isinstance(outcome, Granted) else None
