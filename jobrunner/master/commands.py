"""All that may enter the log. Each entry is one command in an envelope that carries its level and a time for display.

Commands are imperative and may be refused when applied; a refusal is the same on every master. Times in them are the
proposing leader's wall clock: people read them, nothing is decided by them.
"""

import msgspec

from jobrunner.control.locks import AnyOperation
from jobrunner.control.messages import BlockOffer, EndCause, Ended, HostInfo, LossKind, SubmitJob
from jobrunner.errors import LogTooNew
from jobrunner.ids import AttemptId, ClientId, Epoch, Hash, JobId, SessionId, StageName, Token
from jobrunner.locks.limits import LockLimits

LEVEL = 1  # The highest level this version writes and understands.


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, tag=True):
    """Its tag is its class name, so a class may be renamed only with a new level."""


class RegisterSession(Command, frozen=True):
    """Start a session for a worker's process; ends the one that another process of the directory had."""

    directory: str
    process: str
    name: int
    address: str
    pid: int
    host: HostInfo
    slots: int


class EndSession(Command, frozen=True):
    """The leader's verdict: the worker is lost (or has left)."""

    session: SessionId
    reason: str


class PutPiece(Command, frozen=True):
    hash: Hash
    offset: int
    total: int
    data: bytes


class DropBlobs(Command, frozen=True):
    """Forget blobs that no job names."""

    hashes: list[Hash]


class Submit(Command, frozen=True):
    job: SubmitJob


class Kill(Command, frozen=True):
    job: JobId
    reason: str


class Placement(msgspec.Struct, frozen=True, array_like=True):
    job: JobId
    stage: StageName
    partition: int
    session: SessionId


class Assign(Command, frozen=True):
    """Start attempts. Placements whose task is not open, or whose session is not live, are passed over."""

    placements: list[Placement]


class EndAttempts(Command, frozen=True):
    """What a worker reports. Result: a verdict an item."""

    session: SessionId
    items: list[Ended]


class DropAttempts(Command, frozen=True):
    """The leader takes attempts back; nothing is charged."""

    tokens: list[Token]
    cause: EndCause
    reason: str


class Offer(Command, frozen=True):
    """Block files that a worker found on its disk. Result: a bool an item, whether to keep it."""

    session: SessionId
    blocks: list[BlockOffer]


class LoseOutput(Command, frozen=True):
    """Map output that could not be read; `reader` ends as lost input."""

    reader: AttemptId
    lost: list[AttemptId]
    kind: LossKind


class CommitJob(Command, frozen=True):
    """All partitions are sealed: publish. From here abort is refused."""

    job: JobId


class ForgetJobs(Command, frozen=True):
    """Drop ended, tidy jobs beyond the number that is kept."""

    jobs: list[JobId]


class ForgetWorkers(Command, frozen=True):
    """Drop lost workers from what `cluster status` shows."""

    directories: list[str]


class BeginClient(Command, frozen=True):
    """Start a client's session, unless `key` has one. Result: its id."""

    key: str
    owner: str
    ttl_ms: int


class RunOperation(Command, frozen=True):
    """Carry out once what a client asks in its session. Result: the outcome, or that of the first time."""

    client: ClientId
    sequence: int
    lowest: int
    operation: AnyOperation


class EndClient(Command, frozen=True):
    """The leader's verdict (`failed`: locks stay closed for their delay), or the client's wish."""

    client: ClientId
    failed: bool
    reason: str


class EndDelay(Command, frozen=True):
    """The time for which a lock stayed closed after a failure is over."""

    token: Token


class TakeLock(Command, frozen=True):
    """An operator takes a lock from its holder."""

    name: str
    token: Token
    reason: str


class SetLockLimits(Command, frozen=True):
    """The leader's settings say so from now on."""

    limits: LockLimits


class RaiseLevel(Command, frozen=True):
    """Every member understands `level`: entries may be written at it."""

    level: int


AnyCommand = (
    RegisterSession
    | EndSession
    | PutPiece
    | DropBlobs
    | Submit
    | Kill
    | Assign
    | EndAttempts
    | DropAttempts
    | Offer
    | LoseOutput
    | CommitJob
    | ForgetJobs
    | ForgetWorkers
    | BeginClient
    | RunOperation
    | EndClient
    | EndDelay
    | TakeLock
    | SetLockLimits
    | RaiseLevel
)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """`epoch` fences: a command of a leader that has been replaced is refused when it is applied."""

    level: int
    at_ms: int  # Leader's unix milliseconds; for display only.
    epoch: Epoch
    command: AnyCommand


class _Head(msgspec.Struct, array_like=True):
    level: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)
_head_decoder = msgspec.msgpack.Decoder(_Head)


def encode_entry(entry: Entry) -> bytes:
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """Raises LogTooNew if it was written at a level above ours, before looking further."""
    level = _head_decoder.decode(data).level
    if level > LEVEL:
        raise LogTooNew(f"the log holds an entry of level {level}; this version understands up to {LEVEL}: upgrade it")
    return _decoder.decode(data)
