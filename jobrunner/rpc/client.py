"""Calls to the group of masters: a connection to each, and every call to whoever leads now.

A call goes to the leader; told otherwise it moves; when the connection or the time of one try is lost, or the leader
falls silent, or another one is announced, it is sent again: the same message, so the same ids in it, until the
deadline. Only then is it Unavailable (no try was sent) or Unknown (one may have been carried out).
Silence is counted in ticks of session.beacon_ms that saw no frame: a process that was stopped has missed one, not many.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from jobrunner.clock import Clock, SystemClock
from jobrunner.errors import Denied, NotLeader, Refused, Unavailable, Unknown
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.dialing import (
    Backoff,
    Decode,
    Dialer,
    OnConnection,
    OnPush,
    connect,
    fetch,
    new_session,
)
from jobrunner.rpc.messages import Role
from jobrunner.spec.settings import Settings

__all__ = ["Masters", "connect", "fetch", "new_session"]

_BEACONS_MISSED = 3  # Ticks without a frame after which the leader counts as silent.
_FREE_TURNS = 3  # Changes of target before a pause: hint, new hint, and one in error.
_PAUSE_START_S = 0.005
_PAUSE_MAX_S = 0.2
_REDIAL_START_S = 0.02
_REDIAL_MAX_S = 1.0
_LEARNED_MAX = 16  # Masters dialled because a master named them.


class _Moved(Exception):
    """This try is given up, another follows."""


class _Try(NamedTuple):
    connection: Connection
    tick: int


class _Search:
    """The course of one call through its tries."""

    def __init__(self, deadline: float, chance: random.Random) -> None:
        self.deadline = deadline
        self.hint = ""  # Where the last answer said to go.
        self.last = ""  # Who was asked last.
        self.turns = 0
        self.sent = False  # A try was sent and not refused: it may be carried out.
        self.failure: Exception | None = None
        self.backoff = Backoff(_PAUSE_START_S, _PAUSE_MAX_S, chance)


class Masters:
    """A client's, agent's or tool's side of the group. Made inside a running loop; dials every address at once.

    `on_push(connection, message)` gets what any master pushes; who reads a leader's announcement there calls
    `leader_is`. `on_connected(connection)` runs before anything else of that connection.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        cluster_id: str,
        cluster_token: str,
        role: Role,
        identity: str = "",
        name: str = "",
        decode: Decode,
        on_push: OnPush | None = None,
        on_connected: OnConnection | None = None,
        on_disconnected: OnConnection | None = None,
        settings: Settings,
        chance: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.addresses = tuple(addresses)
        self.leader_address = ""
        self.leader_epoch = 0
        self.session = new_session(cluster_token)  # For `fetch`.
        self._cluster_id = cluster_id
        self._role: Role = role
        self._identity = identity
        self._name = name
        self._decode = decode
        self._on_push = on_push
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._settings = settings
        self._chance = chance or random.Random()
        self._clock = clock or SystemClock()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self._tries: dict[asyncio.Future[msgspec.Struct], _Try] = {}
        self._tick = 0
        self._frames: dict[str, int] = {}  # By address: frames received at the last tick,
        self._missed: dict[str, int] = {}  # and ticks since one was.
        self._dialers: dict[str, Dialer] = {}
        for address in self.addresses:
            self._keep(address)
        self._ticker = self._loop.create_task(self._watch())

    # --- calls ---

    async def call(
        self,
        message: msgspec.Struct,
        *,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        idempotent: bool = True,
    ) -> msgspec.Struct:
        """The leader's reply. `timeout_s` is for one try (limits.call_timeout_ms), `deadline_s` for all of them
        (limits.reach_timeout_ms).

        Masters that answer Unavailable are asked again. Raises Unavailable, Unknown, SpecError, Denied (by every
        master), or what the leader raised. With idempotent=False Unknown is raised instead of sending again.
        """
        limits = self._settings.limits
        deadline_s = limits.reach_timeout_ms / 1000 if deadline_s is None else deadline_s
        timeout_s = limits.call_timeout_ms / 1000 if timeout_s is None else timeout_s
        search = _Search(self._clock.now() + deadline_s, self._chance)
        while (left_s := search.deadline - self._clock.now()) > 0:
            if self._closed:
                search.failure = Unavailable("closed here")
                break
            connection = self._choose(search)
            if connection is None:
                self._raise_if_denied()
                await self._change(left_s)
                continue
            try:
                return await self._try(connection, message, min(timeout_s, left_s), search)
            except NotLeader as error:
                search.failure = error
                search.hint = self._follow(connection, str(getattr(error, "leader", "")))
            except (Unavailable, _Moved) as error:
                search.failure = error
                if search.sent and not idempotent:
                    raise Unknown(f"{error}; the request may or may not have been carried out") from None
            await self._pause(search, connection)
        raise self._given_up(search, deadline_s)

    async def _try(
        self, connection: Connection, message: msgspec.Struct, timeout_s: float, search: _Search
    ) -> msgspec.Struct:
        call, future = connection.ask(message, timeout_s=timeout_s)
        self._tries[future] = _Try(connection, self._tick)
        try:
            return await future
        except Unknown:
            search.sent = True
            raise
        finally:
            del self._tries[future]
            search.sent |= connection.forget(call)  # True only if it was given up after it was sent.

    def _choose(self, search: _Search) -> Connection | None:
        """Whom to ask: who was named, the leader unless silent, else the others in turn."""
        open_ = {address: dialer.connection for address, dialer in self._dialers.items() if dialer.connection}
        hinted, search.hint = open_.get(search.hint), ""
        if hinted is not None:
            return hinted
        leader = open_.get(self.leader_address)
        if leader is not None and not self._is_silent(leader):
            return leader
        others = [address for address in open_ if open_[address] is not leader]
        if not others:
            return leader
        after = others.index(search.last) + 1 if search.last in others else 0
        return open_[others[after % len(others)]]

    async def _pause(self, search: _Search, asked: Connection) -> None:
        """Between two tries: nothing for the first few that go elsewhere, then longer and longer."""
        search.last = asked.address
        search.turns += 1
        if search.turns <= _FREE_TURNS and (search.hint or self.leader_address != asked.address):
            return
        left_s = search.deadline - self._clock.now()
        await self._change(min(search.backoff.pause_s(), max(left_s, 0)))

    def _given_up(self, search: _Search, deadline_s: float) -> Unavailable:
        failures = [dialer.failure for dialer in self._dialers.values() if dialer.failure]
        reached = search.last or not failures
        reason = search.failure if reached else failures[-1]
        what = "answered as leader" if reached else "could be reached"
        text = f"no master of {', '.join(self._dialers)} {what} for {deadline_s:g} s" + (
            f" ({reason})" if reason else ""
        )
        if search.sent:
            return Unknown(f"{text}; the request may or may not have been carried out")
        return Unavailable(text)

    def _raise_if_denied(self) -> None:
        failures = [dialer.failure for dialer in self._dialers.values()]
        if failures and all(isinstance(failure, Denied) for failure in failures):
            raise Denied("; ".join(str(failure) for failure in failures))

    # --- who leads ---

    def leader_is(self, epoch: int, address: str) -> None:
        """A master said so. The highest epoch counts; an empty address: nobody leads now."""
        if epoch < self.leader_epoch:
            return
        self.leader_epoch = epoch
        if address == self.leader_address:
            return
        self.leader_address = address
        self._learn(address)
        if self.connection(address) is not None:
            self._move(lambda each: each.connection.address != address)
        self._notify()

    def _follow(self, refused_by: Connection, hint: str) -> str:
        """Take a refusal's hint, which has no epoch: it fills a gap, it replaces nobody but the one that refused."""
        if self.leader_address == refused_by.address:
            self.leader_address = ""
        if hint in ("", refused_by.address):
            return ""
        self._learn(hint)
        if not self.leader_address:
            self.leader_address = hint
        return hint

    def _is_silent(self, connection: Connection) -> bool:
        return self._missed.get(connection.address, 0) >= _BEACONS_MISSED

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.session.beacon_ms / 1000)
            self._tick += 1
            for address, dialer in self._dialers.items():
                frames = dialer.connection.frames_received if dialer.connection else 0
                heard = frames != self._frames.get(address)
                self._missed[address] = 0 if heard else self._missed.get(address, 0) + 1
                self._frames[address] = frames
            if len(self.connected) > 1:
                self._move(lambda each: self._is_silent(each.connection) and self._tick - each.tick >= _BEACONS_MISSED)

    def _move(self, condition: "Callable[[_Try], bool]") -> None:
        for future, each in list(self._tries.items()):
            if condition(each) and not future.done():
                future.set_exception(_Moved(f"{each.connection.peer} leads no more, or is silent"))

    # --- connections ---

    @property
    def connected(self) -> list[str]:
        """Addresses of the masters with an open connection."""
        return [address for address, dialer in self._dialers.items() if dialer.connection]

    def connection(self, address: str) -> Connection | None:
        """The open connection to one master, for calls that any master answers for itself."""
        dialer = self._dialers.get(address)
        return dialer.connection if dialer else None

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until some master is connected. Raises Denied if every one turns us away."""
        deadline = self._clock.now() + timeout_s
        while not self.connected and (left_s := deadline - self._clock.now()) > 0 and not self._closed:
            self._raise_if_denied()
            await self._change(left_s)
        return bool(self.connected)

    async def fetch(self, path: str, *, bytes_max: int, timeout_s: float | None = None) -> bytes:
        """GET `path` from the leader, else from any connected master (all hold every blob, some perhaps not yet).

        Raises the last one's Unavailable, Refused or Denied.
        """
        timeout_s = self._settings.limits.call_timeout_ms / 1000 if timeout_s is None else timeout_s
        await self.wait_connected(timeout_s)
        failure: Refused | Unavailable = Unavailable(f"no master of {', '.join(self._dialers)} is connected")
        for address in sorted(self.connected, key=lambda each: each != self.leader_address):
            try:
                return await fetch(self.session, address, path, bytes_max=bytes_max, timeout_s=timeout_s)
            except (Refused, Unavailable) as error:
                failure = error
        raise failure

    async def close(self) -> None:
        """End all connections; calls that wait fail. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._ticker.cancel()
        await asyncio.gather(*(dialer.stop() for dialer in self._dialers.values()))
        self._notify()
        await self.session.close()

    def _learn(self, address: str) -> None:
        if address and address not in self._dialers and len(self._dialers) < len(self.addresses) + _LEARNED_MAX:
            self._keep(address)

    def _keep(self, address: str) -> None:
        async def dial() -> Connection:
            return await connect(
                address,
                cluster_id=self._cluster_id,
                role=self._role,
                identity=self._identity,
                name=self._name,
                decode=self._decode,
                on_push=self._on_push,
                settings=self._settings,
                timeout_s=self._settings.limits.call_timeout_ms / 1000,
                session=self.session,
                clock=self._clock,
            )

        self._dialers[address] = Dialer(
            dial,
            on_up=self._up,
            on_down=self._down,
            on_failure=self._notify,
            backoff=Backoff(_REDIAL_START_S, _REDIAL_MAX_S, self._chance),
            steady_s=_REDIAL_MAX_S,
        )

    def _up(self, connection: Connection) -> None:
        self._missed[connection.address] = 0
        self._notify()
        if self._on_connected:
            self._on_connected(connection)

    def _down(self, connection: Connection) -> None:
        if self.leader_address == connection.address:
            self.leader_address = ""  # It says so again, under its epoch, if it still leads.
        self._notify()
        if self._on_disconnected:
            self._on_disconnected(connection)

    def _notify(self) -> None:
        self._changed.set_result(None)
        self._changed = self._loop.create_future()

    async def _change(self, timeout_s: float) -> None:
        """Wait until connections or the leader change, or the time has passed."""
        await asyncio.wait((self._changed,), timeout=timeout_s)
