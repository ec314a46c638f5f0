"""MasterState -> what people are shown: values of control.messages. Reads counters that apply keeps; walks no tasks."""

from jobrunner.control.messages import (
    AttemptList,
    BlockOwner,
    GetAttempts,
    JobError,
    JobList,
    JobStatus,
    MapOutputs,
    Winner,
    Winners,
    WorkerInfo,
)
from jobrunner.errors import Refused, Unavailable
from jobrunner.ids import JobId, SessionId, StageName, Token
from jobrunner.master.jobs import Job, attempt_infos
from jobrunner.master.leader import waiting_for
from jobrunner.master.state import MasterState


def job_status(state: MasterState, job: Job) -> JobStatus:
    error = job.error if job.ended else None
    if error is not None and job.left_behind:
        error = JobError(error.kind, f"{error.message} (and clean-up was given up: {job.left_behind})", error.task,
                         error.attempt, error.traceback, error.input)  # fmt: skip
    return JobStatus(
        job.submit.job,
        job.submit.name,
        job.public,
        waiting_for(state, job),
        job.submit.output,
        job.submit.submitted_ms,
        job.finished_ms,
        [job.stage_status(table) for table in job.stages.values()],
        dict(sorted(job.counters.items())),
        error,
        job.tidy,
        job.version,
    )


def job_list(state: MasterState) -> JobList:
    return JobList([job_status(state, job) for job in reversed(list(state.jobs.values()))])


def attempt_list(state: MasterState, request: GetAttempts) -> AttemptList:
    job = state.job(request.job)
    return AttemptList(
        attempt_infos(job, state.sessions, state.locks, request.task, failed_only=request.failed_only)
    )  # fmt: skip


def map_outputs(state: MasterState, job_id: JobId, stage: StageName, version: int) -> MapOutputs:
    """Raises Unavailable while a map output is missing, or this state is behind `version`.

    Raises Refused when a late reader asks for what is no longer kept: all is sealed, or the job has ended.
    """
    job = state.job(job_id)
    table = job.stages.get(stage)
    if table is None:
        raise Refused(f"job {job_id} has no stage {stage}", job=job_id)
    if not table.complete or table.version < version:
        raise Unavailable(f"map output of {job_id}/{stage} is being made: {table.done} of {table.spec.tasks}")
    owners: dict[int, int] = {}
    owner_column = [owners.setdefault(id, len(owners)) for id in table.owner]
    if not all(SessionId(id) in state.sessions.live for id in owners):
        raise Refused(f"map output of {job_id}/{stage} is gone: no partition needs it any more", job=job_id)
    sessions = [state.sessions.live[SessionId(id)] for id in owners]
    return MapOutputs(
        table.version,
        [BlockOwner(session.id, session.directory, session.address) for session in sessions],
        owner_column,
        list(table.done_attempt),
        list(table.done_token),
        list(table.digest),
        list(table.bytes),
    )


def winners(state: MasterState, job_id: JobId) -> Winners:
    """The decided output, by partition: a pure function of the log. Raises Unavailable before it is decided."""
    job = state.job(job_id)
    if not job.all_sealed():
        raise Unavailable(f"job {job_id}: not every partition is sealed")
    rows: list[Winner] = []
    for table in job.final_stages():
        claims = state.locks.winners.get((job_id, table.spec.name), {})
        rows.extend(
            Winner(partition, claim.attempt, Token(claim.token), claim.files)
            for partition, claim in sorted(claims.items())
        )
    return Winners(rows, dict(sorted(job.counters.items())))


def worker_infos(state: MasterState, suspect: set[SessionId]) -> list[WorkerInfo]:
    """Live workers and those lost last, by name. `suspect`: sessions that have been silent for a while."""
    infos = []
    for session in state.sessions.live.values():
        running = [str(attempt.attempt) for attempt in state.attempts[session.id].values()]
        condition = "suspect" if session.id in suspect else "live"
        infos.append(WorkerInfo(session.name, session.address, session.pid, session.host.hostname, session.slots,
                                condition, running))  # fmt: skip
    for session in state.sessions.lost.values():
        infos.append(WorkerInfo(session.name, session.address, session.pid, session.host.hostname, session.slots,
                                "lost", []))  # fmt: skip
    return sorted(infos, key=lambda info: (info.id, info.state))
