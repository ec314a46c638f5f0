"""MasterState <-> bytes, versioned: what takes the place of the log up to an index.

    bytes   magic 8 "JRSTATE\\0", version u16, level u16 (little-endian), then msgpack of `_State`

The same state has the same bytes on every master, whichever way it came about: applied entry by entry, or restored
from a snapshot and applied on. Order is state where `apply` walks it, so dicts are written in their order. Columns are
little-endian bytes. Ended, tidy jobs do not change any more; their bytes are kept from one snapshot to the next.

A higher version or level was written by a newer program: LogTooNew, before anything of it is read. A field is added
with a default at the end of its struct; anything else needs a new version and code that reads the old one.
"""

import struct
import sys
from array import array
from collections import deque
from typing import Any

import msgspec

from jobrunner.commit.steps import State
from jobrunner.control.locks import Forced, KeyChange, KeyValue
from jobrunner.control.messages import AttemptInfo, JobError, StageSpec, SubmitJob
from jobrunner.errors import CorruptData, LogTooNew
from jobrunner.ids import ClientId, Epoch, Hash, JobId, SessionId, StageName, Token
from jobrunner.locks.clients import ClientSession
from jobrunner.locks.limits import LockLimits
from jobrunner.locks.named import NamedLock, NamedLocks, Place, Ticket
from jobrunner.locks.service import LockService
from jobrunner.locks.sessions import Session
from jobrunner.locks.table import Claim, LockTable
from jobrunner.master.commands import LEVEL
from jobrunner.master.jobs import Job
from jobrunner.master.state import MasterState
from jobrunner.master.tasks import Running, StageTable

VERSION = 1
_MAGIC = b"JRSTATE\0"
_HEAD = struct.Struct("<8sHH")
_COLUMNS = ("last_attempt", "last_token", "done_attempt", "done_token", "owner", "digest", "bytes")
_TABLE_FIELDS = ("earlier", "reopened", "faults", "corruptions", "ends", "started", "done", "digest_sum", "recorded",
                 "version")  # fmt: skip


class _Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class _Table(_Part, frozen=True):
    spec: StageSpec
    state: bytes
    columns: list[bytes]
    running: list[Running]
    earlier: dict[int, dict[int, Token]]
    reopened: list[int]
    faults: dict[int, int]
    corruptions: dict[int, int]
    ends: dict[str, int]
    started: int
    done: int
    digest_sum: int
    recorded: int
    version: int


class _Job(_Part, frozen=True):
    submit: SubmitJob
    state: State
    stages: list[_Table]
    steps: list[_Table]
    counters: dict[str, int]
    error: JobError | None
    finished_ms: int | None
    left_behind: str
    records: list[AttemptInfo]
    touched: list[SessionId]
    version: int


class _Lock(_Part, frozen=True):
    name: str
    holders: list[tuple[Ticket, Place]]
    waiters: list[tuple[Ticket, Place]]
    delays: dict[Token, Place]
    job: JobId | None


class _Service(_Part, frozen=True):
    limits: LockLimits
    clients: list[ClientSession]
    by_key: dict[str, ClientId]
    clients_version: int
    locks: list[_Lock]
    of_client: list[tuple[ClientId, list[tuple[Ticket, str]]]]
    delayed: dict[Token, str]
    forced: list[Forced]
    items: list[KeyValue]
    revision: int
    kv_bytes: int
    keys_of_client: dict[ClientId, list[str]]
    history: list[KeyChange]
    history_bytes: int
    compacted: int


class _State(_Part, frozen=True):
    level: int
    epoch: Epoch
    jobs: list[msgspec.Raw]
    active: list[JobId]
    sessions: list[Session]
    by_directory: dict[str, SessionId]
    lost: dict[str, Session]
    last_token: int
    winners: list[tuple[JobId, StageName, dict[int, Claim]]]
    paths: dict[str, JobId]
    service: _Service
    blobs: dict[Hash, bytes]
    partial: dict[Hash, bytes]
    attempts: list[tuple[SessionId, list[int]]]  # Tokens: the attempts themselves are their jobs'.
    ended_counts: dict[str, int]


_encoder = msgspec.msgpack.Encoder()
_state_decoder = msgspec.msgpack.Decoder(_State)
_job_decoder = msgspec.msgpack.Decoder(_Job)


class SnapshotEncoder:
    """Keeps the bytes of jobs that do not change any more. One a master."""

    def __init__(self) -> None:
        self._tidy: dict[JobId, bytes] = {}

    def encode(self, state: MasterState) -> bytes:
        """All of `state`, as it is now: the bytes share nothing with it."""
        self._tidy = {id: data for id, data in self._tidy.items() if id in state.jobs}
        head = _HEAD.pack(_MAGIC, VERSION, state.level)
        return head + _encoder.encode(self._state(state))

    def _state(self, state: MasterState) -> _State:
        sessions, locks = state.sessions, state.locks
        return _State(
            level=state.level, epoch=state.epoch, jobs=[self._job(id, job) for id, job in state.jobs.items()],
            active=list(state.active), sessions=list(sessions.live.values()), by_directory=sessions.by_directory,
            lost=sessions.lost, last_token=locks.last_token,
            winners=[(job, stage, claims) for (job, stage), claims in locks.winners.items()], paths=locks.paths,
            service=_service(state.service), blobs=state.blobs.whole(), partial=state.blobs.partial(),
            attempts=[(session, list(tokens)) for session, tokens in state.attempts.items()],
            ended_counts=state.ended_counts,
        )  # fmt: skip

    def _job(self, id: JobId, job: Job) -> msgspec.Raw:
        data = self._tidy.get(id)
        if data is None:
            data = _encoder.encode(_job(job))
            if job.tidy and id:
                self._tidy[id] = data
        return msgspec.Raw(data)


def encode_state(state: MasterState) -> bytes:
    return SnapshotEncoder().encode(state)


def decode_state(data: bytes, place: str = "the snapshot") -> MasterState:
    """The state in `data`. Raises LogTooNew, CorruptData; `place` names it in errors."""
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise CorruptData(f"{place} is no snapshot of masters' state")
    _, version, level = _HEAD.unpack_from(data)
    if version > VERSION or level > LEVEL:
        raise LogTooNew(f"{place} is of version {version}, level {level}; this program knows {VERSION} and {LEVEL}")
    try:
        return _restore(_state_decoder.decode(memoryview(data)[_HEAD.size :]))
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise CorruptData(f"{place} cannot be read: {error}") from error


# --- out -------------------------------------------------------------------------------------------------------------


def _job(job: Job) -> _Job:
    return _Job(
        job.submit, job.state, [_table(table) for table in job.stages.values()],
        [_table(table) for table in job.steps.values()], job.counters, job.error, job.finished_ms, job.left_behind,
        job.records, list(job.touched), job.version,
    )  # fmt: skip


def _table(table: StageTable) -> _Table:
    columns = [_column_bytes(getattr(table, name)) for name in _COLUMNS]
    rest: dict[str, Any] = {name: getattr(table, name) for name in _TABLE_FIELDS}
    return _Table(
        spec=table.spec, state=bytes(table.state), columns=columns, running=list(table.running.values()), **rest
    )


def _column_bytes(column: "array[int]") -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


def _service(service: LockService) -> _Service:
    clients, names, keys = service.clients, service.names, service.keys
    locks = [
        _Lock(name, list(lock.holders.items()), list(lock.waiters.items()), lock.delays, lock.job)
        for name, lock in names.locks.items()
    ]
    return _Service(
        limits=service.limits, clients=list(clients.live.values()), by_key=clients.by_key,
        clients_version=clients.version, locks=locks,
        of_client=[(client, list(places.items())) for client, places in names.of_client.items()],
        delayed=names.delayed, forced=names.forced, items=list(keys.items.values()), revision=keys.revision,
        kv_bytes=keys.bytes, keys_of_client={client: list(names) for client, names in keys.of_client.items()},
        history=list(keys.history), history_bytes=keys.history_bytes, compacted=keys.compacted,
    )  # fmt: skip


# --- in --------------------------------------------------------------------------------------------------------------


def _restore(found: _State) -> MasterState:
    state = MasterState()
    state.level, state.epoch = found.level, found.epoch
    for raw in found.jobs:
        job = _restore_job(_job_decoder.decode(raw))
        state.jobs[job.submit.job] = job
    state.active = {id: state.jobs[id] for id in found.active}
    state.sessions.live = {session.id: session for session in found.sessions}
    state.sessions.by_directory, state.sessions.lost = found.by_directory, found.lost
    _restore_locks(state.locks, found)
    _restore_service(state.service, found.service)
    state.blobs.restore(found.blobs, found.partial)
    running = {
        one.token: one for job in state.active.values() for table in job.tables() for one in table.running.values()
    }
    state.attempts = {session: {token: running[Token(token)] for token in tokens} for session, tokens in found.attempts}
    state.ended_counts = found.ended_counts
    return state


def _restore_job(found: _Job) -> Job:
    return Job(
        submit=found.submit, state=found.state, stages={one.spec.name: _restore_table(one) for one in found.stages},
        steps={one.spec.name: _restore_table(one) for one in found.steps}, counters=found.counters, error=found.error,
        finished_ms=found.finished_ms, left_behind=found.left_behind, records=found.records,
        touched=dict.fromkeys(found.touched), version=found.version,
    )  # fmt: skip


def _restore_table(found: _Table) -> StageTable:
    rest: dict[str, Any] = {name: getattr(found, name) for name in _TABLE_FIELDS}
    running = {one.attempt.partition: one for one in found.running}
    table = StageTable(found.spec, state=bytearray(found.state), running=running, **rest)
    for name, data in zip(_COLUMNS, found.columns, strict=True):
        column: array[int] = getattr(table, name)
        column.frombytes(data)
        if sys.byteorder == "big":
            column.byteswap()
        if len(column) != len(found.state):
            raise ValueError(f"column {name} of {found.spec.name} has {len(column)} rows, not {len(found.state)}")
    return table


def _restore_locks(locks: LockTable, found: _State) -> None:
    locks.last_token = found.last_token
    locks.winners = {(job, stage): claims for job, stage, claims in found.winners}
    locks.paths = found.paths


def _restore_service(service: LockService, found: _Service) -> None:
    service.limits = found.limits
    service.clients.live = {one.id: one for one in found.clients}
    service.clients.by_key, service.clients.version = found.by_key, found.clients_version
    _restore_names(service.names, found)
    keys = service.keys
    keys.items = {item.key: item for item in found.items}
    keys.revision, keys.bytes, keys.compacted = found.revision, found.kv_bytes, found.compacted
    keys.of_client = {client: dict.fromkeys(names) for client, names in found.keys_of_client.items()}
    keys.history, keys.history_bytes = deque(found.history), found.history_bytes


def _restore_names(names: NamedLocks, found: _Service) -> None:
    for one in found.locks:
        lock = names.locks[one.name] = NamedLock()
        lock.holders, lock.waiters = dict(one.holders), dict(one.waiters)
        lock.delays, lock.job = one.delays, one.job
    names.of_client = {client: dict(places) for client, places in found.of_client}
    names.delayed, names.forced = found.delayed, found.forced
