"""A cluster of one in memory: answers a client's messages as the masters do, without sockets."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from jobrunner.control.messages import (
    Ack,
    AttemptInfo,
    AttemptList,
    BlobsHeld,
    ClusterInfo,
    EndCause,
    GetAttempts,
    GetCluster,
    GetJob,
    HaveBlobs,
    InputPlace,
    JobError,
    JobList,
    JobState,
    JobStatus,
    KillJob,
    ListJobs,
    MasterInfo,
    PutBlob,
    StageStatus,
    SubmitJob,
    Submitted,
    TaskKind,
    WaitJob,
    WorkerInfo,
)
from jobrunner.errors import UnknownJob
from jobrunner.ids import AttemptId, JobId, StageName, Token, job_id_from_number

JOB = job_id_from_number(77)
ENDED = (JobState.COMMITTED, JobState.FAILED, JobState.KILLED)


def status_of(state: JobState, *, version: int = 1, output: str = "/data/out", job: JobId = JOB) -> JobStatus:
    """A job in `state`, with what the masters say of it."""
    ended = state in ENDED
    return JobStatus(
        id=job,
        name="wordcount",
        state=state,
        waiting_for=None if ended else "a worker: none is alive",
        output=output,
        submitted_ms=1_700_000_000_000,
        finished_ms=1_700_000_002_500 if ended else None,
        stages=[StageStatus(StageName("map"), TaskKind.MAP, 3, 1, 2, {"started": 4, "failed": 1, "exception": 1})],
        counters={"lines": 5},
        error=user_error() if state is JobState.FAILED else None,
        tidy=ended,
        version=version,
    )


def user_error() -> JobError:
    return JobError(
        "exception",
        "ValueError: bad line",
        task=f"{JOB}/map/1",
        attempt=f"{JOB}/map/1/3",
        traceback='Traceback (most recent call last):\n  File "job.py", line 3, in words\nValueError: bad line\n',
        input=InputPlace("/data/in.txt", 42),
    )


def failed_attempt(worker: str = "") -> AttemptInfo:
    id = AttemptId(JOB, StageName("map"), 1, 3)
    return AttemptInfo(
        id, Token(9), TaskKind.MAP, EndCause.EXCEPTION, worker, "ValueError: bad line", "Traceback: x", "the tail\n"
    )


@dataclass
class FakeMasters:
    """Walks each submitted job through `states`, one step a question; keeps all it was told."""

    states: list[JobState] = field(default_factory=lambda: [JobState.RUNNING, JobState.COMMITTED])
    told: list[Any] = field(default_factory=list)
    jobs: dict[JobId, JobStatus] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    attempts: list[AttemptInfo] = field(default_factory=list)
    slots: int = 3
    fail_submit: Exception | None = None
    closed: bool = False

    async def call(self, message: Any, *, deadline_s: float, timeout_s: float) -> Any:
        self.told.append(message)
        match message:
            case HaveBlobs(hashes=hashes):
                return BlobsHeld([name for name in hashes if name not in self.blobs])
            case PutBlob(hash=name, offset=offset, data=data):
                assert offset == len(self.blobs.get(name, b""))
                self.blobs[name] = self.blobs.get(name, b"") + data
                return Ack()
            case SubmitJob(job=job, output=output):
                existing = job in self.jobs
                if not existing:
                    self.jobs[job] = status_of(self.states[0], output=output, job=job)
                if self.fail_submit:
                    raise self.fail_submit
                return Submitted(job, existing)
            case WaitJob(job=job):
                return await self._wait(job)
            case GetJob(job=job):
                return self._advance(job)
            case KillJob(job=job):
                if self._job(job).state not in ENDED:
                    self.jobs[job] = status_of(JobState.KILLED, version=99, job=job)
                return self._job(job)
            case ListJobs():
                return JobList(list(self.jobs.values()))
            case GetAttempts():
                return AttemptList(self.attempts)
            case GetCluster():
                return cluster_info(self.slots)
        raise AssertionError(f"not a client's message: {message}")

    async def close(self) -> None:
        self.closed = True

    def _job(self, job: JobId) -> JobStatus:
        if job not in self.jobs:
            raise UnknownJob(f"no job {job}", job=job)
        return self.jobs[job]

    def _advance(self, job: JobId) -> JobStatus:
        now = self._job(job)
        if now.state in self.states[:-1]:
            state = self.states[self.states.index(now.state) + 1]
            after = status_of(state, version=now.version + 1, output=now.output, job=job)
            self.jobs[job] = after
        return now

    async def _wait(self, job: JobId) -> JobStatus:
        while self._job(job).state not in ENDED:
            await asyncio.sleep(0.001)
            self._advance(job)
        return self._job(job)


def cluster_info(slots: int = 3) -> ClusterInfo:
    return ClusterInfo(
        cluster_id="c" * 32,
        leader=1,
        epoch=4,
        masters=[
            MasterInfo(0, "a" * 32, "127.0.0.1:1", 11, "follower", 4, 9, 9),
            MasterInfo(1, "b" * 32, "127.0.0.1:2", None, "down", 3, 0, 0),
        ],
        workers=[
            WorkerInfo(0, "127.0.0.1:3", 12, "host", slots, "live", [f"{JOB}/map/1/0"]),
            WorkerInfo(1, "127.0.0.1:4", 13, "host", 8, "lost", []),
        ],
        jobs={"running": 1, "committed": 2},
    )
