"""Names of jobs, tasks and attempts, and the numbers that order them.

A job id is `j-` and 26 characters (a 128-bit number in Crockford's base 32, so that ids made by `new_job_id`
sort by time). A task is `JOB/STAGE/17`, an attempt `JOB/STAGE/17/2`.
"""

from typing import NewType

import msgspec

JobId = NewType("JobId", str)
StageName = NewType("StageName", str)
MemberId = NewType("MemberId", str)  # Uuid (32 hex digits) of a master's data directory; never used again.
DirectoryId = NewType("DirectoryId", str)  # Uuid (32 hex digits) of a worker's data directory.
SessionId = NewType("SessionId", int)  # A worker's registration; from the token counter, so it rises for ever.
ClientId = NewType("ClientId", int)  # A client's session for locks and small values; from the token counter.
Token = NewType("Token", int)  # Rises for ever; one per assignment; in every name the attempt writes.
Epoch = NewType("Epoch", int)  # One per leadership; rises for ever.
Hash = NewType("Hash", str)  # sha256 of a blob, 64 hex digits.

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"


class TaskId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One partition's work in one stage of one job."""

    job: JobId
    stage: StageName
    partition: int

    def __str__(self) -> str:
        return f"{self.job}/{self.stage}/{self.partition}"


class AttemptId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One try of a task; `attempt` counts from 0."""

    job: JobId
    stage: StageName
    partition: int
    attempt: int

    @property
    def task(self) -> TaskId:
        return TaskId(self.job, self.stage, self.partition)

    def __str__(self) -> str:
        return f"{self.job}/{self.stage}/{self.partition}/{self.attempt}"


def job_id_from_number(number: int) -> JobId:
    """The job id of a 128-bit number."""
    if not 0 <= number < 1 << 128:
        raise ValueError(f"not a 128-bit number: {number}")
    return JobId("j-" + "".join(_DIGITS[(number >> shift) & 31] for shift in range(125, -1, -5)))


def new_job_id(now_ms: int, chance: int) -> JobId:
    """A job id that sorts by `now_ms` (unix milliseconds); `chance` is 80 random bits."""
    return job_id_from_number(((now_ms & ((1 << 48) - 1)) << 80) | (chance & ((1 << 80) - 1)))


def parse_job_id(text: str) -> JobId:
    """A job id from `j-...`, or from a uuid in any usual spelling. Raises ValueError."""
    if text.startswith("j-"):
        body = text[2:].lower()
        if len(body) == 26 and all(digit in _DIGITS for digit in body) and body[0] in "01234567":
            return JobId("j-" + body)
        raise ValueError(f"not a job id: {text!r} (expected j- and 26 characters)")
    digits = text.replace("-", "").lower()
    if len(digits) == 32 and all(digit in "0123456789abcdef" for digit in digits):
        return job_id_from_number(int(digits, 16))
    raise ValueError(f"not a job id: {text!r} (expected j-... or a uuid)")


def parse_path(text: str) -> JobId | TaskId | AttemptId:
    """A job, task (`JOB/STAGE/17`) or attempt (`JOB/STAGE/17/2`) from its text. Raises ValueError."""
    parts = text.split("/")
    job = parse_job_id(parts[0])
    if len(parts) == 1:
        return job
    if len(parts) in (3, 4) and all(part.isdigit() for part in parts[2:]):
        task = TaskId(job, StageName(parts[1]), int(parts[2]))
        return task if len(parts) == 3 else AttemptId(job, task.stage, task.partition, int(parts[3]))
    raise ValueError(f"not a job, task or attempt: {text!r} (expected JOB, JOB/STAGE/17 or JOB/STAGE/17/2)")
