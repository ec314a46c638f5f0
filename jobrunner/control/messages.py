"""Messages between master, worker agent and client, and the values in them.

One file, though long: it is one vocabulary. Requests are idempotent by the ids they carry (job, token, blob hash), so
each may be sent again after a lost reply.
Whoever answers raises an error of errors.py, which the caller sees as if raised here.
"""

from enum import StrEnum

import msgspec

from jobrunner.control.locks import LockMessage
from jobrunner.control.values import Message, Value
from jobrunner.ids import AttemptId, Epoch, Hash, JobId, SessionId, StageName, TaskId, Token


class TaskKind(StrEnum):
    """What an attempt does. All but map and reduce are steps of the commit."""

    SETUP = "setup"
    MAP = "map"
    REDUCE = "reduce"
    PUBLISH = "publish"
    RETRACT = "retract"
    CLEANUP = "cleanup"


class EndCause(StrEnum):
    """Why an attempt ended. `CHARGED` lists those that count against the task."""

    DONE = "done"
    EXCEPTION = "exception"  # User code raised (SystemExit too).
    FATAL = "fatal"  # User code raised Fatal: the job fails at once.
    SIGNAL = "signal"  # The process was killed by a signal (a segfault, say).
    EXITED = "exited"  # The process ended before the attempt did, with any status.
    MEMORY = "memory"
    TIMEOUT = "timeout"  # No progress for attempt.timeout_ms.
    STORAGE = "storage"  # The worker could not read or write (full disk, no permission).
    INPUT_CHANGED = "input_changed"  # An input file is not what was planned: the job fails at once.
    LOST_WORKER = "lost_worker"
    LOST_INPUT = "lost_input"  # Map output it needed is gone.
    PREEMPTED = "preempted"
    SUPERSEDED = "superseded"  # Another attempt of the task won.
    OPERATOR = "operator"  # The job was killed or failed meanwhile.


CHARGED = frozenset(
    {EndCause.EXCEPTION, EndCause.FATAL, EndCause.SIGNAL, EndCause.EXITED, EndCause.MEMORY, EndCause.TIMEOUT,
     EndCause.STORAGE, EndCause.INPUT_CHANGED}
)  # fmt: skip
HOPELESS = frozenset({EndCause.FATAL, EndCause.INPUT_CHANGED})  # One is enough to fail the job.


class OutputFile(Value, frozen=True):
    """One closed, synced file of an attempt. `file` is its name in the attempt's directory and in the output."""

    output: str  # Name of the output; "main" until there are side outputs.
    file: str
    records: int
    bytes: int
    checksum: str  # "algorithm:hex", e.g. "crc32:0a1b2c3d".


class HostInfo(Value, frozen=True):
    """Says whether two processes can see each other's pids: equal boot_id and pid_namespace."""

    hostname: str
    boot_id: str
    pid_namespace: str


class InputPlace(Value, frozen=True):
    """Where in the input an attempt failed."""

    url: str
    offset: int  # Bytes from the start of the file to the failing record.


# --- agent to master -------------------------------------------------------------------------------------------------


class RegisterWorker(Message, frozen=True):
    """A worker's process asks for a session. Ends the session that another process of the same directory had."""

    directory: str
    process: str  # A uuid drawn at process start: the same process asking again gets the same session.
    name: int  # The N of worker-N.
    address: str  # host:port of the agent's server.
    pid: int
    host: HostInfo
    slots: int


class Registered(Message, frozen=True):
    session: SessionId
    epoch: Epoch
    ttl_ms: int
    beat_ms: int


class Held(Value, frozen=True):
    """An attempt the agent has: waiting for a slot, or running."""

    token: Token
    running: bool  # False: it waits for a slot, or has ended and its report is not yet acknowledged.
    ready: bool = False  # A reduce that has read all its input: lost map output no longer matters to it.


class Beat(Message, frozen=True):
    """The session lives. Every Instruct of `epoch` up to `sequence` was received, or is void; `held` is all it has."""

    session: SessionId
    epoch: Epoch
    sequence: int
    held: list[Held]


class BeatAck(Message, frozen=True):
    epoch: Epoch


class MapDone(Value, tag=True, frozen=True):
    """A map output block file is closed under its name on this worker's disk (not synced: it can be made again)."""

    attempt: AttemptId
    token: Token
    digest: int  # Order-free 64-bit sum over rows of hash(key, value), after combining.
    rows: int
    bytes: int
    counters: dict[str, int]


class Sealable(Value, tag=True, frozen=True):
    """Final output of a partition: closed, synced and never touched again. Asks to be the winner."""

    attempt: AttemptId
    token: Token
    files: list[OutputFile]
    consumed: int  # Sum modulo 2^64 of the digests of all map outputs it read; 0 for a map-only job.
    counters: dict[str, int]


class StepDone(Value, tag=True, frozen=True):
    """A step of the commit is done. `outcome`: done, refused (setup, publish), published, withdrawn (retract)."""

    attempt: AttemptId
    token: Token
    outcome: str
    detail: str = ""


class Failed(Value, tag=True, frozen=True):
    """An attempt ended without a result."""

    attempt: AttemptId
    token: Token
    cause: EndCause
    message: str
    traceback: str = ""
    tail: str = ""  # Last bytes of its stdout and stderr, attempt.tail_bytes_max.
    place: InputPlace | None = None


Ended = MapDone | Sealable | StepDone | Failed


class Report(Message, frozen=True):
    """Attempts that ended. Sent until answered; one verdict an item, in order."""

    session: SessionId
    items: list[Ended]


class Verdict(StrEnum):
    ACCEPTED = "accepted"  # Recorded; keep the block file until told to forget the job.
    WON = "won"  # This attempt's output is the partition's, for ever.
    LOST = "lost"  # Another attempt's is: delete your files.
    GONE = "gone"  # The job has ended, or knows no such attempt: delete your files.
    REFUSED = "refused"  # This token already sealed something else: a bug. Touch nothing.


class Reported(Message, frozen=True):
    verdicts: list[Verdict]


class BlockOffer(Value, frozen=True):
    """A block file found on disk at start."""

    attempt: AttemptId
    token: Token
    digest: int
    rows: int
    bytes: int
    counters: dict[str, int] = msgspec.field(default_factory=dict)


class OfferBlocks(Message, frozen=True):
    session: SessionId
    blocks: list[BlockOffer]


class Offered(Message, frozen=True):
    """`keep[i]`: the i-th block counts (or its job still runs); delete the others."""

    keep: list[bool]


class LossKind(StrEnum):
    MISSING = "missing"  # The worker answered: not there.
    CORRUPT = "corrupt"  # Checksum or length is wrong.
    UNREACHABLE = "unreachable"  # No answer in time, after retries.


class ReportLostOutput(Message, frozen=True):
    """A reducer could not read the output of `lost` (map attempts). Its own attempt ends as lost input."""

    session: SessionId
    reader: AttemptId
    lost: list[AttemptId]
    kind: LossKind


class Ack(Message, frozen=True):
    pass


class GetMapOutputs(Message, frozen=True):
    """Where the map outputs of a stage are. Raises Unavailable while `version` is not reached or maps are missing."""

    job: JobId
    stage: StageName
    version: int
    offset: int = 0  # Partition of the first row wanted; pages of one answer have one version.


class BlockOwner(Value, frozen=True):
    session: SessionId
    directory: str
    address: str


class MapOutputs(Message, frozen=True):
    """Columns, one row a map, by partition; `owner` is an index into `owners`."""

    version: int
    owners: list[BlockOwner]
    owner: list[int]
    attempt: list[int]
    token: list[int]
    digest: list[int]
    bytes: list[int]
    more: bool = False  # The frame was full: rows follow.


class GetWinners(Message, frozen=True):
    """What to publish. Raises Unavailable unless the job's commit is decided."""

    job: JobId
    offset: int = 0  # Winners to leave out: those of earlier pages.


class Winner(Value, frozen=True):
    partition: int
    attempt: int
    token: Token
    files: list[OutputFile]


class Winners(Message, frozen=True):
    """Winners by partition, and the job's counters: a pure function of the log."""

    winners: list[Winner]
    counters: dict[str, int]
    more: bool = False  # The frame was full: winners follow.


# --- master to agent and client (pushed) -----------------------------------------------------------------------------


class Start(Value, tag=True, frozen=True):
    """Run this attempt. `plan` names the JobPlan's blob."""

    attempt: AttemptId
    token: Token
    kind: TaskKind
    plan: Hash
    map_stage: StageName = StageName("")  # For a reduce: whose output it reads,
    version: int = 0  # and the version of GetMapOutputs it must see at least.


class Stop(Value, tag=True, frozen=True):
    """Kill or withdraw this attempt; report nothing for it."""

    token: Token
    cause: EndCause


class Forget(Value, tag=True, frozen=True):
    """The job needs nothing more on this worker: kill its attempts and processes, delete its blocks."""

    job: JobId


Instruction = Start | Stop | Forget


class Instruct(Message, frozen=True):
    """Fenced: refuse a lower epoch, another session, a sequence not above the last, a token not above the last."""

    epoch: Epoch
    session: SessionId
    sequence: int
    items: list[Instruction]
    void: int = 0  # Earlier ones up to this, if they did not arrive, are not to be waited for.


class LeaderIs(Message, frozen=True):
    """Pushed at once by any master that learns of a new leader, and by the leader every beacon_ms."""

    epoch: Epoch
    address: str  # "" while there is none.


# --- client to master ------------------------------------------------------------------------------------------------


class HaveBlobs(Message, frozen=True):
    hashes: list[Hash]


class BlobsHeld(Message, frozen=True):
    missing: list[Hash]


class PutBlob(Message, frozen=True):
    """One piece of a blob, in order from offset 0. A piece that is already there is fine."""

    hash: Hash
    offset: int
    total: int
    data: bytes


class StageSpec(Value, frozen=True):
    """A stage as the masters see it. `final`: its attempts seal output; otherwise they leave blocks."""

    name: StageName
    kind: TaskKind  # MAP or REDUCE.
    tasks: int
    final: bool
    reads: StageName = StageName("")  # The map stage a reduce reads.


class SubmitJob(Message, frozen=True):
    """Run a job whose blobs are there. The same job again is answered as the first time."""

    job: JobId
    name: str
    output: str  # Canonical URL: absolute, links resolved; one live job may have it.
    plan: Hash
    code: Hash
    stages: list[StageSpec]
    faults_max: int
    submitted_ms: int  # Client's unix milliseconds; for display only.
    user: str = ""
    attempts_kept_max: int = 1000


class Submitted(Message, frozen=True):
    job: JobId
    existing: bool


class KillJob(Message, frozen=True):
    job: JobId
    reason: str


class JobState(StrEnum):
    """As `status` shows it."""

    QUEUED = "queued"
    RUNNING = "running"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    KILLED = "killed"


class StageStatus(Value, frozen=True):
    name: StageName
    kind: TaskKind
    tasks: int
    done: int
    running: int
    attempts: dict[str, int]  # started, failed, lost, superseded, and each end cause seen.


class JobError(Value, frozen=True):
    kind: str
    message: str
    task: str | None = None
    attempt: str | None = None
    traceback: str | None = None
    input: InputPlace | None = None


class JobStatus(Message, frozen=True):
    """`status JOB`; the CLI turns times into RFC 3339. `tidy`: nothing of the job is left beside the output."""

    id: JobId
    name: str
    state: JobState
    waiting_for: str | None
    output: str
    submitted_ms: int
    finished_ms: int | None
    stages: list[StageStatus]
    counters: dict[str, int]
    error: JobError | None
    tidy: bool
    version: int  # Changes when anything above does.


class GetJob(Message, frozen=True):
    """`stale`, here and below: whichever master is asked answers from what it has, which may be old."""

    job: JobId
    stale: bool = False


class WaitJob(Message, frozen=True):
    """Answered when the job has ended (`tidy`: and is tidy), or its version is above `version`, or after timeout_ms."""

    job: JobId
    version: int
    timeout_ms: int
    tidy: bool = False


class ListJobs(Message, frozen=True):
    stale: bool = False
    after: JobId | None = None  # Only jobs submitted before this one.


class JobList(Message, frozen=True):
    jobs: list[JobStatus]  # Newest first.
    more: bool = False


class AttemptInfo(Value, frozen=True):
    """An attempt that runs or that ended otherwise than well, or the winner; `worker` serves its logs."""

    attempt: AttemptId
    token: Token
    kind: TaskKind
    state: str  # "running", or an EndCause.
    worker: str  # Address; may be gone.
    message: str
    traceback: str
    tail: str
    place: InputPlace | None = None


class GetAttempts(Message, frozen=True):
    job: JobId
    task: TaskId | None = None
    failed_only: bool = False
    after: Token = Token(0)  # Only attempts of higher tokens.


class AttemptList(Message, frozen=True):
    attempts: list[AttemptInfo]  # In order of token.
    more: bool = False


class MasterInfo(Value, frozen=True):
    id: int
    member: str
    address: str
    pid: int | None
    role: str  # leader, follower, candidate, learner, down
    epoch: int
    commit_index: int
    applied_index: int


class WorkerInfo(Value, frozen=True):
    id: int
    address: str
    pid: int
    host: str
    slots: int
    state: str  # live, suspect, lost, draining
    running: list[str]


class GetCluster(Message, frozen=True):
    stale: bool = False


class ClusterInfo(Message, frozen=True):
    cluster_id: str
    leader: int | None
    epoch: int
    masters: list[MasterInfo]
    workers: list[WorkerInfo]
    jobs: dict[str, int]


class GetMember(Message, frozen=True):
    """What one master says of itself; answered by any."""


class MemberInfo(Message, frozen=True):
    info: MasterInfo


class TransferLeadership(Message, frozen=True):
    """Make the master of this slot lead; answered when it does, at once if it does already."""

    master: int


class Transferred(Message, frozen=True):
    leader: int  # Slot of the master that leads now.


AnyMessage = (
    RegisterWorker | Registered | Beat | BeatAck | Report | Reported | OfferBlocks | Offered | ReportLostOutput | Ack
    | GetMapOutputs | MapOutputs | GetWinners | Winners | Instruct | LeaderIs | HaveBlobs | BlobsHeld | PutBlob
    | SubmitJob | Submitted | KillJob | JobStatus | GetJob | WaitJob | ListJobs | JobList | GetAttempts | AttemptList
    | TransferLeadership | Transferred | GetCluster | ClusterInfo | GetMember | MemberInfo | LockMessage
)  # fmt: skip

MessageDecoder = msgspec.msgpack.Decoder[AnyMessage]


def message_decoder() -> "MessageDecoder":
    """A decoder for every message above; it refuses anything else."""
    return msgspec.msgpack.Decoder(AnyMessage)
