"""What only a leader does, each tick: end lost workers, schedule, decide commits, tell workers what to do.

Level, not edge: each tick compares the replicated state with what workers say they hold, and sends what is missing.
A new leader therefore needs no memory of what the old one sent. Everything here is the leader's memory and is lost
with its leadership; everything that must survive goes through the log as a command.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from jobrunner.commit.steps import State
from jobrunner.control.messages import Beat, EndCause, Forget, Held, Instruct, Instruction, Start, Stop
from jobrunner.ids import Epoch, Hash, JobId, SessionId, Token
from jobrunner.locks.limits import LockLimits
from jobrunner.master.commands import (
    AnyCommand,
    Assign,
    CommitJob,
    DropAttempts,
    DropBlobs,
    EndSession,
    ForgetJobs,
    ForgetWorkers,
)
from jobrunner.master.jobs import Job
from jobrunner.master.liveness import Leases
from jobrunner.master.lock_timers import LockTimers
from jobrunner.master.scheduler import place_attempts
from jobrunner.master.state import MasterState
from jobrunner.master.tasks import Running

Key = TypeVar("Key", Token, JobId)

AHEAD_MS = 50.0  # Work that may wait at a worker, in time.
ORPHAN_BLOB_S = 600.0  # A blob that no job names, and nobody asked for, is dropped after this.
LOST_KEPT_MAX = 100  # Lost workers that `cluster status` shows.
GAP_S = 0.5  # Ticks further apart mean that this process was stopped or starved: the gap counts for nobody.
RESEND_BEATS = 2  # Beats without a sign of an instruction before it is sent again.


@dataclass(frozen=True, slots=True)
class LeaderLimits:
    ttl_s: float
    queue_max: int  # Attempts ahead per slot.
    jobs_kept_max: int
    placements_max: int = 1024
    gap_s: float = GAP_S
    locks: LockLimits | None = None  # None: as the state has them.


@dataclass(slots=True)
class WorkerView:
    """What the leader knows of one session. `sent` and `stopped`: token -> sequence of the instruction."""

    heard: bool = False  # It has beaten under this epoch: `held` is true.
    sequence: int = 0
    received: int = 0
    void: int = 0  # Instructions up to here that are not received never will be: what they said is said again.
    held: dict[Token, Held] = field(default_factory=dict)
    sent: dict[Token, int] = field(default_factory=dict)
    stopped: dict[Token, int] = field(default_factory=dict)
    forgotten: dict[JobId, int] = field(default_factory=dict)
    beats_unreceived: int = 0
    slot_ms: float = 1e9  # Smoothed time of one attempt in one slot.
    reported_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """A command to propose; `key` names what it is about, so that it is not proposed twice at once."""

    key: str
    command: AnyCommand


class Leader:
    """One leadership. The caller proposes what `tick` returns, calls `settled`, and sends the instructions."""

    def __init__(self, epoch: Epoch, now: float, limits: LeaderLimits) -> None:
        self.epoch = epoch
        self.leases = Leases(limits.ttl_s)
        self.lock_timers = LockTimers(limits.locks)
        self.views: dict[SessionId, WorkerView] = {}
        self._limits = limits
        self._ticked_at = now
        self._proposed: set[str] = set()
        self._blob_seen: dict[Hash, float] = {}
        self._unreachable: dict[SessionId, dict[SessionId, int]] = {}  # Source -> who could not fetch from it.

    # --- what comes in -----------------------------------------------------------------------------------------------

    def beat(self, beat: Beat, now: float) -> None:
        """A worker lives, and says what it holds."""
        self.leases.renew(beat.session, now)
        view = self.views.setdefault(beat.session, WorkerView())
        view.heard = True
        received = beat.sequence if beat.epoch == self.epoch else 0
        view.beats_unreceived = view.beats_unreceived + 1 if received < view.sequence else 0
        view.received = received
        view.held = {held.token: held for held in beat.held}
        if view.beats_unreceived >= RESEND_BEATS:
            _drop_above(view.sent, received)
            _drop_above(view.stopped, received)
            _drop_above(view.forgotten, received)
            view.void = view.sequence
            view.beats_unreceived = 0

    def reported(self, session: SessionId, ended: int, now: float) -> None:
        """A worker reported `ended` attempts: measures how long one takes, for the depth of its queue."""
        view = self.views.setdefault(session, WorkerView())
        elapsed_ms = (now - view.reported_at) * 1000 / max(1, ended)
        view.reported_at = now
        view.slot_ms = elapsed_ms if view.slot_ms > 1e8 else 0.7 * view.slot_ms + 0.3 * elapsed_ms

    def unreachable(self, source: SessionId, reporter: SessionId) -> bool:
        """A reducer could not reach a live worker's blocks. True: believe it, its output is to be made again."""
        reports = self._unreachable.setdefault(source, {})
        reports[reporter] = reports.get(reporter, 0) + 1
        believed = len(reports) >= 2 or reports[reporter] >= 2
        if believed:
            del self._unreachable[source]
        return believed

    def blobs_asked(self, hashes: list[Hash], now: float) -> None:
        """A client will rely on those of these that are here: they stay as if they had come now."""
        for hash in hashes:
            if hash in self._blob_seen:
                self._blob_seen[hash] = now

    def settled(self, key: str) -> None:
        """The proposal of this key is applied, or will never be."""
        self._proposed.discard(key)

    # --- what goes out -----------------------------------------------------------------------------------------------

    def tick(self, state: MasterState, now: float) -> tuple[list[Proposal], list[Instruct]]:
        self._count_gap(now)
        self.leases.follow(state.sessions.live, now)
        self.views = {id: self.views.get(id) or WorkerView() for id in state.sessions.live}
        proposals = [p for p in self._proposals(state, now) if p.key not in self._proposed]
        self._proposed.update(p.key for p in proposals)
        return proposals, self._instructions(state)

    def _count_gap(self, now: float) -> None:
        """Here and not in a timer: the first thing that a woken process runs may well be a tick."""
        gap, self._ticked_at = now - self._ticked_at, now
        if gap > self._limits.gap_s:
            self.leases.add_gap(gap)
            self.lock_timers.add_gap(gap)

    def _proposals(self, state: MasterState, now: float) -> Iterator[Proposal]:
        lost = self.leases.lost(now)
        for id, reason in lost:
            yield Proposal(f"end {id}", EndSession(id, reason))
        drops = self._drops(state)
        for (cause, reason), tokens in drops.items():
            yield Proposal(f"drop {cause}", DropAttempts(tokens, cause, reason))
        for job in state.active.values():
            if job.state == State.RUNNING and job.all_sealed():
                yield Proposal(f"commit {job.submit.job}", CommitJob(job.submit.job))
        lost_ids = {id for id, _ in lost}
        ahead = {id: self._ahead(state, id) for id, view in self.views.items() if view.heard and id not in lost_ids}
        if "assign" not in self._proposed and (
            places := place_attempts(state, ahead, placements_max=self._limits.placements_max)
        ):
            yield Proposal("assign", Assign(places))
        for key, command in self.lock_timers.proposals(state.service, now):
            yield Proposal(key, command)
        yield from self._housekeeping(state, now)

    def _ahead(self, state: MasterState, session: SessionId) -> int:
        """How many attempts may wait at a worker: about AHEAD_MS of work, none while attempts are long."""
        slots = state.sessions.live[session].slots
        slot_ms = self.views[session].slot_ms * slots
        if slot_ms > AHEAD_MS:
            return 0
        return slots * max(1, min(self._limits.queue_max, int(AHEAD_MS / max(slot_ms, 0.1))))

    def _drops(self, state: MasterState) -> dict[tuple[EndCause, str], list[Token]]:
        """Attempts to take back: instructions that the worker lost, and reduces whose input is gone."""
        drops: dict[tuple[EndCause, str], list[Token]] = {}
        for id, view in self.views.items():
            for token, running in state.attempts[id].items():
                sent, held = view.sent.get(Token(token)), view.held.get(Token(token))
                if held is None:
                    if sent is not None and sent <= view.received:
                        reason = (EndCause.PREEMPTED, "the worker does not have it")
                        drops.setdefault(reason, []).append(Token(token))
                elif self._input_gone(state, running) and not held.ready:
                    drops.setdefault((EndCause.LOST_INPUT, "map output was lost"), []).append(Token(token))
        return drops

    def _input_gone(self, state: MasterState, running: Running) -> bool:
        job = state.jobs[running.attempt.job]
        table = job.table(running.attempt.stage)
        return table is not None and not job.inputs_complete(table)

    def _housekeeping(self, state: MasterState, now: float) -> Iterator[Proposal]:
        excess = len(state.jobs) - len(state.active) - self._limits.jobs_kept_max
        if excess > 0:
            tidy = [id for id, job in state.jobs.items() if job.tidy][:excess]
            yield Proposal("forget jobs", ForgetJobs(tidy))
        lost = list(state.sessions.lost)
        if len(lost) > LOST_KEPT_MAX:
            yield Proposal("forget workers", ForgetWorkers(lost[:-LOST_KEPT_MAX]))
        names = state.blobs.names()
        if names or self._blob_seen:
            in_use = state.blobs_in_use()
            self._blob_seen = {name: self._blob_seen.get(name, now) for name in names if name not in in_use}
            old = [name for name in names if now - self._blob_seen.get(name, now) > ORPHAN_BLOB_S]
            if old:
                yield Proposal("drop blobs", DropBlobs(old))

    def _instructions(self, state: MasterState) -> list[Instruct]:
        instructs = []
        for id, view in self.views.items():
            if view.heard and (items := self._items(state, id, view)):
                view.sequence += 1
                for item in items:
                    if isinstance(item, Start):
                        view.sent[item.token] = view.sequence
                    elif isinstance(item, Stop):
                        view.stopped[item.token] = view.sequence
                    else:
                        view.forgotten[item.job] = view.sequence
                instructs.append(Instruct(self.epoch, id, view.sequence, items, view.void))
        return instructs

    def _items(self, state: MasterState, session: SessionId, view: WorkerView) -> list[Instruction]:
        assigned = state.attempts[session]
        _keep_only(view.sent, assigned.keys())
        _keep_only(view.stopped, view.held.keys())
        _keep_only(view.forgotten, state.jobs.keys())
        items: list[Instruction] = [
            Stop(token, EndCause.SUPERSEDED)
            for token in view.held
            if token not in assigned and token not in view.stopped
        ]
        for token in sorted(assigned):
            if token not in view.held and token not in view.sent:
                items.append(_start(state, assigned[token]))
        for job_id, job in state.jobs.items():
            if job.tidy and session in job.touched and job_id not in view.forgotten:
                items.append(Forget(job_id))
        return items


def _start(state: MasterState, running: Running) -> Start:
    job = state.jobs[running.attempt.job]
    table = job.table(running.attempt.stage)
    assert table is not None
    version = job.stages[table.spec.reads].version if table.spec.reads else 0
    return Start(running.attempt, running.token, running.kind, job.submit.plan, table.spec.reads, version)


def _drop_above(sent: dict[Key, int], received: int) -> None:
    for key in [key for key, sequence in sent.items() if sequence > received]:
        del sent[key]


def _keep_only(sent: dict[Key, int], keys: Container[object]) -> None:
    for key in [key for key in sent if key not in keys]:
        del sent[key]


def waiting_for(state: MasterState, job: Job) -> str | None:
    """What a job waits for, for `status`; None when it has ended."""
    if job.tidy or job.ended:
        return None
    if not state.sessions.live:
        return "a worker: none is alive"
    if job.state == State.QUEUED:
        return "set-up of the output's stage directory"
    if job.state in (State.COMMITTING, State.RETRACTING):
        return "publication of the sealed output"
    parts = []
    for table in job.stages.values():
        if table.complete:
            continue
        if not job.inputs_complete(table):
            parts.append(f"{table.spec.name}: waits for {table.spec.reads}")
            continue
        text = f"{table.spec.name}: {table.done} of {table.spec.tasks} done, {len(table.running)} running"
        if table.open_count:
            text += f", {table.open_count} waiting for a slot"
        parts.append(text)
    return "; ".join(parts) or "all partitions are sealed: commit"
