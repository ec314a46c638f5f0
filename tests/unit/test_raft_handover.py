"""Linearizable reads and leadership transfer: the engine's edges, and drivers on real directories."""

import asyncio
from pathlib import Path

import pytest

from jobrunner.errors import NotLeader, Refused, Unavailable, Unknown
from jobrunner.ids import MemberId
from jobrunner.raft.driver import RoleName
from jobrunner.raft.messages import Heartbeat, HeartbeatReply, TimeoutNow
from jobrunner.raft.reads import ReadReady, Reads
from jobrunner.raft.roles import Candidate, Follower, Leader
from tests.scenarios.raft_group import RaftGroup
from tests.unit.test_raft_driver import SETTINGS, Group, add, play, until

M1, M2, M3 = MemberId("m1"), MemberId("m2"), MemberId("m3")


def test_reads_that_arrive_during_a_round_share_the_next() -> None:
    """One round a read would be a storm of heartbeats under load."""
    reads = Reads()
    reads.add(1)
    assert reads.begin(5) and reads.round == 1
    reads.add(2)
    reads.add(3)
    assert not reads.begin(6)
    assert reads.confirmed(1) == [ReadReady(1, 5)]
    assert reads.begin(7) and reads.confirmed(1) == []
    assert reads.confirmed(2) == [ReadReady(2, 7), ReadReady(3, 7)]
    assert not reads.begin(8)


def test_a_beat_begins_a_round_although_one_is_unanswered() -> None:
    """A lost answer would otherwise hold up every later read."""
    reads = Reads()
    reads.add(1)
    assert reads.begin(5)
    reads.add(2)
    assert reads.begin(6, at_beat=True)
    assert reads.confirmed(2) == [ReadReady(1, 5), ReadReady(2, 6)]


def test_a_read_dies_with_the_leadership_it_was_asked_of() -> None:
    """Confirmed by a later leadership of the same member it would serve the commit index of the earlier one."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    engine.read()
    engine.ready()
    engine.step_down()
    engine.step(M2, HeartbeatReply(engine.term, 1))
    assert not engine.ready().reads


def test_a_follower_that_is_told_twice_campaigns_once() -> None:
    """T21: a doubled or late TimeoutNow would depose the new leader."""
    group = RaftGroup(3)
    group.elect(M1)
    target = group.engines[M2]
    target.step(M1, TimeoutNow(target.term))
    assert isinstance(target.role, Candidate)
    target.step(M1, TimeoutNow(target.term - 1))
    assert isinstance(target.role, Candidate) and target.term == 3
    group.pump(M2)
    group.stabilize()
    assert isinstance(target.role, Leader) and isinstance(group.engines[M1].role, Follower)
    target.step(M1, TimeoutNow(2))
    assert target.term == 3


def test_only_the_leader_may_say_timeout_now() -> None:
    """A confused peer would start elections as it likes."""
    group = RaftGroup(3)
    group.elect(M1)
    engine = group.engines[M2]
    engine.step(M3, TimeoutNow(engine.term))
    assert isinstance(engine.role, Follower)


def test_another_target_replaces_the_first_and_a_lost_one_ends_the_transfer() -> None:
    """T21: proposals must not wait for a member that is gone."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    group.propose(M1, b"waits")
    assert engine.transfer(M2) == M2
    assert engine.transfer(M3) == M3 and engine.transferring == M3
    engine.peer_lost(M3)
    assert engine.transferring is None
    group.propose(M1, b"taken")
    with pytest.raises(Refused):
        engine.transfer(MemberId("m9"))


def test_voters_loyal_to_the_leader_follow_its_own_wish() -> None:
    """Stickiness would otherwise refuse every transfer until an election time-out."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    engine.transfer(M3)
    group.stabilize()
    assert isinstance(group.engines[M3].role, Leader)
    assert not group.sent(Heartbeat, M3)


def test_a_read_barrier_sees_what_was_acknowledged_before_it(tmp_path: Path) -> None:
    """A status that is older than the answer to a submission looks like a lost job."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        for number in range(1, 20):
            await leader.propose(add(1))
            await asyncio.gather(*(leader.read_barrier() for _ in range(5)))
            assert group.machines[leader.member].total == number
        other = next(driver for driver in group.drivers.values() if driver is not leader)
        with pytest.raises(NotLeader):
            await other.read_barrier()

    play(tmp_path, 3, body)


def test_a_leader_that_is_cut_off_serves_no_read(tmp_path: Path) -> None:
    """T17: the others may have elected and written meanwhile."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        await leader.read_barrier()
        group.cut.add(leader.member)
        with pytest.raises(NotLeader):
            await leader.read_barrier()
        group.cut.clear()

    play(tmp_path, 3, body)


def test_a_single_member_serves_reads_and_cannot_hand_over(tmp_path: Path) -> None:
    """The embedded default may be a group of one."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        await leader.read_barrier()
        with pytest.raises(Refused):
            await leader.transfer()
        waiting = asyncio.ensure_future(leader.read_barrier())
        await asyncio.sleep(0)
        await leader.stop()
        outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
        assert outcome is None or isinstance(outcome, Unavailable)

    play(tmp_path, 1, body)


def test_transfers_under_load_lose_no_acknowledged_proposal(tmp_path: Path) -> None:
    """T20: what was accepted before the hand-over is answered before it; what comes during it is refused, not lost."""

    async def body(group: Group) -> None:
        done, unknown = 0, []

        async def client() -> None:
            nonlocal done
            while done < 120:
                for driver in list(group.drivers.values()):
                    if driver.status().role is RoleName.LEADER:
                        try:
                            await driver.propose(add(1))
                        except Unknown:
                            unknown.append(done)
                        except (NotLeader, Unavailable):
                            pass
                        else:
                            done += 1
                await asyncio.sleep(0.001)

        clients = [asyncio.ensure_future(client()) for _ in range(3)]
        for turn in range(6):
            leader = await group.leader()
            target = MemberId(f"m{turn % 3 + 1}")
            if target != leader.member:
                assert await leader.transfer(target) == target
        await asyncio.gather(*clients)
        leader = await group.leader()
        await leader.read_barrier()
        assert group.machines[leader.member].total == done and not unknown

    play(tmp_path, 3, body)


def test_a_transfer_to_a_member_that_is_cut_off_is_given_up(tmp_path: Path) -> None:
    """T21: the leader must lead on, not wait for ever."""

    async def body(group: Group) -> None:
        leader = await group.leader()
        target = next(member for member in group.drivers if member != leader.member)
        await leader.propose(add(1))
        group.cut.add(target)
        proposing = asyncio.ensure_future(leader.propose(add(2)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await leader.transfer(target)
        assert asyncio.get_running_loop().time() - began < 3 * SETTINGS.election_ms / 1000
        await proposing
        group.cut.clear()
        await until(lambda: leader.status().role is RoleName.LEADER or None)
        await leader.propose(add(3))

    play(tmp_path, 3, body)
