"""A simulated client: submits jobs under ids of its own, asks again when it must, kills some, waits for all.

It remembers what it was told: a job that was acknowledged is there for ever, an end that was told never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from jobrunner.control.messages import (
    GetJob,
    HaveBlobs,
    JobStatus,
    KillJob,
    LeaderIs,
    PutBlob,
    StageSpec,
    SubmitJob,
    TaskKind,
)
from jobrunner.errors import JobrunnerError, OutputBusy, Refused
from jobrunner.ids import JobId, StageName
from jobrunner.planner.plan import blob_hash
from tests.simulation.control_network import Actor, Caller
from tests.simulation.raft_world import MS

if TYPE_CHECKING:
    from tests.simulation.control_world import ControlWorld

MAP, REDUCE = StageName("map"), StageName("reduce")
CODE = b"code of all jobs"


@dataclass(frozen=True)
class SimJob:
    """What is asked. A fickle job's maps make now this, now that."""

    id: JobId
    output: str
    maps: int
    reduces: int
    fickle: bool
    faults_max: int

    @property
    def map_only(self) -> bool:
        return not self.reduces

    @property
    def plan(self) -> bytes:
        return b"plan of " + self.id.encode()

    def digest(self, partition: int, token: int, rng: Random) -> int:
        """Of one map's output: a function of the input, as it should be, or not."""
        digest = crc32(f"{self.id}/{partition}".encode()) << 20
        return digest + (rng.randint(0, 2) if self.fickle else 0)

    def submit(self) -> SubmitJob:
        stages = [StageSpec(MAP, TaskKind.MAP, self.maps, final=self.map_only)]
        if self.reduces:
            stages.append(StageSpec(REDUCE, TaskKind.REDUCE, self.reduces, final=True, reads=MAP))
        return SubmitJob(
            self.id, "sim", self.output, blob_hash(self.plan), blob_hash(CODE), stages, self.faults_max, 1,
            attempts_kept_max=self.maps + 4,
        )  # fmt: skip


class SimClient(Actor):
    def __init__(self, world: ControlWorld, name: str) -> None:
        super().__init__(world, name)
        self.jobs: list[SimJob] = []
        self.acknowledged: set[JobId] = set()
        self.tidy: set[JobId] = set()
        self.begin()
        self.caller = Caller(self)

    def pushed(self, message: msgspec.Struct) -> None:
        if isinstance(message, LeaderIs):
            self.caller.leader_is(message.epoch, message.address)

    def submit(self, job: SimJob) -> None:
        self.jobs.append(job)
        self.world.note(f"{self.name} submits {job}")
        self._put(job)

    def _ask(
        self, message: msgspec.Struct, then: Callable[[msgspec.Struct], None], refused: Callable[[JobrunnerError], None]
    ) -> None:
        self.caller.ask(message, then, refused)

    def _put(self, job: SimJob) -> None:
        """Blobs in two pieces each, then the job; from the start again if a blob is not there by then."""
        pieces: list[msgspec.Struct] = [HaveBlobs([blob_hash(CODE), blob_hash(job.plan)])]
        for data in (CODE, job.plan):
            cut = len(data) // 2
            pieces += [
                PutBlob(blob_hash(data), 0, len(data), data[:cut]),
                PutBlob(blob_hash(data), cut, len(data), data[cut:]),
            ]
        self._send(job, pieces)

    def _send(self, job: SimJob, pieces: list[msgspec.Struct]) -> None:
        if not pieces:
            self._ask(job.submit(), lambda answer: self._accepted(job), lambda error: self._not_accepted(job, error))
            return
        self._ask(pieces[0], lambda answer: self._send(job, pieces[1:]), lambda error: self._put_later(job))

    def _put_later(self, job: SimJob) -> None:
        self.later(50 * MS, lambda: self._put(job))

    def _accepted(self, job: SimJob) -> None:
        self.acknowledged.add(job.id)
        self.world.control.acknowledged(job.id)
        self._watch(job)

    def _not_accepted(self, job: SimJob, error: JobrunnerError) -> None:
        if isinstance(error, OutputBusy):
            self.world.mark("output busy")
        assert isinstance(error, Refused), error
        self._put_later(job)

    def kill(self, job: SimJob) -> None:
        """Ask; "too late" is an answer like any other."""
        self.world.note(f"{self.name} kills {job.id}")
        self._ask(KillJob(job.id, "enough"), lambda answer: self._learned(job, answer), lambda error: None)

    def _watch(self, job: SimJob) -> None:
        self._ask(GetJob(job.id), lambda answer: self._learned(job, answer), lambda error: self._unknown(job, error))

    def _unknown(self, job: SimJob, error: JobrunnerError) -> None:
        raise AssertionError(f"{job.id} was acknowledged, and now: {error}")

    def _learned(self, job: SimJob, answer: msgspec.Struct) -> None:
        assert isinstance(answer, JobStatus)
        self.world.control.shown(answer)
        if answer.tidy:
            self.tidy.add(job.id)
        else:
            self.later(100 * MS, lambda: self._watch(job))
