"""The rules of Raft, one by one, on engines moved by hand."""

from dataclasses import replace

import pytest

from jobrunner.errors import CorruptData, NotLeader, Refused, Unavailable
from jobrunner.ids import MemberId
from jobrunner.raft.engine import Engine
from jobrunner.raft.messages import (
    Append,
    AppendReply,
    Entry,
    EntryKind,
    Heartbeat,
    HeartbeatReply,
    PreVoteReply,
    PreVoteRequest,
    VoteReply,
    VoteRequest,
)
from jobrunner.raft.progress import ProgressState
from jobrunner.raft.ready import HardState
from jobrunner.raft.roles import Candidate, Follower, Leader, PreCandidate
from tests.scenarios.raft_group import SETTINGS, RaftGroup

M1, M2, M3, M4, M5 = (MemberId(f"m{slot}") for slot in range(1, 6))


def candidate(group: RaftGroup, member: MemberId = M1) -> Engine:
    """Make `member` a candidate whose own vote is not yet durable; nothing else is under way."""
    engine = group.engines[member]
    engine.campaign()
    group.pump(member)
    for peer in group.engines:
        if peer != member:
            engine.step(peer, PreVoteReply(engine.term + 1, True))
            if isinstance(engine.role, Candidate):
                break
    group.network.clear()
    group.pump(member)
    assert isinstance(engine.role, Candidate)
    return engine


def leader_role(engine: Engine) -> Leader:
    assert isinstance(engine.role, Leader), engine.role
    return engine.role


# --- elections ---


def test_a_candidates_own_vote_counts_only_when_it_is_durable() -> None:
    """T03. A vote that a crash can take back may be given twice."""
    group = RaftGroup(3)
    engine = candidate(group)
    engine.step(M2, VoteReply(2, True))
    assert isinstance(engine.role, Candidate)
    group.save(M1)
    assert isinstance(engine.role, Leader)


def test_vote_requests_leave_only_after_the_save() -> None:
    """A request promises the log it names: a candidate that loses its tail would collect votes for what it lost."""
    group = RaftGroup(3)
    candidate(group)
    assert not group.sent(VoteRequest)
    group.save(M1)
    assert len(group.sent(VoteRequest)) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_leaders_own_entry_counts_only_when_it_is_durable(count: int) -> None:
    """T03, T32, etcd#14370: a group of one would acknowledge what a power cut takes back."""
    group = RaftGroup(count)
    engine = group.elect(M1)
    before = engine.commit_index
    group.propose(M1, b"x")
    group.network.clear()
    assert engine.commit_index == before
    group.save(M1)
    assert engine.commit_index == (before + 1 if count == 1 else before)


def test_a_vote_that_arrives_four_times_counts_once() -> None:
    """T04, xraft#27."""
    group = RaftGroup(5)
    engine = candidate(group)
    group.save(M1)
    for _ in range(4):
        engine.step(M2, VoteReply(2, True))
    assert isinstance(engine.role, Candidate)
    engine.step(M3, VoteReply(2, True))
    assert isinstance(engine.role, Leader)


def test_the_first_answer_of_a_voter_counts() -> None:
    """A refusal that arrives late must not take a vote back, nor a vote a refusal."""
    group = RaftGroup(3)
    engine = candidate(group)
    group.save(M1)
    engine.step(M2, VoteReply(2, False))
    engine.step(M2, VoteReply(2, True))
    assert isinstance(engine.role, Candidate)


def test_the_same_candidate_is_answered_again_and_another_is_refused() -> None:
    """T05, akka-raft#29: a lost reply must not cost the election; a second vote must not be given."""
    group = RaftGroup(3)
    voter = group.engines[M2]
    for _ in range(2):
        voter.step(M1, VoteRequest(2, 1, 1))
        group.pump(M2)
        if M2 in group.saving:
            group.save(M2)
        assert [sent.message for sent in group.network] == [VoteReply(2, True)]
        group.network.clear()
    voter.step(M3, VoteRequest(2, 9, 1))
    group.pump(M2)
    assert [sent.message for sent in group.network] == [VoteReply(2, False)]


def test_a_vote_survives_a_restart() -> None:
    """T01, PySyncObj#84."""
    group = RaftGroup(3)
    group.engines[M2].step(M1, VoteRequest(5, 1, 1))
    group.pump(M2)
    group.save(M2)
    group.network.clear()
    group.restart(M2).step(M3, VoteRequest(5, 1, 1))
    group.pump(M2)
    assert [sent.message for sent in group.network] == [VoteReply(5, False)]


def test_a_vote_is_kept_when_a_candidate_becomes_a_follower_in_its_term() -> None:
    """CCF#8094: forgetting the vote without a higher term elects two leaders."""
    group = RaftGroup(3)
    engine = candidate(group)
    group.save(M1)
    engine.step(M2, VoteReply(2, False))
    engine.step(M3, VoteReply(2, False))
    assert isinstance(engine.role, Follower) and engine.vote == M1
    engine.step(M2, VoteRequest(2, 5, 1))
    group.network.clear()
    group.pump(M1)
    assert group.sent(VoteReply, M2)[0].message == VoteReply(2, False)


def test_stale_answers_count_for_nothing() -> None:
    """T07. A pre-vote is no vote, and a vote of an earlier term is none of this one."""
    group = RaftGroup(3)
    engine = candidate(group)
    group.save(M1)
    engine.step(M2, PreVoteReply(2, True))
    engine.step(M2, VoteReply(1, True))
    assert isinstance(engine.role, Candidate) and set(engine.role.votes) == {M1}


def test_a_log_that_is_behind_gets_no_vote_and_no_pre_vote() -> None:
    """Raft, 5.4.1: the leader must hold everything that is committed."""
    group = RaftGroup(3)
    engine = group.give_log(M2, [1, 2], term=2)
    for last_index, last_term in ((2, 2), (9, 1)):
        engine.step(M1, PreVoteRequest(5, last_index, last_term))
        engine.step(M1, VoteRequest(5, last_index, last_term))
    group.pump(M2)
    group.save(M2)
    assert not any(sent.message.granted for sent in group.network)  # type: ignore[union-attr]
    assert engine.term == 5 and engine.vote is None


def test_a_pre_vote_changes_nothing_and_saves_nothing() -> None:
    """Thesis, 9.6: an isolated member may ask for ever without raising anybody's term, its own included."""
    group = RaftGroup(3)
    for _ in range(10):
        group.tick(M3, 2_000)
    for sent in list(group.network):
        group.deliver(sent)
    assert {engine.term for engine in group.engines.values()} == {1}
    assert not group.saving and all(engine.vote is None for engine in group.engines.values())


def test_voters_are_loyal_to_a_leader_they_hear() -> None:
    """Thesis, 4.2.3: a member that misses the leader must not depose it for the others."""
    group = RaftGroup(3)
    leader = group.elect(M1)
    voter = group.engines[M2]
    voter.step(M3, PreVoteRequest(9, 9, 9))
    voter.step(M3, VoteRequest(9, 9, 9))
    leader.step(M3, VoteRequest(9, 9, 9))
    group.pump(M2)
    assert voter.term == leader.term == 2
    assert [sent.message for sent in group.network] == [PreVoteReply(2, False)]
    voter.advance(SETTINGS.election_ms)
    voter.step(M3, VoteRequest(9, 9, 9))
    assert voter.term == 9 and voter.vote == M3


def test_a_voter_whose_connection_to_the_leader_closed_is_not_held_back() -> None:
    """A kill would otherwise cost a whole time-out although everybody has seen it."""
    group = RaftGroup(3)
    group.elect(M1)
    for member in (M2, M3):
        group.engines[member].peer_lost(M1)
    group.tick(M2, 1)
    group.network = [sent for sent in group.network if sent.to != M1]
    group.stabilize({M2, M3})
    assert isinstance(group.engines[M2].role, Leader)
    assert group.engines[M2].now_ms < 2 * SETTINGS.heartbeat_ms


def test_a_leader_that_is_heard_again_is_not_lost() -> None:
    """A connection that breaks and opens again is no death."""
    group = RaftGroup(3)
    group.elect(M1)
    group.engines[M2].peer_lost(M1)
    group.engines[M2].step(M1, Heartbeat(2, 1))
    group.network.clear()
    group.tick(M2, SETTINGS.election_ms - 1)
    assert not group.sent(PreVoteRequest)


def test_a_lost_connection_to_a_follower_starts_nothing() -> None:
    """Only the leader's death is an election's business."""
    group = RaftGroup(3)
    group.elect(M1)
    group.engines[M2].peer_lost(M3)
    group.tick(M2, SETTINGS.election_ms - 1)
    assert isinstance(group.engines[M2].role, Follower)


def test_two_that_ask_in_the_same_hurry_do_not_both_ask_again_at_once() -> None:
    """Split votes in a hurry would cost more than the hurry saves."""
    group = RaftGroup(3)
    group.elect(M1)
    engine = group.engines[M2]
    engine.peer_lost(M1)
    engine.step(M3, PreVoteRequest(3, 2, 2))
    group.network.clear()
    group.tick(M2, 5)
    assert not group.sent(PreVoteRequest)


def test_an_older_leader_and_an_older_asker_are_answered_with_the_higher_term() -> None:
    """etcd#8499: a silent drop leaves them stuck for ever."""
    group = RaftGroup(3)
    engine = group.give_log(M2, [], term=7)
    for message in (Append(5, 1, 1, 1, ()), Heartbeat(5, 1), PreVoteRequest(5, 1, 1), VoteRequest(5, 1, 1)):
        engine.step(M1, message)
        group.pump(M2)
        assert [sent.message.term for sent in group.network] == [7], message
        group.network.clear()


def test_a_leader_that_hears_from_no_quorum_steps_down() -> None:
    """T18: one that can send but not receive would otherwise keep the others loyal for ever."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    for _ in range(2):
        group.tick(M1, SETTINGS.election_ms)
    assert isinstance(engine.role, Follower) and engine.leader is None and engine.term == 2


def test_a_leader_with_a_quorum_keeps_leading() -> None:
    """One follower of two is enough; the other may be down for days."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    for _ in range(100):
        engine.step(M2, HeartbeatReply(2))
        group.tick(M1, SETTINGS.heartbeat_ms)
    assert isinstance(engine.role, Leader)


def test_a_leader_that_slept_must_hear_from_a_quorum_soon() -> None:
    """It may be deposed; by its own count of time no time has passed."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    engine.slept(60_000)
    group.tick(M1, 0)
    assert len(group.sent(Heartbeat)) == 2
    group.tick(M1, 4 * SETTINGS.heartbeat_ms)
    assert isinstance(engine.role, Follower)


def test_a_follower_that_slept_blames_nobody() -> None:
    """T12: its silence was its own; the leader gets a beat's time to be heard."""
    group = RaftGroup(3)
    group.elect(M1)
    engine = group.engines[M2]
    group.tick(M2, SETTINGS.election_ms - 1)
    engine.slept(60_000)
    group.tick(M2, 1)
    assert isinstance(engine.role, Follower) and engine.leader == M1


def test_a_group_of_one_elects_itself_at_once_by_the_same_path() -> None:
    """There is no second code path without replication."""
    group = RaftGroup(1)
    group.tick(M1, 0)
    engine = group.engines[M1]
    assert isinstance(engine.role, Candidate)
    group.save(M1)
    assert isinstance(engine.role, Leader) and engine.commit_index == 1
    group.save(M1)
    assert engine.commit_index == 2


def test_a_member_that_the_log_does_not_name_never_campaigns() -> None:
    """A directory of another group would otherwise raise terms here."""
    group = RaftGroup(3)
    log = group.engines[M1].log
    stranger = Engine(
        member=MemberId("m9"), log=log, state=HardState(1, None, 1), settings=SETTINGS, rng=group.engines[M1]._rng
    )
    stranger.tick(2_000)
    assert isinstance(stranger.role, Follower) and not stranger.ready().send_now
    group.engines[M1].step(MemberId("m9"), VoteRequest(9, 9, 9))
    assert group.engines[M1].term == 1


def test_a_disk_that_hangs_makes_a_leader_step_down_and_nobody_campaign() -> None:
    """etcd#3068: heartbeats without commits keep everybody waiting."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    group.propose(M1, b"x")
    for _ in range(SETTINGS.sync_hang_ms // SETTINGS.heartbeat_ms):
        engine.step(M2, HeartbeatReply(2))
        group.tick(M1, SETTINGS.heartbeat_ms)
    assert isinstance(engine.role, Follower)
    group.network.clear()
    group.tick(M1, 5_000)
    assert not group.sent(PreVoteRequest)
    group.save(M1)
    group.tick(M1, 5_000)
    assert group.sent(PreVoteRequest)


def test_a_found_peer_is_asked_again() -> None:
    """The first master of a fresh group campaigns before the others listen."""
    group = RaftGroup(3)
    engine = group.engines[M1]
    engine.campaign()
    group.pump(M1)
    group.network.clear()
    engine.peer_found(M2)
    group.pump(M1)
    assert [str(sent) for sent in group.network] == ["m1 -> m2 PreVoteRequest term=2 last=1/1"]
    assert isinstance(engine.role, PreCandidate)


# --- replication ---


def test_a_new_leader_appends_an_entry_of_its_own() -> None:
    """Without traffic, nothing of earlier terms could ever be committed."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    assert engine.log.slice(2, 2, 1)[0].kind == EntryKind.NOOP and engine.commit_index == 2
    assert all(other.commit_index == 2 for other in group.engines.values())


def test_an_older_terms_entry_is_never_committed_by_counting() -> None:
    """T13; Raft, 5.4.2."""
    group = RaftGroup(3)
    group.give_log(M1, [2], term=3)
    group.give_log(M2, [2], term=3)
    engine = candidate(group)
    group.save(M1)
    engine.step(M2, VoteReply(4, True))
    group.pump(M1)
    group.save(M1)
    engine.step(M2, AppendReply(4, 2))
    assert engine.commit_index == 1
    engine.step(M2, AppendReply(4, 3))
    assert engine.commit_index == 3


def test_a_heartbeat_never_names_more_than_its_receiver_has_acknowledged() -> None:
    """T09: the receiver may hold other entries there, of an older term."""
    group = RaftGroup(3)
    group.give_log(M3, [1, 1, 1, 1, 1, 1])
    group.give_log(M1, [1, 1, 2])
    group.give_log(M2, [1, 1, 2])
    engine = group.engines[M1]
    engine.campaign()
    group.stabilize({M1, M2})
    assert engine.commit_index == 5
    group.network.clear()
    group.tick(M1, SETTINGS.heartbeat_ms)
    assert [sent.message for sent in group.sent(Heartbeat, M3)] == [Heartbeat(3, 0)]
    follower = group.engines[M3]
    follower.step(M1, Append(3, 3, 1, 5, ()))
    assert follower.commit_index == 3 and follower.log.last_index == 7


def test_a_late_rejection_moves_nothing_back() -> None:
    """T10, openraft#1500."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    for number in range(18):
        group.propose(M1, b"%d" % number)
    group.stabilize()
    progress = leader_role(engine).progress[M2]
    before = replace(progress)
    engine.step(M2, AppendReply(2, 10, True, 3, 1))
    assert (progress.match, progress.next, progress.state) == (before.match, before.next, before.state)


def test_a_late_ack_moves_nothing_back() -> None:
    """Acks only rise; they may arrive in any order."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    group.propose(M1, b"x")
    group.stabilize()
    engine.step(M2, AppendReply(2, 1))
    assert leader_role(engine).progress[M2].match == 3


def test_a_late_append_removes_nothing() -> None:
    """akka-raft#66: what was acknowledged after it stays."""
    group = RaftGroup(3)
    group.elect(M1)
    follower = group.engines[M2]
    first = Entry(3, 2, EntryKind.DATA, b"a")
    follower.step(M1, Append(2, 2, 2, 2, (first, Entry(4, 2, EntryKind.DATA, b"b"))))
    follower.step(M1, Append(2, 2, 2, 2, (first,)))
    follower.step(M1, Append(2, 1, 1, 2, ()))
    assert follower.log.last_index == 4


def test_a_conflict_removes_from_the_first_entry_that_differs() -> None:
    """Raft, figure 7: the tail of a deposed leader gives way, what agrees stays."""
    group = RaftGroup(3)
    follower = group.give_log(M2, [1, 1, 2, 2, 2])
    entries = (Entry(3, 1, EntryKind.DATA, b"old3"), Entry(4, 3, EntryKind.DATA, b"new"))
    follower.step(M1, Append(3, 2, 1, 1, entries))
    assert follower.log.last_index == 4 and follower.log.term_at(4) == 3


def test_a_long_divergence_costs_one_round_for_each_term() -> None:
    """T14: 1000 entries, one by one, would take 1000 round trips."""
    group = RaftGroup(3, replace(SETTINGS, append_bytes_max=1 << 20, bulk_bytes_max=1 << 20))
    group.give_log(M1, [1] * 10 + [7], term=8)
    group.give_log(M2, [1] * 10 + [7], term=8)
    group.give_log(M3, [1] * 10 + [2] * 200 + [3] * 200 + [4] * 200 + [5] * 200 + [6] * 200, term=8)
    engine = group.engines[M1]
    engine.campaign()
    group.stabilize({M1, M2})
    group.network.clear()
    leader_role(engine).progress[M3].probe()
    rounds = group.stabilize()
    assert group.engines[M3].log.last_term == 9 and group.engines[M3].log.last_index == engine.log.last_index
    assert rounds / 2 <= 5 + 3


def test_an_acknowledgement_waits_for_the_save() -> None:
    """T32: a quorum must never count what a power cut takes back; rejections wait as well."""
    group = RaftGroup(3)
    group.elect(M1)
    follower = group.engines[M2]
    follower.step(M1, Append(2, 2, 2, 2, (Entry(3, 2, EntryKind.DATA, b"a"),)))
    group.pump(M2)
    follower.step(M1, Append(2, 3, 2, 2, (Entry(4, 2, EntryKind.DATA, b"b"),)))
    group.pump(M2)
    assert not group.network
    group.save(M2)
    assert [sent.message for sent in group.network] == [AppendReply(2, 3)]
    group.save(M2)
    assert [sent.message for sent in group.network] == [AppendReply(2, 3), AppendReply(2, 4)]


def test_an_entry_replaced_while_it_is_written_is_not_taken_for_durable() -> None:
    """The ABA race of overlapping writes (etcd-io/raft, async_storage_writes_append_aba_race)."""
    group = RaftGroup(3)
    follower = group.engines[M2]
    follower.step(M1, Append(2, 1, 1, 1, (Entry(2, 2, EntryKind.DATA, b"a"), Entry(3, 2, EntryKind.DATA, b"b"))))
    group.pump(M2)
    follower.step(M3, Append(3, 1, 1, 1, (Entry(2, 3, EntryKind.DATA, b"c"),)))
    group.save(M2)
    assert follower.log.durable_index == 1
    group.save(M2)
    assert follower.log.durable_index == 2
    assert [entry.data for entry in group.disks[M2].entries[1:]] == [b"c"]


def test_messages_are_bounded_in_bytes_and_in_number() -> None:
    """A follower that comes back must not get the whole log at once."""
    group = RaftGroup(3, replace(SETTINGS, append_bytes_max=1_024, inflight_max=4))
    engine = group.elect(M1)
    for _ in range(100):
        engine.propose(b"x" * 100)
    group.pump(M1)
    appends = group.sent(Append, M2)
    assert len(appends) == 4
    for sent in appends:
        assert isinstance(sent.message, Append)
        assert 0 < sum(entry.size for entry in sent.message.entries) <= 1_024
    group.stabilize()
    assert group.engines[M2].log.last_index == 102


def test_large_entries_take_the_bulk_connection_and_never_overtake() -> None:
    """Two connections keep no order between them: a message that overtakes would be rejected."""
    group = RaftGroup(3, replace(SETTINGS, append_bytes_max=1_024, bulk_bytes_max=10_000))
    engine = group.elect(M1)
    engine.propose(b"small")
    engine.propose(b"x" * 2_000)
    engine.propose(b"y" * 2_000)
    engine.propose(b"small")
    sends = [send for send in engine.ready().send_now if send.to == M2]
    assert [send.bulk for send in sends] == [False]
    engine.step(M2, AppendReply(2, 3))
    sends = [send for send in engine.ready().send_now if send.to == M2]
    assert [send.bulk for send in sends] == [True]
    engine.step(M2, HeartbeatReply(2))
    assert not engine.ready().send_now
    assert isinstance(sends[0].message, Append)
    engine.step(M2, AppendReply(2, sends[0].message.entries[-1].index))
    assert leader_role(engine).progress[M2].match >= 5


def test_a_bulk_message_that_is_lost_is_sent_again() -> None:
    """The connection may close with it in the queue, and nobody be told."""
    group = RaftGroup(3, replace(SETTINGS, append_bytes_max=1_024, bulk_bytes_max=10_000))
    group.elect(M1)
    group.propose(M1, b"x" * 2_000)
    group.network.clear()
    for _ in range(2 * SETTINGS.election_ms // SETTINGS.heartbeat_ms):
        group.tick(M1, SETTINGS.heartbeat_ms)
        group.stabilize()
    assert all(engine.commit_index == 3 for engine in group.engines.values())


def test_an_unreachable_follower_gets_heartbeats_only_until_it_answers() -> None:
    """Entries would be dropped again and again, each time with the work of making the message."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    engine.report_unreachable(M2)
    group.propose(M1, b"x")
    assert not group.sent(Append, M2) and group.sent(Append, M3)
    engine.step(M2, HeartbeatReply(2))
    group.pump(M1)
    assert group.sent(Append, M2)
    group.stabilize()
    assert leader_role(engine).progress[M2].state is ProgressState.REPLICATE


def test_a_full_window_with_lost_acks_opens_again() -> None:
    """A leader that waits for acks that never come would wedge."""
    group = RaftGroup(3, replace(SETTINGS, inflight_max=2, append_bytes_max=1_024))
    engine = group.elect(M1)
    for _ in range(20):
        group.propose(M1, b"x" * 500)
    for sent in group.sent(Append, M2):
        group.deliver(sent)
    group.save(M2)
    group.network.clear()
    for _ in range(4):
        group.tick(M1, SETTINGS.heartbeat_ms)
        group.stabilize()
    assert group.engines[M2].log.last_index == engine.log.last_index


def test_proposals_are_refused_by_others_and_over_the_limits() -> None:
    """Definite refusals: nothing is in any log."""
    group = RaftGroup(3, replace(SETTINGS, proposals_bytes_max=1_000, bulk_bytes_max=900))
    engine = group.elect(M1)
    with pytest.raises(NotLeader) as refusal:
        group.engines[M2].propose(b"x")
    assert refusal.value.fields["leader"] == "h1:1"
    with pytest.raises(Refused):
        engine.propose(b"x" * 900)
    for _ in range(2):
        engine.propose(b"x" * 400)
    with pytest.raises(Unavailable):
        engine.propose(b"x" * 400)
    group.stabilize()
    engine.propose(b"x" * 400)


# --- what must not be ---


def test_a_member_that_lost_what_it_acknowledged_stops() -> None:
    """It would vote with a memory that is not its own: an old copy of its directory, most likely."""
    group = RaftGroup(3)
    group.elect(M1)
    with pytest.raises(CorruptData, match="not what it was"):
        group.restart(M2).step(M1, Heartbeat(2, 40))


def test_two_leaders_of_one_term_are_damage() -> None:
    """It cannot be unless some member voted twice: better to stop than to go on."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    with pytest.raises(CorruptData):
        engine.step(M2, Append(2, 1, 1, 1, ()))


def test_an_ack_beyond_the_leaders_log_is_damage() -> None:
    """The leader's own log lost its end."""
    group = RaftGroup(3)
    engine = group.elect(M1)
    with pytest.raises(CorruptData):
        engine.step(M2, AppendReply(2, 50))
