"""What the leader knows of each follower, and what a majority holds.

A follower is in PROBE until an append has matched: one message at a time, no guess about its log. In REPLICATE the
leader runs ahead: `next` moves when a message is sent, up to a window of unacknowledged messages. `match` only rises.
Source: etcd-io/raft, tracker/ and quorum/.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobrunner.ids import MemberId
from jobrunner.raft.snapshot import Source


class ProgressState(StrEnum):
    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"  # Its next entry is no longer in the log.


class Tally(StrEnum):
    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def majority(voters: int) -> int:
    """How many of `voters` make a quorum."""
    return voters // 2 + 1


def quorum_index(matches: Iterable[int]) -> int:
    """The highest index that a majority holds; `matches` has one number for every voter."""
    ordered = sorted(matches, reverse=True)
    return ordered[majority(len(ordered)) - 1]


def tally(votes: Mapping[MemberId, bool], voters: Collection[MemberId]) -> Tally:
    """The state of a vote; votes of others than `voters` do not count."""
    granted = sum(1 for voter in voters if votes.get(voter) is True)
    refused = sum(1 for voter in voters if votes.get(voter) is False)
    needed = majority(len(voters))
    if granted >= needed:
        return Tally.WON
    return Tally.LOST if len(voters) - refused < needed else Tally.PENDING


@dataclass(slots=True)
class Progress:
    """One follower. Invariant: match < next."""

    next: int
    match: int = 0
    state: ProgressState = ProgressState.PROBE
    snapshot: Source | None = None  # What is being sent in SNAPSHOT,
    offset: int = 0  # from here on.
    paused: bool = False  # PROBE and SNAPSHOT: a message is out; wait for its answer or for a heartbeat's.
    inflight: deque[int] = field(default_factory=deque)  # REPLICATE: last index of each message sent.
    bulk: bool = False  # Which connection the messages in flight took: two of them keep no order between them.
    progress_ms: int = 0  # When something was last acknowledged, or the window was last empty.
    checked_ms: int = -(1 << 30)  # When it was last asked by an empty append whether something was lost.
    round: int = 0  # The highest round of heartbeats that it has answered.
    active: bool = True  # Heard from since the last check of the quorum; a new leader gives everyone that grace.

    def may_send(self, inflight_max: int) -> bool:
        if self.state is not ProgressState.REPLICATE:
            return not self.paused
        return len(self.inflight) < inflight_max

    def sent(self, last_index: int, *, bulk: bool, now_ms: int) -> None:
        """A message with entries up to `last_index` left (in PROBE also one without)."""
        if not self.inflight:
            self.progress_ms = now_ms
        self.bulk = bulk
        if self.state is ProgressState.PROBE:
            self.paused = True
            return
        assert last_index >= self.next, (last_index, self)
        self.next = last_index + 1
        self.inflight.append(last_index)

    def acked(self, index: int, now_ms: int) -> None:
        """The follower's log is the leader's up to `index`. An old ack moves nothing back."""
        if index > self.match:
            self.match = index
            self.progress_ms = now_ms
        elif self.state is ProgressState.REPLICATE or index < self.match:
            return
        if self.snapshot is not None and index < self.snapshot.index:
            return
        if self.state is not ProgressState.REPLICATE:
            self.snapshot = None
            self.state = ProgressState.REPLICATE
            self.paused = False
            self.inflight.clear()
            self.next = self.match + 1
        self.next = max(self.next, self.match + 1)
        while self.inflight and self.inflight[0] <= index:
            self.inflight.popleft()

    def rejected(self, prev_index: int, next_guess: int) -> bool:
        """An append after `prev_index` did not match; try from `next_guess`. False if that is old news.

        A late rejection must not move `next` below what the follower has acknowledged since (openraft#1500).
        """
        if self.state is ProgressState.SNAPSHOT:
            return False
        if self.state is ProgressState.REPLICATE:
            if prev_index <= self.match:
                return False
            self.probe()
            return True
        if prev_index != self.next - 1:
            return False
        self.next = max(min(prev_index, next_guess), self.match + 1)
        self.paused = False
        return True

    def send_snapshot(self, snapshot: Source, now_ms: int) -> None:
        """Begin to send `snapshot` from its start."""
        self.state, self.snapshot, self.offset = ProgressState.SNAPSHOT, snapshot, 0
        self.paused, self.progress_ms = False, now_ms
        self.inflight.clear()

    def snapshot_wanted(self, index: int, offset: int, now_ms: int) -> None:
        """The follower asks for the snapshot from `offset` on. An answer about another one is old news."""
        if self.snapshot is not None and self.snapshot.index == index and offset < self.snapshot.size:
            self.offset, self.paused, self.progress_ms = offset, False, now_ms

    def probe(self, *, paused: bool = False) -> None:
        """Stop running ahead: what was in flight may be lost. A search that is under way keeps its place."""
        if self.state is ProgressState.REPLICATE:
            self.state = ProgressState.PROBE
            self.next = self.match + 1
            self.inflight.clear()
        self.paused = paused
