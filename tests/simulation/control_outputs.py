"""The file system that all workers share: what of each job is staged, what is published, what can no longer be.

Steps are atomic here (their own crash points are tested on the real ones): what matters is who runs them, and when.
"""

from collections.abc import Callable

from jobrunner.commit.steps import State
from jobrunner.control.messages import Winners
from jobrunner.ids import JobId
from tests.simulation.raft_history import Broken

Parts = tuple[tuple[int, int], ...]  # (partition, token) of each winner.


class Outputs:
    """`decided` says where a job's commit is, by the newest entry that any master has applied."""

    def __init__(self, decided: Callable[[JobId], State | None]) -> None:
        self._decided = decided
        self._stages: set[JobId] = set()
        self._gone: set[JobId] = set()  # Stages that were moved to the trash; they never come back.
        self._staged: set[tuple[JobId, int, int]] = set()
        self.published: dict[JobId, Parts] = {}

    def set_up(self, job: JobId) -> str:
        if job in self._gone:
            return "refused"
        self._stages.add(job)
        return "done"

    def stage(self, job: JobId, partition: int, token: int) -> bool:
        """An attempt closes its files; False if there is no stage (any more)."""
        if job not in self._stages:
            return False
        if (job, partition, token) in self._staged:
            raise Broken(f"{job}: partition {partition} is staged twice under token {token}")
        self._staged.add((job, partition, token))
        return True

    def delete(self, job: JobId, partition: int, token: int) -> None:
        self._staged.discard((job, partition, token))

    def publish(self, job: JobId, winners: Winners) -> str:
        parts = tuple((winner.partition, int(winner.token)) for winner in winners.winners)
        if job in self.published:
            if parts != self.published[job]:
                raise Broken(f"{job}: {parts} is published over {self.published[job]}")
            return "done"
        if job not in self._stages:
            return "refused"
        if self._decided(job) not in (State.COMMITTING, State.RETRACTING):
            raise Broken(f"{job}: published while {self._decided(job)}")
        missing = [part for part in parts if (job, *part) not in self._staged]
        if missing:
            raise Broken(f"{job}: the files of winners (partition, token) {missing} are gone")
        self.published[job] = parts
        return "done"

    def retract(self, job: JobId) -> str:
        self.clean_up(job)
        return "published" if job in self.published else "withdrawn"

    def clean_up(self, job: JobId) -> str:
        self._gone.add(job)
        self._stages.discard(job)
        return "done"
