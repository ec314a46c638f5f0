"""What a master answers about clients' sessions, locks and small values: one method a request.

Changes go through the log. Reads, and the word that a session lives, wait for the barrier: a leader that was replaced
without knowing it must not keep anybody's lease alive. Who waits (for a lock, for a change) is told by `applied`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from jobrunner.control.locks import (
    Answered,
    AnyOutcome,
    Ask,
    AwaitGrant,
    Changes,
    ClientOpened,
    CloseClient,
    ForceRelease,
    Granted,
    KeepAlive,
    KeptAlive,
    Keys,
    ListLocks,
    LockInfo,
    LockList,
    OpenClient,
    OperationRefused,
    Queued,
    ReadKeys,
    Released,
    WatchKeys,
)
from jobrunner.control.messages import Ack
from jobrunner.errors import NotLeader, Refused, Unavailable
from jobrunner.ids import ClientId
from jobrunner.locks.service import LockService
from jobrunner.master.commands import BeginClient, EndClient, RunOperation, TakeLock

if TYPE_CHECKING:
    from jobrunner.master.requests import Master

_PAGE_BYTES = 262_144
_OWNERS_SHOWN_MAX = 200  # In one page of the list of locks.

Ticket = tuple[ClientId, int]
Handler = Callable[[Any], Awaitable[msgspec.Struct]]


class LockRequests:
    def __init__(self, master: "Master") -> None:
        self._master = master
        self._grants: dict[Ticket, set[asyncio.Future[None]]] = {}  # Who waits for a lock, by ticket.
        self._watchers: set[asyncio.Future[None]] = set()  # Who waits for changes of keys.
        self._seen = (0, 0)  # Revision of the keys and version of the sessions when waiters were last told.
        self.handlers: dict[type, Handler] = {
            OpenClient: self._open,
            KeepAlive: self._keep_alive,
            CloseClient: self._close,
            Ask: self._ask,
            AwaitGrant: self._await_grant,
            ListLocks: self._list,
            ForceRelease: self._force,
            ReadKeys: self._read,
            WatchKeys: self._watch,
        }

    @property
    def _service(self) -> LockService:
        return self._master.state.service

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def _open(self, message: OpenClient) -> ClientOpened:
        leader = self._master.leading()
        client: ClientId = await self._master.propose(BeginClient(message.key, message.owner, message.ttl_ms))
        leader.lock_timers.renew(self._service, client, self._master.now())
        return ClientOpened(client)

    async def _keep_alive(self, message: KeepAlive) -> KeptAlive:
        leader = self._master.leading()
        leader.lock_timers.renew(self._service, message.client, self._master.now())
        await self._master.barrier()
        if self._master.leading() is not leader:
            raise NotLeader("the lease was renewed in an earlier leadership", leader="")
        self._service.clients.session(message.client)
        if leader.lock_timers.is_ending(message.client):
            raise Unavailable(f"the end of client {message.client} is being decided")
        held = self._service.names.tokens(message.client)
        return KeptAlive([token for token in message.held if token not in held])

    async def _close(self, message: CloseClient) -> Ack:
        self._master.leading()
        await self._master.propose(EndClient(message.client, False, "closed by its client"))
        return Ack()

    async def _ask(self, message: Ask) -> Answered:
        self._master.leading()
        outcome: AnyOutcome = await self._master.propose(
            RunOperation(message.client, message.sequence, message.lowest, message.operation)
        )
        if isinstance(outcome, OperationRefused):
            raise Refused(outcome.reason)
        return Answered(outcome)

    # --- locks -------------------------------------------------------------------------------------------------------

    async def _await_grant(self, message: AwaitGrant) -> Answered:
        self._master.leading()
        ticket = (message.client, message.ticket)
        if isinstance(self._outcome(message), Queued):
            try:
                await self._wait(self._grants.setdefault(ticket, set()), message.timeout_ms)
            finally:
                if not self._grants[ticket]:
                    del self._grants[ticket]
        outcome = self._outcome(message)
        if outcome is None:  # Perhaps this leader is only behind.
            await self._master.barrier()
            self._service.clients.session(message.client)
            outcome = self._outcome(message)
        self._master.leading()
        return Answered(outcome or Released(False))

    def _outcome(self, message: AwaitGrant) -> Granted | Queued | None:
        return self._service.names.outcome(message.client, message.name, message.ticket)

    async def _list(self, message: ListLocks) -> LockList:
        await self._master.barrier()
        found: list[LockInfo] = []
        shown = 0
        for info in self._service.names.infos(message.prefix, message.after):
            if shown >= _OWNERS_SHOWN_MAX:
                return self._page(found, more=True)
            found.append(info)
            shown += 1 + len(info.holders) + len(info.waiters) + len(info.delays)
        return self._page(found, more=False)

    def _page(self, found: list[LockInfo], *, more: bool) -> LockList:
        return LockList(found, more, list(self._service.names.forced), self._master.wall_ms())

    async def _force(self, message: ForceRelease) -> Ack:
        self._master.leading()
        if not message.reason.strip() or len(message.reason.encode()) > self._service.limits.name_bytes_max:
            raise Refused(f"a reason has 1 to {self._service.limits.name_bytes_max} bytes")
        await self._master.propose(TakeLock(message.name, message.token, message.reason))
        return Ack()

    # --- small values ------------------------------------------------------------------------------------------------

    async def _read(self, message: ReadKeys) -> Keys:
        await self._master.barrier()
        keys = self._service.keys
        return keys.read(message.prefix, exact=message.exact, after=message.after, bytes_max=_PAGE_BYTES)

    async def _watch(self, message: WatchKeys) -> Changes:
        self._master.leading()
        deadline = self._master.now() + message.timeout_ms / 1000
        while True:
            changes, after = self._service.keys.changes(message.prefix, message.revision, bytes_max=_PAGE_BYTES)
            left_s = deadline - self._master.now()
            if changes or left_s <= 0:
                return Changes(changes, after)
            await self._wait(self._watchers, int(left_s * 1000) + 1)

    # --- who waits ---------------------------------------------------------------------------------------------------

    async def _wait(self, waiters: set[asyncio.Future[None]], timeout_ms: int) -> None:
        """Until told, or the time has passed. Raises NotLeader."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.add(future)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await future
        except TimeoutError:
            pass
        finally:
            waiters.discard(future)

    def applied(self) -> None:
        """An entry was applied: tell whoever waits for what it did."""
        service = self._service
        for ticket in service.names.granted:
            _tell(self._grants.get(ticket, ()))
        seen = (service.keys.revision, service.clients.version)
        if seen == self._seen:
            return
        before, self._seen = self._seen, seen
        if seen[0] != before[0]:
            _tell(self._watchers)
        if seen[1] != before[1]:
            for (client, _), futures in self._grants.items():
                if client not in service.clients.live:
                    _tell(futures)

    def not_leading(self, leader: str) -> None:
        """Leadership is lost: who waits must ask the new leader."""
        for futures in [*self._grants.values(), self._watchers]:
            for future in list(futures):
                if not future.done():
                    future.set_exception(NotLeader("this master no longer leads", leader=leader))


def _tell(futures: "set[asyncio.Future[None]] | tuple[()]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
