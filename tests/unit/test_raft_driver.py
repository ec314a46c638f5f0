"""Three drivers in one loop, on real directories, with a transport in memory."""

import asyncio
import random
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from jobrunner.clock import SystemClock
from jobrunner.errors import NotLeader, Refused, StorageFailed, Unavailable, Unknown
from jobrunner.ids import MemberId
from jobrunner.raft.driver import Driver, RoleName
from jobrunner.raft.messages import Heartbeat, Member, encode_message
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.store import Store, init_store

SETTINGS = RaftSettings(heartbeat_ms=20, election_ms=150)
DEADLINE_SECONDS = 10.0
T = TypeVar("T")


@dataclass
class Counter:
    """A machine that adds, refuses what is negative, and breaks on what is not a number."""

    total: int = 0
    applied: list[int] = field(default_factory=list)
    heard: list[tuple[str, int]] = field(default_factory=list)

    def apply(self, index: int, epoch: int, data: bytes) -> object:
        (number,) = struct.unpack("<q", data)
        if number < 0:
            return ValueError("negative")
        self.total += number
        self.applied.append(number)
        return self.total

    def snapshot(self) -> bytes:
        return struct.pack("<q", self.total)

    def restore(self, data: bytes) -> None:
        (self.total,) = struct.unpack("<q", data)

    def leading(self, epoch: int) -> None:
        self.heard.append(("leading", epoch))

    def following(self, epoch: int, leader: MemberId | None) -> None:
        self.heard.append(("following", epoch))


class Group:
    """Members by id, and the links between them."""

    def __init__(self, directory: Path, count: int, settings: RaftSettings = SETTINGS) -> None:
        self.settings = settings
        self.members = tuple(Member(MemberId(f"m{slot}"), slot, f"h{slot}:1") for slot in range(1, count + 1))
        self.directory = directory
        self.drivers: dict[MemberId, Driver] = {}
        self.machines: dict[MemberId, Counter] = {}
        self.fatal: list[BaseException] = []
        self.cut: set[MemberId] = set()
        for member in self.members:
            init_store(
                str(directory / member.id), cluster_id="c", member=member.id, slot=member.slot, members=self.members
            )

    async def start(self, member: MemberId, *, campaign: bool = False, store: Store | None = None) -> Driver:
        store = store or Store.open(str(self.directory / member), self.settings)
        machine = self.machines[member] = Counter()
        driver = self.drivers[member] = Driver(
            store=store, machine=machine, transport=Link(self, member), settings=self.settings, clock=SystemClock(),
            rng=random.Random(member), on_fatal=self.fatal.append,
        )  # fmt: skip
        await driver.start(campaign=campaign)
        for other in self.drivers:
            if other != member:
                driver.peer_connected(other)
                self.drivers[other].peer_connected(member)
        return driver

    async def kill(self, member: MemberId) -> None:
        """The process ends and its connections close."""
        await self.drivers.pop(member).stop()
        for driver in self.drivers.values():
            driver.peer_disconnected(member)

    async def leader(self) -> Driver:
        """The driver whose machine was told that it leads."""

        def found() -> Driver | None:
            for member, driver in self.drivers.items():
                heard = self.machines[member].heard
                if (
                    driver.status().role is RoleName.LEADER
                    and heard
                    and heard[-1] == ("leading", driver.status().epoch)
                ):
                    return driver
            return None

        return await until(found)


class Link:
    def __init__(self, group: Group, sender: MemberId) -> None:
        self.group, self.sender = group, sender

    def send(self, to: MemberId, message: bytes, bulk: bool) -> None:
        group = self.group
        if to not in group.drivers or {to, self.sender} & group.cut:
            if self.sender in group.drivers:
                group.drivers[self.sender].report_unreachable(to)
            return
        receiver = group.drivers[to]
        asyncio.get_running_loop().call_soon(receiver.receive, self.sender, message)


async def until(found: Callable[[], T | None]) -> T:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (value := found()):
            await asyncio.sleep(0.002)
        return value


def add(number: int) -> bytes:
    return struct.pack("<q", number)


def play(directory: Path, count: int, body: Callable[[Group], Coroutine[Any, Any, None]]) -> None:
    """Run `body` on a started group; stop what still runs."""

    async def run() -> None:
        group = Group(directory, count)
        try:
            for place, member in enumerate(group.members):
                await group.start(member.id, campaign=place == 0)
            await body(group)
        finally:
            for driver in group.drivers.values():
                await driver.stop()

    asyncio.run(run())


def test_a_fresh_group_elects_its_first_master_at_once(tmp_path: Path) -> None:
    """An embedded job would otherwise wait an election time-out before it starts."""

    async def body(group: Group) -> None:
        began = asyncio.get_running_loop().time()
        leader = await group.leader()
        assert leader.member == "m1"
        assert asyncio.get_running_loop().time() - began < SETTINGS.election_ms / 1000

    play(tmp_path, 3, body)


@pytest.mark.parametrize("count", [1, 3])
def test_proposals_are_applied_once_in_order_everywhere(tmp_path: Path, count: int) -> None:
    """The whole point; a group of one takes the same path."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        results = await asyncio.gather(*(leader.propose(add(1)) for _ in range(200)))
        assert results == list(range(1, 201))
        await until(lambda: all(machine.total == 200 for machine in group.machines.values()))

    play(tmp_path, count, body)


def test_an_exception_of_the_machine_reaches_its_proposer_alone(tmp_path: Path) -> None:
    """A refused command is no failure of the group."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        good, bad = await asyncio.gather(leader.propose(add(1)), leader.propose(add(-1)), return_exceptions=True)
        assert good == 1 and isinstance(bad, ValueError)
        assert await leader.propose(add(1)) == 2

    play(tmp_path, 3, body)


def test_a_follower_refuses_and_names_the_leader(tmp_path: Path) -> None:
    """A definite refusal: the client may ask elsewhere without asking twice."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        follower = next(driver for driver in group.drivers.values() if driver is not leader)
        await until(lambda: follower.status().leader == leader.member or None)
        with pytest.raises(NotLeader) as refusal:
            await follower.propose(add(1))
        assert refusal.value.fields["leader"] == "h1:1"
        with pytest.raises(Refused):
            await leader.propose(bytes(SETTINGS.bulk_bytes_max))

    play(tmp_path, 3, body)


def test_a_killed_leader_is_replaced_and_catches_up_from_its_disk(tmp_path: Path) -> None:
    """Acknowledged entries outlive the leader that acknowledged them, and a restart forgets nothing."""

    async def body(group: Group) -> None:
        first = await group.leader()
        for number in (1, 2, 3):
            await first.propose(add(number))
        await group.kill(first.member)
        second = await group.leader()
        assert second.member != first.member
        assert await second.propose(add(4)) == 10
        await group.start(first.member)
        await until(lambda: group.machines[first.member].applied == [1, 2, 3, 4] or None)

    play(tmp_path, 3, body)


def test_a_closed_connection_starts_an_election_long_before_the_time_out(tmp_path: Path) -> None:
    """A kill would otherwise cost a whole election time-out."""

    async def body(group: Group) -> None:
        group.settings = RaftSettings(heartbeat_ms=20, election_ms=20_000)
        await (await group.leader()).propose(add(1))
        for member in [member.id for member in group.members]:
            await group.drivers.pop(member).stop()
        for member in group.members:
            await group.start(member.id, campaign=member.slot == 1)
        await group.kill((await group.leader()).member)
        await group.leader()  # Within the deadline, which is half the time-out.

    play(tmp_path, 3, body)


def test_a_leader_without_a_quorum_answers_unknown_and_steps_down(tmp_path: Path) -> None:
    """Its entry may yet be committed by another: *failed* would be a lie."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        group.cut.add(leader.member)
        with pytest.raises(Unknown):
            await leader.propose(add(5))
        assert leader.status().role is not RoleName.LEADER
        assert group.machines[leader.member].heard[-1][0] == "following"
        group.cut.clear()
        await (await group.leader()).propose(add(1))

    play(tmp_path, 3, body)


def test_what_is_no_message_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """A peer of another version, or a scanner, must not end a master."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        for data in (b"", b"\xff" * 10, b"\x92\x63\x01", encode_message(Heartbeat(1, 0))[:-1]):
            with pytest.raises(Refused):
                leader.receive(MemberId("m2"), data)
        assert await leader.propose(add(1)) == 1
        assert not group.fatal

    play(tmp_path, 3, body)


class BrokenStore(Store):
    broken = False

    def sync(self) -> None:
        if self.broken:
            raise StorageFailed("the disk is gone")
        super().sync()


def test_a_failed_sync_is_fatal_once_and_is_never_acknowledged(tmp_path: Path) -> None:
    """After a failed sync nothing can be promised, and trying again would call lost data safe."""

    async def run() -> None:
        group = Group(tmp_path, 1)
        store = BrokenStore.open(str(tmp_path / "m1"), SETTINGS)
        assert isinstance(store, BrokenStore)
        driver = await group.start(MemberId("m1"), store=store)
        await group.leader()
        store.broken = True
        with pytest.raises(Unknown):
            await driver.propose(add(1))
        with pytest.raises(Unavailable):
            await driver.propose(add(1))
        assert [type(error) for error in group.fatal] == [StorageFailed]
        assert group.machines[driver.member].total == 0
        await driver.stop()

    asyncio.run(run())


class Explosive(Counter):
    def apply(self, index: int, epoch: int, data: bytes) -> object:
        raise ZeroDivisionError


def test_an_exception_raised_by_the_machine_is_fatal(tmp_path: Path) -> None:
    """A member that skips what it cannot apply would differ from the others from then on."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        leader._machine = Explosive()
        with pytest.raises(Unknown):
            await leader.propose(add(1))
        assert [type(error) for error in group.fatal] == [ZeroDivisionError]

    play(tmp_path, 1, body)


class JumpingClock(SystemClock):
    skipped = 0.0

    def now(self) -> float:
        return super().now() + self.skipped


def test_a_process_that_was_stopped_does_not_depose_a_living_leader(tmp_path: Path) -> None:
    """SIGSTOP, a closed laptop, a long collection: the silence was the sleeper's own."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        clock = JumpingClock()
        member = next(driver.member for driver in group.drivers.values() if driver is not leader)
        sleeper = group.drivers[member]
        sleeper._clock = clock
        await until(lambda: sleeper.status().leader == leader.member or None)
        epoch = leader.status().epoch
        for _ in range(5):
            clock.skipped += 100.0
            await leader.propose(add(1))
            await until(lambda: group.machines[member].total == leader.status().applied_index - 2 or None)
        assert sleeper.status().epoch == epoch and leader.status().role is RoleName.LEADER

    play(tmp_path, 3, body)


def test_a_driver_stops_with_proposals_under_way(tmp_path: Path) -> None:
    """A future that is never answered would hang the caller for ever."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        waiting = [asyncio.ensure_future(leader.propose(add(1))) for _ in range(3)]
        await asyncio.sleep(0)
        await leader.stop()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, Unavailable) or outcome == place for place, outcome in enumerate(outcomes, 1))

    play(tmp_path, 1, body)
