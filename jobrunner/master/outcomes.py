"""What the end of an attempt, of a worker or of map output means for tasks and jobs: the rules behind `apply`.

Every function changes a MasterState in place and is the same on every master. Rules:
- A result counts whoever reports it and however late, if its attempt was ever assigned and its task is not finished.
- Only a task's own faults are charged to it; `faults_max` of them fail the job.
- Map output is revocable, a sealed partition is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobrunner.commit.steps import Event as CommitEvent
from jobrunner.commit.steps import State
from jobrunner.control.messages import (
    CHARGED,
    HOPELESS,
    AttemptInfo,
    BlockOffer,
    EndCause,
    Ended,
    Failed,
    JobError,
    LossKind,
    MapDone,
    Sealable,
    StepDone,
    TaskKind,
    Verdict,
)
from jobrunner.ids import AttemptId, SessionId
from jobrunner.locks.sessions import Session
from jobrunner.locks.table import Claim
from jobrunner.master.commands import Placement
from jobrunner.master.jobs import Job
from jobrunner.master.tasks import Event, Running, StageTable, TaskState

if TYPE_CHECKING:
    from jobrunner.master.state import MasterState


def assign(state: MasterState, job: Job, table: StageTable, place: Placement) -> None:
    """Start the next attempt of an open task at a live worker."""
    attempt = AttemptId(place.job, place.stage, place.partition, table.next_attempt(place.partition))
    running = table.assign(attempt, state.locks.next_token(), place.session)
    state.attempts[place.session][running.token] = running
    job.touched[place.session] = None
    job.version += 1


def commit(state: MasterState, job: Job) -> bool:
    """The point of no return, if every partition is sealed; False if there is nothing to do (any more)."""
    if job.state == State.RUNNING and not job.all_sealed():
        return False
    if job.state == State.QUEUED:
        return False
    if not job.move(CommitEvent.COMMIT):
        return False
    for table in job.stages.values():
        for running in list(table.running.values()):  # Maps that ran again for a partition that is sealed by now.
            drop(state, running, EndCause.SUPERSEDED, "every partition is sealed")
    job.version += 1
    return True


# --- the end of an attempt -------------------------------------------------------------------------------------------


def end_attempt(state: MasterState, reporter: SessionId, item: Ended, at_ms: int) -> Verdict | None:
    """Record what a worker reports. None: only a live session may say that."""
    job = state.jobs.get(item.attempt.job)
    table = job.table(item.attempt.stage) if job is not None else None
    if job is None or table is None or not table.issued(item.attempt.partition, item.attempt.attempt, item.token):
        return Verdict.GONE
    if isinstance(item, Sealable):
        return _seal(state, job, table, reporter, item)
    if isinstance(item, StepDone):
        return _step_done(state, job, table, reporter, item, at_ms)
    if reporter not in state.sessions.live:
        return None
    if isinstance(item, MapDone):
        return _map_done(state, job, table, reporter, item, at_ms)
    return _failed(state, job, table, reporter, item, at_ms)


def _seal(state: MasterState, job: Job, table: StageTable, reporter: SessionId, item: Sealable) -> Verdict:
    partition = item.attempt.partition
    winner = state.locks.winner(item.attempt.job, item.attempt.stage, partition)
    claim = Claim(item.attempt.attempt, item.token, reporter, item.files, item.consumed)
    if winner is not None:
        if winner.token != item.token:
            _end_if_running(state, job, table, item, EndCause.SUPERSEDED)
            return Verdict.LOST
        same = (winner.files, winner.consumed) == (claim.files, claim.consumed)
        return Verdict.WON if same else Verdict.REFUSED
    if job.state != State.RUNNING or not table.spec.final:
        return Verdict.GONE
    if not _consumed_is_current(job, table, item.consumed):
        _end_if_running(state, job, table, item, EndCause.LOST_INPUT)
        # Its files are deleted now: a late copy of the report must not win when the maps' output is again what it read.
        table.revoke(partition, item.attempt.attempt, state.locks.next_token())
        return Verdict.LOST
    state.locks.seal(item.attempt.job, item.attempt.stage, partition, claim)
    _finish(state, job, table, item)
    job.add_counters(item.counters)
    return Verdict.WON


def _consumed_is_current(job: Job, table: StageTable, consumed: int) -> bool:
    """Whether the input an attempt read is what the maps are recorded to have made."""
    if not table.spec.reads:
        return consumed == 0
    maps = job.stages[table.spec.reads]
    return maps.recorded == maps.spec.tasks and maps.digest_sum == consumed


def _map_done(
    state: MasterState, job: Job, table: StageTable, reporter: SessionId, item: MapDone, at_ms: int
) -> Verdict:
    partition = item.attempt.partition
    if job.state != State.RUNNING or table.spec.final or table.spec.kind != TaskKind.MAP:
        return Verdict.GONE
    if table.state_of(partition) == TaskState.DONE:
        return Verdict.ACCEPTED if table.done_token[partition] == item.token else Verdict.LOST
    if not _record_map(state, job, table, reporter, item, at_ms):
        return Verdict.GONE
    return Verdict.ACCEPTED


def _record_map(
    state: MasterState,
    job: Job,
    table: StageTable,
    owner: SessionId,
    item: MapDone | BlockOffer,
    at_ms: int,
) -> bool:
    """The output of an open map is there. False if it differs from what sealed partitions were made of."""
    partition = item.attempt.partition
    first = not table.done_token[partition]
    if not first and table.digest[partition] != item.digest:
        if any(reader.done for reader in job.readers(table.spec.name)):
            message = (
                "your map is not deterministic: run again, it made other output than the one that finished partitions "
                "were made of"
            )
            _fail_job(state, job, JobError("not_deterministic", message, str(item.attempt.task), str(item.attempt)),
                      at_ms)  # fmt: skip
            return False
        for reader in job.readers(table.spec.name):
            for running in list(reader.running.values()):
                drop(state, running, EndCause.LOST_INPUT, "a map that ran again made other output")
    _finish(state, job, table, item)
    table.record_output(partition, attempt=item.attempt.attempt, token=item.token, owner=owner, digest=item.digest,
                        bytes=item.bytes)  # fmt: skip
    job.touched[owner] = None
    if first:
        job.add_counters(item.counters)
    return True


def _step_done(
    state: MasterState, job: Job, table: StageTable, reporter: SessionId, item: StepDone, at_ms: int
) -> Verdict:
    """A step of the commit is done; whoever did it and whenever, it is true from now on."""
    events = {
        (TaskKind.SETUP, "done"): CommitEvent.SET_UP,
        (TaskKind.SETUP, "refused"): CommitEvent.SET_UP_REFUSED,
        (TaskKind.PUBLISH, "done"): CommitEvent.PUBLISHED,
        (TaskKind.PUBLISH, "refused"): CommitEvent.PUBLISH_REFUSED,
        (TaskKind.RETRACT, "withdrawn"): CommitEvent.WITHDRAWN,
        (TaskKind.RETRACT, "published"): CommitEvent.PUBLISHED_AFTER_ALL,
        (TaskKind.CLEANUP, "done"): CommitEvent.CLEANED_UP,
    }
    event = events.get((table.spec.kind, item.outcome))
    # A set-up that comes after the job's end has made its stage again, and is told to look after that. Other steps
    # that come after it change nothing, above all not what the job is said to have ended with.
    late = job.tidy if table.spec.kind == TaskKind.CLEANUP else job.ended
    if event is None or late or table.state_of(0) == TaskState.DONE:
        _end_if_running(state, job, table, item, EndCause.SUPERSEDED)
        return Verdict.GONE
    _finish(state, job, table, item)
    table.record_output(0, attempt=item.attempt.attempt, token=item.token, owner=reporter, digest=0, bytes=0)
    if item.outcome == "refused" and job.error is None:
        job.error = JobError("commit_refused", item.detail, str(item.attempt.task), str(item.attempt))
    _move(state, job, event, at_ms)
    return Verdict.ACCEPTED


def _failed(state: MasterState, job: Job, table: StageTable, reporter: SessionId, item: Failed, at_ms: int) -> Verdict:
    partition = item.attempt.partition
    running = table.running.get(partition)
    if running is None or running.token != item.token or running.session != reporter:
        return Verdict.GONE
    _end_running(state, job, table, running, item.cause)
    job.keep_record(
        AttemptInfo(item.attempt, item.token, running.kind, item.cause, _address(state, reporter), item.message,
                    item.traceback, item.tail, item.place)
    )  # fmt: skip
    if item.cause not in CHARGED:
        return Verdict.ACCEPTED
    table.faults[partition] = table.faults.get(partition, 0) + 1
    if table.faults[partition] >= job.submit.faults_max or item.cause in HOPELESS:
        error = JobError(item.cause, item.message, str(item.attempt.task), str(item.attempt), item.traceback or None,
                         item.place)  # fmt: skip
        _give_up(state, job, table, error, at_ms)
    return Verdict.ACCEPTED


def _give_up(state: MasterState, job: Job, table: StageTable, error: JobError, at_ms: int) -> None:
    """A task has used up its faults. What that means depends on how far the job is."""
    kind = table.spec.kind
    if kind == TaskKind.PUBLISH:
        job.error = job.error or error
        _move(state, job, CommitEvent.PUBLISH_REFUSED, at_ms)
    elif kind == TaskKind.CLEANUP:
        job.left_behind = error.message
        _move(state, job, CommitEvent.CLEANED_UP, at_ms)
    elif kind == TaskKind.RETRACT:
        table.faults.clear()  # Whether it was published must be found out: there is nothing else to do but try.
    else:
        _fail_job(state, job, error, at_ms)


def _finish(state: MasterState, job: Job, table: StageTable, item: MapDone | Sealable | StepDone | BlockOffer) -> None:
    """The task is finished by this attempt; another one that runs is superseded."""
    running = table.running.get(item.attempt.partition)
    if running is not None:
        cause = EndCause.DONE if running.token == item.token else EndCause.SUPERSEDED
        table.end_running(item.attempt.partition, cause)
        state.attempts.get(running.session, {}).pop(running.token, None)
    table.step(item.attempt.partition, Event.FINISHED)
    job.version += 1


def _end_if_running(
    state: MasterState, job: Job, table: StageTable, item: Sealable | StepDone, cause: EndCause
) -> None:
    running = table.running.get(item.attempt.partition)
    if running is not None and running.token == item.token:
        _end_running(state, job, table, running, cause)


def _end_running(state: MasterState, job: Job, table: StageTable, running: Running, cause: EndCause) -> None:
    table.end_running(running.attempt.partition, cause)
    state.attempts.get(running.session, {}).pop(running.token, None)
    table.step(running.attempt.partition, Event.ENDED)
    job.version += 1


def drop(state: MasterState, running: Running, cause: EndCause, reason: str) -> None:
    """Take an assigned attempt back, uncharged; the leader tells its worker by what it no longer finds here."""
    job = state.jobs[running.attempt.job]
    table = job.table(running.attempt.stage)
    assert table is not None
    address = _address(state, running.session)
    _end_running(state, job, table, running, cause)
    job.keep_record(AttemptInfo(running.attempt, running.token, running.kind, cause, address, reason, "", ""))


# --- the end of a worker, and of map output --------------------------------------------------------------------------


def worker_lost(state: MasterState, session: Session, reason: str, at_ms: int) -> None:
    """Its attempts are lost, uncharged; of its map output, what a partition that is not sealed still needs."""
    for running in list(state.attempts.get(session.id, {}).values()):
        drop(state, running, EndCause.LOST_WORKER, f"worker {session.name} was lost: {reason}")
    state.attempts.pop(session.id, None)
    for job in state.active.values():
        job.touched.pop(session.id, None)
        if job.state != State.RUNNING:
            continue
        for table in job.stages.values():
            if not table.spec.final and job.output_needed(table.spec.name):
                for partition in list(table.outputs_of(session.id)):
                    _reopen_map(job, table, partition)


def _reopen_map(job: Job, table: StageTable, partition: int) -> None:
    table.step(partition, Event.OUTPUT_LOST)
    table.version += 1
    job.version += 1


def offer(state: MasterState, session: SessionId, block: BlockOffer, at_ms: int) -> bool:
    """A worker found a block file at start: make its open map done, if it is what was recorded. True: keep it."""
    job = state.jobs.get(block.attempt.job)
    table = job.stages.get(block.attempt.stage) if job is not None else None
    if job is None or table is None or table.spec.final or job.state != State.RUNNING:
        return False
    partition = block.attempt.partition
    if not table.issued(partition, block.attempt.attempt, block.token):
        return False
    if table.state_of(partition) == TaskState.DONE:
        return table.done_token[partition] == block.token and table.owner[partition] == session
    if table.done_token[partition] and table.digest[partition] != block.digest:
        return False
    return _record_map(state, job, table, session, block, at_ms)


def lose_output(state: MasterState, reader: AttemptId, lost: list[AttemptId], kind: LossKind, at_ms: int) -> None:
    """Map output could not be read: the maps run again, the reader ends uncharged. Only damage is limited."""
    job = state.jobs.get(reader.job)
    if job is None or job.state != State.RUNNING:
        return
    for attempt in lost:
        table = job.stages.get(attempt.stage)
        if table is None or table.spec.final or table.state_of(attempt.partition) != TaskState.DONE:
            continue
        if table.done_attempt[attempt.partition] != attempt.attempt or not job.output_needed(attempt.stage):
            continue
        _reopen_map(job, table, attempt.partition)
        if kind == LossKind.CORRUPT and _too_corrupt(state, job, table, attempt, at_ms):
            return
    readers = job.stages.get(reader.stage)
    running = readers.running.get(reader.partition) if readers is not None else None
    if running is not None and running.attempt == reader:
        drop(state, running, EndCause.LOST_INPUT, f"map output was {kind}: {_some(lost)}")


def _too_corrupt(state: MasterState, job: Job, table: StageTable, attempt: AttemptId, at_ms: int) -> bool:
    partition = attempt.partition
    table.corruptions[partition] = table.corruptions.get(partition, 0) + 1
    if table.corruptions[partition] < job.submit.faults_max:
        return False
    message = f"the output of map {attempt.task} was damaged {table.corruptions[partition]} times: look at the disks"
    _fail_job(state, job, JobError("corrupt", message, str(attempt.task), str(attempt)), at_ms)
    return True


def _some(lost: list[AttemptId]) -> str:
    shown = ", ".join(str(attempt) for attempt in lost[:3])
    return shown if len(lost) <= 3 else f"{shown} and {len(lost) - 3} more"


# --- the end of a job ------------------------------------------------------------------------------------------------


def kill(state: MasterState, job: Job, reason: str, at_ms: int) -> None:
    if job.error is None:
        job.error = JobError("killed", reason or "killed by an operator")
    _move(state, job, CommitEvent.KILL, at_ms)


def _fail_job(state: MasterState, job: Job, error: JobError, at_ms: int) -> None:
    if job.ended:
        return
    job.error = error
    _move(state, job, CommitEvent.FAIL, at_ms)


def _move(state: MasterState, job: Job, event: CommitEvent, at_ms: int) -> None:
    """One step of the job's commit, and what follows from it."""
    if not job.move(event):
        return
    job.version += 1
    if job.state == State.COMMITTED:
        job.error = None  # A publication that was refused first and then found done.
    if job.ended and job.finished_ms is None:
        job.finished_ms = at_ms
        _end_job(state, job)
    if job.tidy:
        _tidy_job(state, job, at_ms)


def _end_job(state: MasterState, job: Job) -> None:
    state.ended_counts[job.public] = state.ended_counts.get(job.public, 0) + 1
    for table in list(job.tables()):
        for running in list(table.running.values()):
            drop(state, running, EndCause.OPERATOR, f"the job is {job.public}")


def _tidy_job(state: MasterState, job: Job, at_ms: int) -> None:
    state.release_output(job, at_ms)
    state.active.pop(job.submit.job, None)
    in_use = state.blobs_in_use()
    for hash in (job.submit.plan, job.submit.code):
        if hash not in in_use:
            state.blobs.drop(hash)


def _address(state: MasterState, id: SessionId) -> str:
    session = state.sessions.live.get(id)
    return session.address if session is not None else ""
