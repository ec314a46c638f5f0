"""The lock service as a part of the replicated state: sessions of clients, named locks, small values.

    open ─► ClientTable      run(client, sequence, operation) ─► NamedLocks | KvStore      end ─► both give back

Every method is one log entry's effect. Knows nothing of jobs but that one may hold a lock.
"""

from collections.abc import Callable

from jobrunner.control.locks import Acquire, AnyOperation, AnyOutcome, OperationRefused, Release, Released
from jobrunner.errors import Refused
from jobrunner.ids import ClientId, Token
from jobrunner.locks.clients import ClientSession, ClientTable
from jobrunner.locks.kv import KvStore
from jobrunner.locks.limits import LockLimits
from jobrunner.locks.named import NamedLocks


class LockService:
    def __init__(self, next_token: Callable[[], Token]) -> None:
        self._next_token = next_token
        self.limits = LockLimits()  # Set by the log.
        self.clients = ClientTable()
        self.names = NamedLocks(next_token)
        self.keys = KvStore()

    def open(self, key: str, owner: str, ttl_ms: int, at_ms: int) -> ClientId:
        """The session of `key`, begun now unless it was before. Raises Refused."""
        known = self.clients.by_key.get(key)
        if known is not None:
            return known
        self.clients.check_open(key, owner, ttl_ms, self.limits)
        id = ClientId(self._next_token())
        self.clients.open(ClientSession(id, key, owner, ttl_ms, at_ms))
        return id

    def run(self, client: ClientId, sequence: int, lowest: int, operation: AnyOperation, at_ms: int) -> AnyOutcome:
        """Carry out an operation, or return what it came to before. Raises SessionEnded, Refused: it was not."""
        known = self.clients.kept(client, sequence, lowest, self.limits)
        if known is not None:
            return known
        try:
            answer = self._carry_out(client, sequence, operation, at_ms)
        except Refused as refusal:
            answer = OperationRefused(str(refusal))
        self.clients.keep(client, sequence, answer)
        return answer

    def _carry_out(self, client: ClientId, sequence: int, operation: AnyOperation, at_ms: int) -> AnyOutcome:
        if isinstance(operation, Acquire):
            owner = self.clients.live[client].owner
            return self.names.acquire(client, sequence, operation, owner=owner, at_ms=at_ms, limits=self.limits)
        if isinstance(operation, Release):
            return Released(self.names.release(client, operation.name, operation.ticket, at_ms))
        return self.keys.transact(client, operation, self.limits)

    def end(self, client: ClientId, at_ms: int, *, failed: bool) -> bool:
        """The session is over: places in line, locks and ephemeral keys go. False if it was over before."""
        if self.clients.end(client) is None:
            return False
        self.names.end_client(client, at_ms, failed=failed)
        self.keys.end_client(client, self.limits)
        return True
