"""The engine's parts: quorum arithmetic, progress, the log in memory, messages."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.errors import Refused
from jobrunner.ids import MemberId
from jobrunner.raft.log import Log
from jobrunner.raft.messages import (
    Append,
    AppendReply,
    Entry,
    EntryKind,
    Heartbeat,
    Member,
    Message,
    PreVoteRequest,
    VoteReply,
    decode_members,
    decode_message,
    encode_message,
    first_entry,
)
from jobrunner.raft.progress import Progress, ProgressState, Tally, majority, quorum_index, tally

names = [MemberId(f"m{slot}") for slot in range(1, 8)]


# --- quorums ---


@given(st.lists(st.integers(0, 20), min_size=1, max_size=7))
def test_the_quorum_index_is_the_highest_that_some_majority_holds(matches: list[int]) -> None:
    """T11: one too high loses data, one too low stops progress."""
    needed = len(matches) // 2 + 1
    brute = max(min(group) for group in combinations(matches, needed))
    assert quorum_index(matches) == brute


@given(st.integers(1, 7), st.dictionaries(st.sampled_from(names), st.booleans()))
def test_a_tally_says_what_no_further_vote_can_change(count: int, votes: dict[MemberId, bool]) -> None:
    """T11: WON and LOST are final, PENDING is not; strangers' votes do not count."""
    voters = names[:count]
    open_votes = [voter for voter in voters if voter not in votes]
    granted = [voter for voter in voters if votes.get(voter)]
    can_win = len(granted) + len(open_votes) > count / 2
    must_win = len(granted) > count / 2
    expected = Tally.WON if must_win else Tally.PENDING if can_win else Tally.LOST
    assert tally(votes, voters) is expected


@given(st.integers(1, 9))
def test_two_majorities_meet(voters: int) -> None:
    """What the whole algorithm rests on."""
    assert 2 * majority(voters) > voters and majority(voters) <= voters


# --- progress ---


def test_a_probe_sends_one_message_until_it_is_answered() -> None:
    """The leader does not know the follower's log yet: a stream of guesses would be wasted."""
    progress = Progress(next=10)
    assert progress.may_send(64)
    progress.sent(12, bulk=False, now_ms=0)
    assert not progress.may_send(64) and progress.next == 10
    progress.acked(12, 1)
    assert progress.state is ProgressState.REPLICATE and progress.next == 13 and progress.match == 12


def test_replication_runs_ahead_up_to_the_window() -> None:
    """Waiting for each ack would cost a round trip for each message."""
    progress = Progress(next=2, match=1, state=ProgressState.REPLICATE)
    for last in (4, 6, 8):
        assert progress.may_send(3)
        progress.sent(last, bulk=False, now_ms=0)
    assert not progress.may_send(3) and progress.next == 9
    progress.acked(6, 1)
    assert list(progress.inflight) == [8] and progress.match == 6


def test_an_unreachable_follower_keeps_the_place_where_it_is_searched() -> None:
    """A new leader would otherwise send the whole log, from the first entry, to a master that was merely down."""
    progress = Progress(next=1_000)
    progress.probe(paused=True)
    assert progress.next == 1_000 and not progress.may_send(64)
    progress.acked(999, 0)
    progress.sent(1_010, bulk=False, now_ms=0)
    progress.probe()
    assert progress.next == 1_000 and not progress.inflight


@given(st.lists(st.tuples(st.sampled_from(["ack", "reject", "send", "probe"]), st.integers(0, 30), st.integers(0, 30))))
def test_progress_keeps_match_below_next_and_never_lowers_match(events: list[tuple[str, int, int]]) -> None:
    """Replies come late, twice and in any order; next at or below match would send what is acknowledged."""
    progress = Progress(next=5)
    for now_ms, (kind, index, guess) in enumerate(events):
        before = progress.match
        if kind == "ack":
            progress.acked(index, now_ms)
        elif kind == "reject":
            progress.rejected(index, guess)
        elif kind == "probe":
            progress.probe()
        elif progress.may_send(4):
            progress.sent(progress.next + guess, bulk=False, now_ms=now_ms)
        assert before <= progress.match < progress.next


# --- the log ---


def make_log(terms: list[int], *, cache_bytes_max: int = 1 << 20) -> tuple[Log, list[Entry]]:
    """A durable log with an entry of each of `terms`, and what is stored of it."""
    stored = [Entry(index, term, EntryKind.DATA, b"%d" % index) for index, term in enumerate(terms, 1)]

    def read_older(first: int, last: int, bytes_max: int) -> list[Entry]:
        return stored[first - 1 : last]

    log = Log(read_older=read_older, cache_bytes_max=cache_bytes_max)
    for entry in stored:
        log.append(entry)
    log.mark_loaded()
    return log, stored


some_terms = st.lists(st.integers(1, 5), max_size=20).map(sorted)


@given(some_terms, st.integers(0, 25), st.integers(0, 6))
def test_a_conflict_hint_is_the_last_entry_that_can_match(terms: list[int], index: int, term: int) -> None:
    """One too low costs a round trip, one too high never ends."""
    log, _ = make_log(terms)
    brute = max((i for i in range(1, min(index, len(terms)) + 1) if terms[i - 1] <= term), default=0)
    assert log.conflict_hint(index, term) == (brute, terms[brute - 1] if brute else 0)


@given(some_terms, some_terms)
def test_the_hint_search_finds_the_last_common_entry_within_a_round_a_term(
    leader: list[int], follower: list[int]
) -> None:
    """T14, for any two logs: both ends skip by term."""
    one, _ = make_log(leader)
    other, _ = make_log(follower)
    place, rounds = len(leader), 0
    while not other.matches(place, one.term_at(place) or 0):
        hint = other.conflict_hint(place, one.term_at(place) or 0)
        place, _ = one.conflict_hint(*hint)
        rounds += 1
    same = [i for i in range(1, min(len(leader), len(follower)) + 1) if leader[i - 1] == follower[i - 1]]
    assert place == max(same, default=0)
    assert rounds <= 6


@given(some_terms.filter(bool), st.integers(40, 400))
def test_a_log_reads_the_same_whether_it_is_in_memory_or_not(terms: list[int], cache_bytes_max: int) -> None:
    """A lagging follower reads beyond the cache."""
    log, stored = make_log(terms, cache_bytes_max=cache_bytes_max)
    log.shrink(log.last_index)
    got: list[Entry] = []
    while len(got) < len(stored):
        got += log.slice(len(got) + 1, len(stored), 100)
    assert got == stored
    assert [log.term_at(entry.index) for entry in stored] == terms


def test_only_what_is_durable_and_no_longer_needed_leaves_the_memory() -> None:
    """An entry that is not written yet would be lost."""
    log, _ = make_log([1, 1], cache_bytes_max=0)
    for index in (3, 4):
        log.append(Entry(index, 1, EntryKind.DATA))
    log.shrink(4)
    assert [entry.index for entry in log.slice(3, 4, 1_000)] == [3, 4]
    assert [entry.index for entry in log.take_unsaved()] == [3, 4]
    assert log.durable_index == 2
    log.mark_saved()
    assert log.durable_index == 4


def test_a_slice_holds_at_least_one_entry() -> None:
    """An entry over the limit would never be sent."""
    log = Log(read_older=lambda first, last, bytes_max: [], cache_bytes_max=1 << 20)
    log.append(Entry(1, 1, EntryKind.DATA, b"x" * 1_000))
    log.append(Entry(2, 1, EntryKind.DATA, b"x"))
    assert len(log.slice(1, 2, 10)) == 1
    assert len(log.slice(1, 2, 10_000)) == 2


def test_a_committed_entry_is_never_replaced() -> None:
    """An assertion that stays on in production: the log is worth more than the process."""
    log, _ = make_log([1, 1, 1])
    with pytest.raises(AssertionError):
        log.splice([Entry(2, 2, EntryKind.DATA)], committed=2)


# --- messages ---


@pytest.mark.parametrize(
    "message",
    [
        PreVoteRequest(3, 2, 1),
        VoteReply(3, True),
        Append(3, 1, 1, 1, (Entry(2, 2, EntryKind.NOOP), Entry(3, 3, EntryKind.DATA, b"x"))),
        AppendReply(3, 1, True, 1, 1),
        Heartbeat(3, 1),
    ],
)
def test_a_message_survives_the_wire_and_prints_on_one_line(message: Message) -> None:
    """A reader of a log of messages sees one a line."""
    assert decode_message(encode_message(message)) == message
    assert "\n" not in str(message)


def test_appends_that_no_correct_member_sends_are_refused_at_the_door() -> None:
    """A gap or a falling term would reach the log."""
    entry = Entry(2, 2, EntryKind.DATA)
    for message in (
        Append(3, 5, 1, 1, (entry,)),
        Append(3, 1, 3, 1, (entry,)),
        Append(1, 1, 1, 1, (entry,)),
        Append(3, 1, 1, 1, (entry, entry)),
    ):
        with pytest.raises(Refused):
            decode_message(encode_message(message))


@given(st.binary(max_size=60))
def test_bytes_from_anywhere_are_a_message_or_refused(data: bytes) -> None:
    """T60: the port may be reached by anything."""
    try:
        decode_message(data)
    except Refused:
        pass


def test_the_first_entry_is_the_same_on_every_member() -> None:
    """Its bytes are never compared again: logs that differ there would differ for ever."""
    members = tuple(Member(name, slot, f"h{slot}:1") for slot, name in enumerate(names[:3], 1))
    assert first_entry(members) == first_entry(members[::-1])
    assert decode_members(first_entry(members)) == members
