"""MasterState -> what people are shown: values of control.messages. Reads counters that apply keeps; walks no tasks.

What grows with a job or with their number is given in pages: `bytes_max` is about how large one may be, so that it fits
a frame; `more` says that another follows.
"""

from collections.abc import Iterable
from typing import TypeVar

import msgspec

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

PAGE_BYTES = 524_288
_ROW_BYTES = 33  # Of MapOutputs, at most: attempt and owner 3 each, the others 9.
_Row = TypeVar("_Row")


def _page(rows: Iterable[_Row], bytes_max: int) -> tuple[list[_Row], bool]:
    """The first rows, of `bytes_max` bytes or one at least, and whether there are more."""
    page: list[_Row] = []
    size = 0
    for row in rows:
        size += len(msgspec.msgpack.encode(row))
        if size > bytes_max and page:
            return page, True
        page.append(row)
    return page, False


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


def job_list(state: MasterState, after: JobId | None = None, *, bytes_max: int = PAGE_BYTES) -> JobList:
    """Jobs, newest first; `after`: those submitted before this one. They are forgotten oldest first."""
    jobs = list(state.jobs)
    if after is not None:
        jobs = jobs[: jobs.index(after)] if after in state.jobs else []
    return JobList(*_page((job_status(state, state.jobs[job]) for job in reversed(jobs)), bytes_max))


def attempt_list(state: MasterState, request: GetAttempts, *, bytes_max: int = PAGE_BYTES) -> AttemptList:
    infos = attempt_infos(
        state.job(request.job), state.sessions, state.locks, request.task, failed_only=request.failed_only
    )
    later = (info for info in sorted(infos, key=lambda info: info.token) if info.token > request.after)
    return AttemptList(*_page(later, bytes_max))


def map_outputs(
    state: MasterState, job_id: JobId, stage: StageName, version: int, offset: int = 0, *, bytes_max: int = PAGE_BYTES
) -> MapOutputs:
    """Rows from partition `offset` on, and every owner.

    Raises Unavailable while a map output is missing, or this state is behind `version`;
    Refused when a late reader asks for what is no longer kept: all is sealed, or the job has ended.
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
    rows = slice(offset, offset + max(1, bytes_max // _ROW_BYTES))
    return MapOutputs(
        table.version,
        [BlockOwner(session.id, session.directory, session.address) for session in sessions],
        owner_column[rows],
        list(table.done_attempt[rows]),
        list(table.done_token[rows]),
        list(table.digest[rows]),
        list(table.bytes[rows]),
        more=rows.stop < len(owner_column),
    )


def winners(state: MasterState, job_id: JobId, offset: int = 0, *, bytes_max: int = PAGE_BYTES) -> Winners:
    """The decided output, by partition, without the first `offset`; the counters are on the first page. A pure
    function of the log. Raises Unavailable before it is decided."""
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
    page, more = _page(rows[offset:], bytes_max)
    return Winners(page, {} if offset else dict(sorted(job.counters.items())), more)


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
