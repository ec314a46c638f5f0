"""The simulation finds planted bugs: each is a rule of Raft left out, found by its invariant within some seeds.

A simulation that finds nothing may be one that looks at nothing. The bugs are those that real systems had.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from jobrunner.errors import CorruptData
from jobrunner.ids import MemberId
from jobrunner.raft.engine import Engine
from jobrunner.raft.messages import Append, HeartbeatReply, PreVoteRequest, VoteRequest
from jobrunner.raft.progress import quorum_index
from jobrunner.raft.ready import Ready
from jobrunner.raft.roles import Leader
from jobrunner.raft.settings import RaftSettings
from tests.simulation.raft_history import Broken
from tests.simulation.raft_world import MS, Faults, RaftWorld

HARD = Faults(
    loss=0.05, duplicates=0.1, late=0.1, crashes=8, pauses=1, cuts=4, breaks=4, stalls=0.1, lose_all=True,
    transfers=1,
)  # fmt: skip
LOSSY = Faults(loss=0.3)
SLOW = Faults(delay_us=(50, 5 * MS))
ONE_BY_ONE = RaftSettings(
    heartbeat_ms=10, election_ms=60, append_bytes_max=40, bulk_bytes_max=2_000, inflight_max=1, sync_hang_ms=1_000
)
FIRST = 1


class VoteNotSaved(Engine):
    """PySyncObj#84: a member that restarts votes again in the same term."""

    def ready(self) -> Ready:
        ready = super().ready()
        if ready.save is None:
            return ready
        return replace(ready, save=replace(ready.save, state=replace(ready.save.state, vote=None)))


class AckBeforeSave(Engine):
    """etcd#14370: what a quorum acknowledged is lost when the power goes."""

    def ready(self) -> Ready:
        ready = super().ready()
        return replace(ready, send_now=ready.send_now + ready.after_persist, after_persist=())


class OwnAckBeforeSave(Engine):
    """The same at the leader: it counts itself before its own disk has the entry."""

    def _advance_commit(self, role: Leader) -> None:
        self.log.durable_index = self.log.last_index
        super()._advance_commit(role)


class CommitsOlderTerms(Engine):
    """Raft, figure 8: an entry of an older term is committed by counting, and replaced later."""

    def _advance_commit(self, role: Leader) -> None:
        index = quorum_index([self.log.durable_index, *(progress.match for progress in role.progress.values())])
        self.commit_index = max(self.commit_index, index)
        while role.uncommitted and role.uncommitted[0][0] <= index:
            role.uncommitted_bytes -= role.uncommitted.popleft()[1]


class TruncatesAlways(Engine):
    """PySyncObj, akka-raft#66: a late append removes what was acknowledged after it."""

    def _on_append(self, sender: MemberId, message: Append) -> None:
        fits = self.log.matches(message.prev_index, message.prev_term)
        if fits and self.commit_index <= message.prev_index < self.log.last_index:
            self.log.truncate(message.prev_index + 1)
        super()._on_append(sender, message)


class VotesForAnyLog(Engine):
    """Raft, 5.4.1: a candidate without a committed entry wins."""

    def _on_pre_vote_request(self, sender: MemberId, message: PreVoteRequest) -> None:
        super()._on_pre_vote_request(sender, PreVoteRequest(message.term, self.log.last_index, self.log.last_term))

    def _on_vote_request(self, sender: MemberId, message: VoteRequest) -> None:
        super()._on_vote_request(sender, VoteRequest(message.term, self.log.last_index, self.log.last_term))


class AnyAnswerConfirms(Engine):
    """etcd#20418: the answer to an older round of heartbeats confirms a younger read."""

    def _on_heartbeat_reply(self, sender: MemberId, message: HeartbeatReply) -> None:
        if isinstance(self.role, Leader):
            message = HeartbeatReply(message.term, self.role.reads.round)
        super()._on_heartbeat_reply(sender, message)


class ReadsWithoutOwnTerm(Engine):
    """etcd#7331: a new leader serves what it knew to be committed, not what was."""

    def _begin_reads(self, role: Leader) -> None:
        noop, role.noop_index = role.noop_index, 0
        super()._begin_reads(role)
        role.noop_index = noop


def seeds_until_found(engine_class: type[Engine], limit: int) -> int | None:
    for seed in range(FIRST, FIRST + limit):
        world = RaftWorld(seed, members=3 + 2 * (seed % 2), faults=HARD, engine_class=engine_class)
        try:
            world.play(3_000 * MS)
            world.settle()
        except (Broken, AssertionError, CorruptData):
            return seed - FIRST + 1
    return None


@pytest.mark.parametrize(
    "engine_class",
    [
        AckBeforeSave, OwnAckBeforeSave, TruncatesAlways, VotesForAnyLog, ReadsWithoutOwnTerm,
    ],
)  # fmt: skip
def test_a_planted_bug_is_found(engine_class: type[Engine]) -> None:
    """Without it, an invariant that looks at nothing would pass for ever."""
    assert seeds_until_found(engine_class, 60) is not None


def play_figure_8(seed: int, engine_class: type[Engine]) -> None:
    """Leaders append and lose power before or after a little of it is replicated (as in MIT 6.5840, Figure8)."""
    world = RaftWorld(seed, members=3, faults=LOSSY, settings=ONE_BY_ONE, engine_class=engine_class)
    rng = world.rng
    for _ in range(150):
        for node in world.awake():
            if isinstance(node.engine.role, Leader):
                world.propose_somewhere()
                world.propose_somewhere()
                if rng.random() < 0.7:
                    world.run(rng.randint(0, rng.choice((0, 1, 5, 30)) * MS))
                    if node.running:
                        node.crash(power=True)
        world.run(rng.randint(5 * MS, 60 * MS))
        down = [node for node in world.nodes.values() if not node.running]
        if len(down) > 1 or (down and rng.random() < 0.3):
            rng.choice(down).start()
    world.settle()


def play_elections(seed: int, engine_class: type[Engine]) -> None:
    """Several campaign at once, and voters lose power and are back within the same election."""
    world = RaftWorld(seed, members=5, faults=SLOW, settings=ONE_BY_ONE, engine_class=engine_class)
    rng = world.rng
    for _ in range(60):
        for node in world.awake():
            if rng.random() < 0.5:
                node.engine.campaign()
                node.pump()
        for _ in range(4):
            world.run(rng.randint(0, 5 * MS))
            node = rng.choice(list(world.nodes.values()))
            node.crash(power=True)
            node.start()
        world.run(rng.randint(0, 100 * MS))
    world.settle()


def play_reads(seed: int, engine_class: type[Engine]) -> None:
    """A leader is stopped while answers to its heartbeats are on their way; it wakes deposed, and is asked at once."""
    world = RaftWorld(seed, members=3, faults=Faults(), settings=ONE_BY_ONE, engine_class=engine_class)
    rng = world.rng
    for _ in range(10):
        world.run(rng.randint(200 * MS, 400 * MS))
        for node in world.awake():
            if isinstance(node.engine.role, Leader):
                world.read_at(node)
                node.pause()
                world.run(rng.randint(0, 1 * MS))
                for _ in range(20):
                    world.run(20 * MS)
                    world.propose_somewhere()
                inbox, node.inbox = node.inbox, []
                node.wake()
                if isinstance(node.engine.role, Leader):
                    world.read_at(node)
                for sender, message in inbox:
                    node.receive(sender, message)
                break
    world.settle()


def seeds_until_broken(play: Callable[[int, type[Engine]], None], engine_class: type[Engine], limit: int) -> int | None:
    for seed in range(FIRST, FIRST + limit):
        try:
            play(seed, engine_class)
        except Broken:
            return seed - FIRST + 1
    return None


def test_a_vote_that_is_not_saved_is_found() -> None:
    """It takes two candidates of one term and a restart between their requests."""
    assert seeds_until_broken(play_elections, VoteNotSaved, 30) is not None


def test_voters_that_restart_in_an_election_vote_once() -> None:
    """T01; PySyncObj#84."""
    assert seeds_until_broken(play_elections, Engine, 10) is None


def test_an_answer_to_an_older_round_that_confirms_a_read_is_found() -> None:
    """It takes a leader that was stopped with answers on their way to it (found in etcd by process pauses)."""
    assert seeds_until_broken(play_reads, AnyAnswerConfirms, 20) is not None


def test_a_leader_that_was_stopped_serves_no_old_read() -> None:
    """T17."""
    assert seeds_until_broken(play_reads, Engine, 10) is None


def test_figure_8_is_found_in_an_engine_that_commits_older_terms_by_count() -> None:
    """The rarest of the rules: it takes three leaders and an append that arrives in part."""
    assert seeds_until_broken(play_figure_8, CommitsOlderTerms, 100) is not None


def test_figure_8_never_replaces_a_committed_entry() -> None:
    """Raft, figure 8: counting replicas of an older term's entry would commit what a later leader may replace."""
    assert seeds_until_broken(play_figure_8, Engine, 20) is None


def test_the_unchanged_engine_survives_the_same_faults() -> None:
    """Otherwise the planted bugs would prove nothing."""
    assert seeds_until_found(Engine, 10) is None
