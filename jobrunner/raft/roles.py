"""Follower, pre-candidate, candidate, leader: each with only its own fields, and replaced as a whole at every change.

Times are the engine's: milliseconds of listening, not of any clock.
"""

from collections import deque
from dataclasses import dataclass, field

from jobrunner.ids import MemberId
from jobrunner.raft.progress import Progress
from jobrunner.raft.reads import Reads


@dataclass(slots=True)
class Follower:
    deadline_ms: int  # Campaign then, unless a leader is heard or a vote is given.
    leader: MemberId | None = None
    heard_ms: int = 0  # When the leader was last heard.
    lost: bool = False  # This member's own connection to the leader closed, and nothing came since.


@dataclass(slots=True)
class PreCandidate:
    """Asks whether an election would be won. Its term and vote are as they were."""

    deadline_ms: int
    votes: dict[MemberId, bool]  # By voter; the first answer counts.


@dataclass(slots=True)
class Candidate:
    deadline_ms: int
    votes: dict[MemberId, bool] = field(default_factory=dict)  # Its own is entered when it is durable.
    transfer: bool = False  # The leader asked for this election.


@dataclass(slots=True)
class Transfer:
    """Leadership is being handed over: no proposal is taken until it is, or until the deadline."""

    target: MemberId
    deadline_ms: int
    told: bool = False


@dataclass(slots=True)
class Leader:
    noop_index: int  # Its own first entry; nothing is committed by counting before it is.
    beat_ms: int  # When the next heartbeat is due.
    check_ms: int  # When a quorum must have been heard since the last check.
    progress: dict[MemberId, Progress]  # All voters but itself.
    uncommitted: deque[tuple[int, int]] = field(default_factory=deque)  # (index, size) of each proposal.
    uncommitted_bytes: int = 0
    transfer: Transfer | None = None
    reads: Reads = field(default_factory=Reads)


Role = Follower | PreCandidate | Candidate | Leader
