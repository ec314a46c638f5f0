"""What the engine hands to its shell: messages to send now, one record to save, messages to send after that,
and reads that may be served."""

from dataclasses import dataclass

from jobrunner.ids import MemberId
from jobrunner.raft.messages import Entry, Message
from jobrunner.raft.reads import ReadReady
from jobrunner.raft.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ProposalId:
    """The proposal is carried out if the entry committed at `index` is of `term`; otherwise it never will be."""

    term: int
    index: int


@dataclass(frozen=True, slots=True)
class Send:
    to: MemberId
    message: Message
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class HardState:
    """What a member must remember besides its entries. The vote is of this term."""

    term: int
    vote: MemberId | None
    commit: int  # Only saves time after a restart.


@dataclass(frozen=True, slots=True)
class Save:
    """One record: both parts become durable together. Entries replace all that is stored at and after the first."""

    state: HardState
    entries: tuple[Entry, ...]
    install: Snapshot | None = None  # It replaces the whole log, and then the machine's state; `entries` is empty.


@dataclass(frozen=True, slots=True)
class Ready:
    send_now: tuple[Send, ...] = ()
    save: Save | None = None
    after_persist: tuple[Send, ...] = ()
    reads: tuple[ReadReady, ...] = ()
