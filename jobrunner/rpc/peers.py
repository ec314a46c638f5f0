"""Links between masters: two connections to every other one, dialled from here, and messages pushed over them.

What must not wait (votes, heartbeats, small appends) goes by the *control* connection, what may be long by *bulk*.
Nothing is answered and nothing is kept: a message that cannot be queued at once is dropped, and the sender told. What
the others send arrives at this process's server, over the connections that they dialled.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

import msgspec

from jobrunner.clock import Clock
from jobrunner.ids import MemberId
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.dialing import Backoff, Dialer, connect, new_session
from jobrunner.rpc.messages import Role
from jobrunner.spec.settings import Settings

logger = logging.getLogger(__name__)

_REDIAL_START_S = 0.02
_REDIAL_MAX_S = 0.5
_DIAL_S = 2.0  # A stopped process accepts, by its kernel, and never answers.

OnMember = Callable[[MemberId], None]


def _refuse(body: bytes) -> msgspec.Struct:
    raise msgspec.ValidationError("nothing is said on a link but by the master that dialled it")


class _Link:
    """The two connections to one member."""

    def __init__(self, address: str, control: Dialer, bulk: Dialer) -> None:
        self.address = address
        self.control = control
        self.bulk = bulk

    async def stop(self) -> None:
        await asyncio.gather(self.control.stop(), self.bulk.stop())


class PeerLinks:
    """Made inside a running loop. Callbacks run on a later turn of the loop, never inside `send`.

    `on_up(member)`: its control connection is open. `on_unreachable(member)`: something was dropped since (said once a
    turn). `on_lost(member)`: an established control connection ended, so most likely its process did.
    """

    def __init__(
        self,
        *,
        member: MemberId,
        name: str,
        cluster_id: str,
        cluster_token: str,
        settings: Settings,
        on_unreachable: OnMember,
        on_lost: OnMember,
        on_up: OnMember | None = None,
        chance: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._member = member
        self._name = name
        self._cluster_id = cluster_id
        self._settings = settings
        self._on_unreachable = on_unreachable
        self._on_lost = on_lost
        self._on_up = on_up
        self._chance = chance or random.Random()
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._session = new_session(cluster_token)
        self._links: dict[MemberId, _Link] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._unreachable: set[MemberId] = set()  # To be told this turn.

    def set_members(self, members: Mapping[MemberId, str]) -> None:
        """Link to exactly these (our own entry is skipped); a changed address is dialled anew."""
        for member in list(self._links):
            if members.get(member) != self._links[member].address:
                task = self._loop.create_task(self._links.pop(member).stop())
                self._stopping.add(task)
                task.add_done_callback(self._stopping.discard)
        for member, address in members.items():
            if member != self._member and member not in self._links:
                control = self._keep(member, address, "master")
                self._links[member] = _Link(address, control, self._keep(member, address, "bulk"))

    def send(self, to: MemberId, message: bytes, bulk: bool) -> None:
        """Queue `message` (one msgpack value) to a member, or drop it and report the member unreachable.

        Raises SpecError if it does not fit a frame.
        """
        link = self._links.get(to)
        dialer = None if link is None else link.bulk if bulk else link.control
        connection = dialer.connection if dialer else None
        if connection is None or not connection.push(message):
            if not self._unreachable:
                self._loop.call_soon(self._tell_unreachable)
            self._unreachable.add(to)

    def connected(self, member: MemberId) -> bool:
        """Whether the control connection to `member` is open."""
        link = self._links.get(member)
        return link is not None and link.control.connection is not None

    async def close(self) -> None:
        """End all links; no callback runs any more."""
        links = list(self._links.values())
        self._links.clear()
        self._unreachable.clear()
        await asyncio.gather(*(link.stop() for link in links), *self._stopping)
        await self._session.close()

    def _keep(self, member: MemberId, address: str, role: Role) -> Dialer:
        async def dial() -> Connection:
            return await connect(
                address,
                cluster_id=self._cluster_id,
                role=role,
                identity=self._member,
                name=self._name,
                expects=member,
                decode=_refuse,
                settings=self._settings,
                timeout_s=_DIAL_S,
                session=self._session,
                clock=self._clock,
            )

        def down(connection: Connection) -> None:
            logger.debug("%s link to %s lost", role, connection.peer)
            if role == "master" and member in self._links:
                self._on_lost(member)

        def up(connection: Connection) -> None:
            logger.debug("%s link to %s open", role, connection.peer)
            if role == "master" and self._on_up is not None:
                self._on_up(member)

        return Dialer(
            dial,
            on_up=up,
            on_down=down,
            on_failure=lambda: None,
            backoff=Backoff(_REDIAL_START_S, _REDIAL_MAX_S, self._chance),
            steady_s=_REDIAL_MAX_S,
        )

    def _tell_unreachable(self) -> None:
        members, self._unreachable = self._unreachable, set()
        for member in sorted(members):
            self._on_unreachable(member)
