"""JobHandle and JobResult: one job of a running cluster, and what an ended job left."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobrunner.api.remote import Remote, wait_for
from jobrunner.commit.manifest import decode_manifest
from jobrunner.commit.names import SUCCESS, local_path
from jobrunner.control.messages import (
    AttemptInfo,
    AttemptList,
    GetAttempts,
    GetJob,
    JobState,
    JobStatus,
    KillJob,
    WaitJob,
)
from jobrunner.errors import CorruptData, JobEnded, JobKilled, SpecError, TaskError
from jobrunner.ids import JobId, TaskId

ENDED = frozenset({JobState.COMMITTED, JobState.FAILED, JobState.KILLED})
_NO_VERSION = (1 << 63) - 1  # Above any version: such a WaitJob is answered only when the job has ended.
_WAIT_MS = 10_000  # One WaitJob; a longer wait is several.
_LOOK_S = 0.2  # Between two looks at a job that somebody watches.


@dataclass(frozen=True, slots=True)
class JobResult:
    """A committed job. `results()` reads its output."""

    status: JobStatus

    @property
    def id(self) -> JobId:
        return self.status.id

    @property
    def output(self) -> str:
        return self.status.output

    @property
    def counters(self) -> dict[str, int]:
        return dict(self.status.counters)

    def results(self) -> Iterator[str]:
        """The output's lines without their ends, part by part. Raises CorruptData if the output is not this job's."""
        return output_lines(self.status)


class JobHandle:
    """A job of a running cluster, by its id. Making one asks nothing."""

    def __init__(self, remote: Remote, job: JobId) -> None:
        self.id = job
        self._remote = remote

    def status(self, *, stale: bool = False) -> JobStatus:
        """The job as it is now; `stale`: as whichever master is asked has it. Raises UnknownJob."""
        return self._remote.call(GetJob(self.id, stale), JobStatus)

    def wait(self, timeout: float | None = None) -> JobResult:
        """The result, once the job has committed. `timeout` in seconds.

        Raises TaskError if it failed, JobKilled if it was killed, TimeoutError while it still runs.
        """
        return result_of(self.ended(timeout))

    def ended(self, timeout: float | None = None, *, tidy: bool = False) -> JobStatus:
        """The status with which the job ended; `tidy`: and nothing of it is left beside the output.

        Raises TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = _WAIT_MS / 1000 if deadline is None else max(0.0, deadline - time.monotonic())
            wait_ms = min(_WAIT_MS, round(left_s * 1000))
            question = WaitJob(self.id, _NO_VERSION, wait_ms, tidy)
            status = self._remote.call(question, JobStatus, patience_ms=wait_ms)
            if status.state in ENDED and (status.tidy or not tidy):
                return status
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.id} is {status.state} after {timeout:g} s")

    def watch(self, timeout: float | None = None) -> Iterator[JobStatus]:
        """Statuses as they change, one every 0.2 s at most; the last one is the job's end.

        Raises TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        question = WaitJob(self.id, _NO_VERSION, _WAIT_MS)
        end = self._remote.start(question, JobStatus, patience_ms=_WAIT_MS)
        version = -1
        try:
            while True:
                status = wait_for(end) if end.done() else self.status()
                if status.version != version:
                    version = status.version
                    yield status
                if status.state in ENDED:
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"job {self.id} is {status.state} after {timeout:g} s")
                if end.done():
                    end = self._remote.start(question, JobStatus, patience_ms=_WAIT_MS)
                left_s = _LOOK_S if deadline is None else min(_LOOK_S, max(0.0, deadline - time.monotonic()))
                try:
                    wait_for(end, left_s)
                except TimeoutError:
                    pass
        finally:
            end.cancel()

    def kill(self, reason: str = "killed by its owner") -> JobStatus:
        """Kill the job; one that has ended, or whose commit is decided, stays as it is. Raises UnknownJob."""
        try:
            return self._remote.call(KillJob(self.id, reason), JobStatus)
        except JobEnded:
            return self.status()

    def counters(self) -> dict[str, int]:
        """What the attempts that count have counted so far."""
        return dict(self.status().counters)

    def results(self) -> Iterator[str]:
        """The output's lines without their ends. Raises SpecError while there is no output."""
        return output_lines(self.status())

    def attempts(self, task: TaskId | None = None, *, failed_only: bool = False) -> list[AttemptInfo]:
        """Attempts that run, or ended otherwise than well, and winners."""
        page = self._remote.call(GetAttempts(self.id, task, failed_only), AttemptList)
        attempts = [*page.attempts]
        while page.more:
            page = self._remote.call(GetAttempts(self.id, task, failed_only, attempts[-1].token), AttemptList)
            attempts += page.attempts
        return attempts


def result_of(status: JobStatus) -> JobResult:
    """The result of a committed job. Raises TaskError if it failed, JobKilled if it was killed."""
    if status.state is JobState.COMMITTED:
        return JobResult(status)
    error = status.error
    if status.state is JobState.KILLED:
        raise JobKilled(f"job {status.id} was killed" + (f": {error.message}" if error else ""), job=status.id)
    if error is None:
        raise TaskError(f"job {status.id} failed", job=status.id)
    where = f" in {error.attempt or error.task}" if error.attempt or error.task else ""
    raise TaskError(
        f"job {status.id} failed{where}: {error.message}",
        job=status.id,
        kind=error.kind,
        task=error.task,
        attempt=error.attempt,
        traceback=error.traceback,
    )


def output_lines(status: JobStatus) -> Iterator[str]:
    """The lines of a committed job's parts. Raises SpecError if it is not committed, CorruptData if parts are gone."""
    if status.state is not JobState.COMMITTED:
        raise SpecError(f"job {status.id} is {status.state}, it has no output")
    directory = Path(local_path(status.output))
    where = directory / SUCCESS
    try:
        manifest = decode_manifest(where.read_bytes(), where=str(where))
    except OSError as error:
        raise CorruptData(f"{where} cannot be read: {error.strerror}", url=str(where)) from error
    if manifest.job != status.id:
        raise CorruptData(f"{where} is of job {manifest.job}: the output of {status.id} was replaced", url=str(where))
    return _lines([directory / part.name for part in manifest.parts])


def _lines(files: list[Path]) -> Iterator[str]:
    for file in files:
        # Only \n ends a line of ours; what could not be decoded on the way in comes out as it was.
        with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            for line in lines:
                yield line.removesuffix("\n")
