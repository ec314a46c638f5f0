"""The error tree, sorted by who can mend it.

    JobrunnerError
      SpecError       the user's words: a key, a path, an option          exit 2
      TaskError       the user's code failed; the job failed              exit 1
        Fatal         raised by user code: fail the job, no retries
      JobKilled       somebody killed the job                             exit 4
      Refused         a rule says no; asking again will not help          exit 2
        NotLeader, SessionEnded, UnknownJob, OutputBusy, JobEnded, Denied, CommitRefused, LockBusy, Compacted
        LockLost      the lock is no longer this program's: stop           exit 3
          LockInDoubt   it may be, the masters do not say so: stop
      Unavailable     time may mend it; the only kind that is retried     exit 3
        Unknown       the request may or may not have been carried out
      CorruptData     the operator: what was stored is not what is read   exit 5
      StorageFailed   the operator: a disk failed or is full              exit 6
        StageGone     the job is over, or this host does not see its output's file system
      LogTooNew       the operator: written by a newer version            exit 7

Errors carry fields. Those that cross processes are sent as (class name, fields) and raised again there.
"""

from typing import Any, ClassVar


class JobrunnerError(Exception):
    """The root; `exit_status` is the command line's."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return self.message


class SpecError(JobrunnerError):
    """The user's words are wrong; one line says which key, what was found and what is allowed."""

    exit_status = 2


class TaskError(JobrunnerError):
    """The job failed. Fields of a failed job, where known: task, attempt, kind, traceback."""

    exit_status = 1


class Fatal(TaskError):
    """Raise it in a map or reduce function to fail the job at once, without retries."""


class JobKilled(JobrunnerError):
    exit_status = 4


class Refused(JobrunnerError):
    exit_status = 2


class NotLeader(Refused):
    """Definitely not carried out here. Field `leader`: address of the leader, if known, else ""."""


class SessionEnded(Refused):
    """The worker's session is over: kill the slots, register again, offer the blocks."""


class UnknownJob(Refused):
    """Field `job`."""


class OutputBusy(Refused):
    """A live job writes there. Fields `url`, `job`."""


class JobEnded(Refused):
    """The job has ended, so it takes no more of that. Fields `job`, `state`."""


class CommitRefused(Refused):
    """The output cannot be written: a foreign one is there, no permission, a disk that stays full. Field `url`."""


class LockBusy(Refused):
    """Somebody else holds the lock, and the time to wait is over. Fields `name`, `owner`."""


class LockLost(Refused):
    """The lock is no longer held: whatever it protects must not be touched any more. Field `name`."""

    exit_status = 3


class LockInDoubt(LockLost):
    """No master confirmed the lease in time. It may still be ours, and may come back; nothing may be relied on."""


class Compacted(Refused):
    """The changes asked for are no longer kept: read everything anew. Field `compacted`: the last revision dropped."""


class Denied(Refused):
    """Wrong token, cluster or protocol version."""


class Unavailable(JobrunnerError):
    exit_status = 3


class Unknown(Unavailable):
    """The outcome cannot be known: it may have been carried out. Asking again under the same id is safe."""


class CorruptData(JobrunnerError):
    exit_status = 5


class StorageFailed(JobrunnerError):
    exit_status = 6


class StageGone(StorageFailed):
    """No stage directory: the job is over, or this host does not see the output's file system. Field `url`."""


class LogTooNew(JobrunnerError):
    exit_status = 7


INTERRUPTED = 130  # Exit status after Ctrl-C.

_BY_NAME: dict[str, type[JobrunnerError]] = {
    kind.__name__: kind
    for kind in (
        JobrunnerError, SpecError, TaskError, Fatal, JobKilled, Refused, NotLeader, SessionEnded, UnknownJob,
        OutputBusy, JobEnded, CommitRefused, LockBusy, LockLost, LockInDoubt, Compacted, Denied, Unavailable, Unknown,
        CorruptData, StorageFailed, StageGone, LogTooNew,
    )
}  # fmt: skip


def error_from_wire(name: str, message: str, fields: dict[str, Any]) -> JobrunnerError:
    """The error that another process raised; an unknown class becomes its nearest safe reading, Unavailable."""
    return _BY_NAME.get(name, Unavailable)(message, **fields)
