"""What a running member needs of what is around it, and what it says of itself."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from jobrunner.ids import Epoch, MemberId
from jobrunner.raft.messages import Member


class Machine(Protocol):
    """What is replicated. An exception that `apply` returns is raised to the proposer; one that it raises is fatal."""

    def apply(self, index: int, epoch: int, data: bytes) -> object:
        """Every committed proposal, in order, on every member; after a restart again from the newest snapshot on."""
        ...

    def snapshot(self) -> bytes:
        """All of its state after the entry applied last; the bytes share nothing with it."""
        ...

    def restore(self, data: bytes) -> None:
        """Become what `snapshot` gave, here or on another member. Raises CorruptData, LogTooNew."""
        ...

    def leading(self, epoch: int) -> None:
        """This member leads `epoch` and has applied all that was committed before it."""
        ...

    def following(self, epoch: int, leader: MemberId | None) -> None:
        """The epoch or its leader changed, and it is not this member; None: not known."""
        ...


class Transport(Protocol):
    def send(self, to: MemberId, message: bytes, bulk: bool) -> None:
        """Never blocks. What cannot be sent is dropped, and the driver told by `report_unreachable`."""
        ...


class RoleName(StrEnum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class RaftStatus:
    role: RoleName
    epoch: Epoch
    leader: MemberId | None
    commit_index: int
    applied_index: int
    last_index: int
    members: tuple[Member, ...]
