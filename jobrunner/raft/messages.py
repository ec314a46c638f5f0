"""What members say to each other, and what the log holds. One frozen class a message; each prints on one line.

On the wire a message is a msgpack array whose first element is its tag, so that new messages can be added; unknown
tags, missing and additional fields are refused. Who sent it is the connection's to know and stands in no message.
`term` is always the sender's, except in a pre-vote, which asks about the next term without entering it.
"""

from enum import IntEnum
from typing import Annotated

import msgspec

from jobrunner.errors import CorruptData, Refused
from jobrunner.ids import MemberId

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]

ENTRY_OVERHEAD_BYTES = 32  # Counted per entry besides its data, so that empty entries fill a limit too.


class EntryKind(IntEnum):
    CONFIG = 1  # The members, as `Members`; the first entry of every log.
    NOOP = 2  # A new leader's first entry: committing it commits all before it.
    DATA = 3  # A proposal.


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    index: Count
    term: Count
    kind: EntryKind
    data: bytes = b""

    @property
    def size(self) -> int:
        return len(self.data) + ENTRY_OVERHEAD_BYTES

    def __str__(self) -> str:
        shown = ""
        if self.kind == EntryKind.DATA:
            shown = " " + (repr(self.data)[1:] if len(self.data) <= 24 else f"{len(self.data)} bytes")
        return f"{self.term}/{self.index} {self.kind.name}{shown}"


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A voting member: its directory's uuid, its slot (a small number for people), where it listens."""

    id: MemberId
    slot: Count
    address: str


class Members(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The data of a CONFIG entry."""

    voters: tuple[Member, ...]


class PreVoteRequest(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """Would you vote for me in `term`, which I have not entered? Changes nothing at either end."""

    term: Count
    last_index: Count
    last_term: Count

    def __str__(self) -> str:
        return f"PreVoteRequest term={self.term} last={self.last_term}/{self.last_index}"


class PreVoteReply(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """`term` is the asked one if granted, else the voter's own."""

    term: Count
    granted: bool

    def __str__(self) -> str:
        return f"PreVoteReply term={self.term} {'granted' if self.granted else 'refused'}"


class VoteRequest(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """`transfer`: the leader itself asked for this election, so loyalty to it is no reason to refuse."""

    term: Count
    last_index: Count
    last_term: Count
    transfer: bool = False

    def __str__(self) -> str:
        shown = " transfer" if self.transfer else ""
        return f"VoteRequest term={self.term} last={self.last_term}/{self.last_index}{shown}"


class VoteReply(msgspec.Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    term: Count
    granted: bool

    def __str__(self) -> str:
        return f"VoteReply term={self.term} {'granted' if self.granted else 'refused'}"


class Append(msgspec.Struct, frozen=True, array_like=True, tag=5, forbid_unknown_fields=True):
    """Entries that follow (prev_index, prev_term) in the leader's log. Without entries it is a probe."""

    term: Count
    prev_index: Count
    prev_term: Count
    commit: Count
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        entries = ", ".join(str(entry) for entry in self.entries)
        return f"Append term={self.term} prev={self.prev_term}/{self.prev_index} commit={self.commit} [{entries}]"


class AppendReply(msgspec.Struct, frozen=True, array_like=True, tag=6, forbid_unknown_fields=True):
    """Accepted: the logs are the same up to `index`, durably. Rejected: `index` is the prev_index that did not match,
    and the follower's entries after `hint_index` (of `hint_term`) cannot match either."""

    term: Count
    index: Count
    rejected: bool = False
    hint_index: Count = 0
    hint_term: Count = 0

    def __str__(self) -> str:
        if self.rejected:
            return f"AppendReply term={self.term} rejected={self.index} hint={self.hint_term}/{self.hint_index}"
        return f"AppendReply term={self.term} match={self.index}"


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=7, forbid_unknown_fields=True):
    """`commit` never exceeds what this follower has acknowledged: it may hold other entries beyond.

    `round` numbers the leader's rounds of heartbeats for reads; the answer repeats it.
    """

    term: Count
    commit: Count
    round: Count = 0

    def __str__(self) -> str:
        return f"Heartbeat term={self.term} commit={self.commit}" + (f" round={self.round}" if self.round else "")


class HeartbeatReply(msgspec.Struct, frozen=True, array_like=True, tag=8, forbid_unknown_fields=True):
    """Also the answer to any message of an older leader: the higher term makes it step down."""

    term: Count
    round: Count = 0

    def __str__(self) -> str:
        return f"HeartbeatReply term={self.term}" + (f" round={self.round}" if self.round else "")


class TimeoutNow(msgspec.Struct, frozen=True, array_like=True, tag=9, forbid_unknown_fields=True):
    """The leader of `term` hands over: ask for votes at once. It has seen that this member's log is complete."""

    term: Count

    def __str__(self) -> str:
        return f"TimeoutNow term={self.term}"


class SnapshotPiece(msgspec.Struct, frozen=True, array_like=True, tag=10, forbid_unknown_fields=True):
    """Bytes of the leader's snapshot from `offset` on, for a follower whose next entry is no longer in the log."""

    term: Count
    index: Count
    snapshot_term: Count
    offset: Count
    size: Count  # Of all of it.
    crc: Count  # Of `data`.
    data: bytes

    def __str__(self) -> str:
        end = self.offset + len(self.data)
        return f"SnapshotPiece term={self.term} {self.snapshot_term}/{self.index} {self.offset}-{end} of {self.size}"


class SnapshotReply(msgspec.Struct, frozen=True, array_like=True, tag=11, forbid_unknown_fields=True):
    """Send from `offset` on. The whole is acknowledged by an AppendReply, when it is durable."""

    term: Count
    index: Count
    offset: Count

    def __str__(self) -> str:
        return f"SnapshotReply term={self.term} index={self.index} from={self.offset}"


Message = (
    PreVoteRequest | PreVoteReply | VoteRequest | VoteReply | Append | AppendReply | Heartbeat | HeartbeatReply
    | TimeoutNow | SnapshotPiece | SnapshotReply
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_members_decoder = msgspec.msgpack.Decoder(Members)


def encode_message(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """The message in `data`. Raises Refused if it is none, or one that no correct member sends."""
    try:
        message = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise Refused(f"not a Raft message: {error}") from None
    if isinstance(message, Append):
        index, term = message.prev_index, message.prev_term
        for entry in message.entries:
            if entry.index != index + 1 or not term <= entry.term <= message.term:
                raise Refused(f"not a Raft message: entry {entry} cannot follow {term}/{index}")
            index, term = entry.index, entry.term
    return message


def first_entry(members: tuple[Member, ...]) -> Entry:
    """The first entry of the log: the same bytes on every member, whatever the order of `members`."""
    voters = tuple(sorted(members, key=lambda member: (member.slot, member.id)))
    return Entry(1, 1, EntryKind.CONFIG, _encoder.encode(Members(voters)))


def decode_members(entry: Entry) -> tuple[Member, ...]:
    """The voters that a CONFIG entry names. Raises CorruptData if it is none."""
    try:
        if entry.kind == EntryKind.CONFIG:
            return _members_decoder.decode(entry.data).voters
    except msgspec.MsgspecError as error:
        raise CorruptData(f"the members in the log cannot be read: {error}") from None
    raise CorruptData(f"the log does not begin with its members but with {entry}")
