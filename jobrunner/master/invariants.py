"""What must always hold of a MasterState; checked after every step in tests and in the simulator."""

from collections.abc import Iterator

from jobrunner.commit.steps import State
from jobrunner.control.locks import OUTPUT_PREFIX
from jobrunner.control.messages import CHARGED
from jobrunner.locks.invariants import broken_locks
from jobrunner.master.jobs import Job
from jobrunner.master.state import MasterState
from jobrunner.master.tasks import DIGEST_MASK, StageTable, TaskState


def check_state(state: MasterState) -> None:
    """Raises AssertionError naming everything that does not hold."""
    broken = list(_broken(state))
    assert not broken, "; ".join(broken)


def _broken(state: MasterState) -> Iterator[str]:
    yield from _sessions(state)
    yield from broken_locks(state.service)
    yield from _output_locks(state)
    for id, job in state.jobs.items():
        if (id in state.active) == job.tidy:
            yield f"{id}: active and tidy disagree"
        holder = state.locks.paths.get(job.submit.output)
        if (holder == id) == job.tidy:
            yield f"{id}: {job.state} but its output path is held by {holder}"
        if job.ended != (job.finished_ms is not None):
            yield f"{id}: {job.state} but finished_ms is {job.finished_ms}"
        for table in job.tables():
            yield from (f"{id}/{table.spec.name}: {text}" for text in _table(job, table))
        yield from _job(state, job)


def _sessions(state: MasterState) -> Iterator[str]:
    if set(state.attempts) != set(state.sessions.live):
        yield "attempts are kept for other sessions than the live ones"
    listed = {token: running for attempts in state.attempts.values() for token, running in attempts.items()}
    in_tables = {
        running.token: running
        for job in state.jobs.values()
        for table in job.tables()
        for running in table.running.values()
    }
    if listed != in_tables:
        yield f"running attempts disagree: by session {sorted(listed)}, by task {sorted(in_tables)}"
    if any(token > state.locks.last_token for token in listed):
        yield "a token above the counter"
    for directory, id in state.sessions.by_directory.items():
        session = state.sessions.live.get(id)
        if session is None or session.directory != directory:
            yield f"directory {directory} points to session {id}"


def _output_locks(state: MasterState) -> Iterator[str]:
    reserved = {name: lock.job for name, lock in state.service.names.locks.items() if lock.job is not None}
    paths = {OUTPUT_PREFIX + url: job for url, job in state.locks.paths.items()}
    if reserved != paths:
        yield f"output locks of jobs are {reserved}, output paths {paths}"
    tokens = [place.token for lock in state.service.names.locks.values() for place in lock.holders.values()]
    if any(token > state.locks.last_token for token in tokens):
        yield "a lock's token above the counter"


def _table(job: Job, table: StageTable) -> Iterator[str]:
    states = [TaskState(value) for value in table.state]
    if table.done != states.count(TaskState.DONE):
        yield f"done counter {table.done}, in truth {states.count(TaskState.DONE)}"
    running = {partition for partition, value in enumerate(states) if value == TaskState.RUNNING}
    if running != set(table.running):
        yield f"running {sorted(running)}, attempts {sorted(table.running)}"
    if table.started != sum(table.ends.values()) + len(table.running):
        yield f"{table.started} started, {sum(table.ends.values())} ended, {len(table.running)} running"
    missing = {p for p, value in enumerate(states) if value == TaskState.OPEN} - set(table.reopened)
    if missing:
        yield f"open tasks that nobody will take: {sorted(missing)}"
    recorded = [p for p in range(len(states)) if table.done_token[p]]
    if table.recorded != (len(recorded) if not table.spec.final else 0):
        yield f"{table.recorded} recorded outputs, in truth {len(recorded)}"
    if table.digest_sum != sum(table.digest) & DIGEST_MASK:
        yield "the sum of digests is wrong"
    charged = sum(table.ends.get(cause, 0) for cause in CHARGED)
    if sum(table.faults.values()) > charged:
        yield f"{sum(table.faults.values())} faults charged, {charged} were"


def _job(state: MasterState, job: Job) -> Iterator[str]:
    id = job.submit.job
    for table in job.final_stages():
        winners = state.locks.winners.get((id, table.spec.name), {})
        done = {partition for partition, value in enumerate(table.state) if value == TaskState.DONE}
        if set(winners) != done:
            yield f"{id}/{table.spec.name}: sealed {sorted(winners)}, done {sorted(done)}"
        for partition, claim in winners.items():
            if not table.issued(partition, claim.attempt, claim.token):
                yield f"{id}/{table.spec.name}/{partition}: the winner was never assigned"
    if job.state in (State.COMMITTING, State.RETRACTING, State.COMMITTED) and not job.all_sealed():
        yield f"{id}: {job.state} without all partitions"
    if job.ended and any(table.running for table in job.stages.values()):
        yield f"{id}: {job.state} with running attempts"
    yield from _waits(state, job)


def _waits(state: MasterState, job: Job) -> Iterator[str]:
    """Every job that has not ended has an attempt assigned, one to assign, or a commit to decide."""
    if job.tidy or (job.state == State.RUNNING and job.all_sealed()):
        return
    if not any(table.running for table in job.tables()) and not job.open_tables():
        yield f"{job.submit.job}: {job.state} and nothing runs or can be assigned"
    for table in job.stages.values():
        maps = job.stages.get(table.spec.reads)
        if job.state == State.RUNNING and maps is not None and not maps.complete and not table.complete:
            waiting = maps.open_count or maps.running
            if not waiting:
                yield f"{job.submit.job}/{table.spec.name}: waits for maps that nobody runs"
