"""One class a kind of store: set up, stage, publish, retract, clean. All steps may be repeated by anybody, any time.

PosixCommit is for file systems with atomic renames of directories: local ones, and NFS. Runs in worker processes;
the masters only say which step is due.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from jobrunner.commit import stage
from jobrunner.commit.attempt import AttemptOutput, open_attempt
from jobrunner.commit.disk import Disk, Patience, PosixDisk
from jobrunner.commit.manifest import CommitRecord, IfExists, InputLike, make_record
from jobrunner.commit.names import stage_names
from jobrunner.commit.publish import Publisher, retract
from jobrunner.control.messages import Winners
from jobrunner.ids import JobId


class OutputLike(Protocol):
    @property
    def url(self) -> str: ...
    @property
    def if_exists(self) -> IfExists: ...


class PlanLike(Protocol):
    """What a commit needs of a JobPlan; planning is not this package's business."""

    @property
    def job(self) -> JobId: ...
    @property
    def output(self) -> OutputLike: ...
    @property
    def inputs(self) -> Sequence[InputLike]: ...
    @property
    def publish_tries_max(self) -> int: ...
    @property
    def retry_ms(self) -> int: ...


class PosixCommit:
    """The steps of one job's commit. Holds no state: two of them, on two hosts, are as good as one."""

    def __init__(
        self, plan: PlanLike, *, disk: Disk | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.names = stage_names(plan.output.url, plan.job)
        self._plan = plan
        self._disk = disk or PosixDisk()
        self._patience = Patience(plan.publish_tries_max, plan.retry_ms, sleep)

    def set_up(self) -> None:
        """Make the stage (and what is missing above the output). Raises CommitRefused if that cannot be.

        If the masters then answer that the job is over, run `clean_up`.
        """
        self._patience.run(lambda: stage.set_up(self.names, self._disk), what="set up", url=self.names.output)

    def open_attempt(self, partition: int, attempt: int, token: int) -> AttemptOutput:
        """A place for one attempt's files. Raises Refused if it has run before, StageGone if the job is over."""
        return open_attempt(self.names, self._disk, partition=partition, attempt=attempt, token=token)

    def discard_attempt(self, partition: int, attempt: int, token: int) -> None:
        """Delete what an attempt left that has lost or died. Never for a winner. Fine if nothing is there."""
        path = self.names.attempt(partition=partition, attempt=attempt, token=token)
        self._disk.remove_tree(path)

    def publish(self, winners: Winners) -> None:
        """Bring the winners to the output's name. On return a reader finds them all, and a power cut changes nothing.

        Call only after CommitJob is applied. A job of no winners at all gives an output of _SUCCESS alone.
        Raises CommitRefused for a definite no, and for one that publish_tries_max tries did not mend;
        CorruptData if a winner's file is in neither place or has another size.
        """
        self.publish_record(
            make_record(
                self._plan.job,
                output=self._plan.output.url,
                if_exists=self._plan.output.if_exists,
                winners=winners.winners,
                counters=winners.counters,
                inputs=self._plan.inputs,
            )
        )

    def publish_record(self, record: CommitRecord) -> None:
        publish_record(record, self._disk, self._patience)

    def retract(self) -> Literal["withdrawn", "published"]:
        """After a refused publication: make it impossible, put a replaced output back, say which it was.

        Raises StorageFailed if neither can be said now.
        """
        published = self._patience.insist(
            lambda: retract(self.names, self._disk), what="retract", url=self.names.output
        )
        return "published" if published else "withdrawn"

    def clean_up(self) -> None:
        """Delete all that is the job's beside its output. Raises StorageFailed if something stays."""
        self._patience.insist(
            lambda: stage.clean_up(self.names, self._disk), what="clean up after", url=self.names.output
        )


def publish_record(record: CommitRecord, disk: Disk, patience: Patience) -> None:
    """As PosixCommit.publish, from the record alone."""
    publisher = Publisher(stage_names(record.output, record.job), record, disk)
    patience.run(publisher.publish, what="publish", url=record.output)
