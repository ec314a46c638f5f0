"""What a simulated slot does in an attempt of each kind, how long it takes, and how it fails.

A run's steps are events of the world, not of its agent: a slot goes on while its agent is stopped, and what it says
then waits. A killed slot does nothing more. Every failure that may be charged is told to the history first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from jobrunner.control.messages import (
    BlockOffer,
    EndCause,
    Ended,
    Failed,
    LossKind,
    MapDone,
    MapOutputs,
    OutputFile,
    Sealable,
    Start,
    StepDone,
    TaskKind,
    Winners,
)
from jobrunner.ids import AttemptId
from jobrunner.master.tasks import DIGEST_MASK
from tests.simulation.raft_world import MS

if TYPE_CHECKING:
    from tests.simulation.control_worker import SimWorker, Slot

EXITS = (EndCause.SIGNAL, EndCause.EXITED, EndCause.MEMORY)
RAISES = (EndCause.EXCEPTION, EndCause.EXCEPTION, EndCause.STORAGE)


class Run:
    """One attempt in a slot."""

    def __init__(self, worker: SimWorker, slot: Slot, start: Start, answer: msgspec.Struct | None) -> None:
        self._worker, self._slot, self._start, self._answer = worker, slot, start, answer
        self._world = worker.world
        self._life = worker.life
        self.is_step = start.kind not in (TaskKind.MAP, TaskKind.REDUCE)

    def begin(self) -> None:
        kind, attempt = self._start.kind, self._start.attempt
        if not self.is_step and self._fails():
            return
        world = self._world
        if kind is TaskKind.MAP:
            self._after(world.task_us(is_map=True), self._map)
        elif kind is TaskKind.REDUCE:
            self._after(world.task_us() // 2, lambda: self._read(0, 0))
        else:
            outputs = world.outputs
            steps: dict[TaskKind, Callable[[], str]] = {
                TaskKind.SETUP: lambda: outputs.set_up(attempt.job),
                TaskKind.PUBLISH: self._publish,
                TaskKind.RETRACT: lambda: outputs.retract(attempt.job),
                TaskKind.CLEANUP: lambda: outputs.clean_up(attempt.job),
            }
            self._after(world.step_us(), lambda: self._step(steps[kind]))

    def _after(self, delay_us: int, event: Callable[[], None]) -> None:
        """The slot's next step."""

        def run() -> None:
            if self._slot.alive and self._slot.run is self:
                event()

        self._world.at(delay_us, run)

    def _say(self, event: Callable[[], None]) -> None:
        """Tell the agent, if it is the one that started this slot."""
        worker = self._worker
        if worker.running and worker.life == self._life:
            worker.later(self._world.rng.randint(10, MS), event)

    def _ended(self, report: Ended) -> None:
        self._slot.run = None
        self._say(lambda: self._worker.perform(self._worker.core.ended(report)))

    # --- failures ----------------------------------------------------------------------------------------------------

    def _fails(self) -> bool:
        """Whether it is to fail by its own fault, and how."""
        world, rng = self._world, self._world.rng
        if rng.random() >= world.faults.failures:
            return False
        fate = rng.random()
        if fate < 0.1:
            self._charge(EndCause.TIMEOUT)  # It hangs; the agent will notice.
        elif fate < 0.2:
            self._after(world.task_us(), lambda: self._raise(rng.choice((EndCause.FATAL, EndCause.INPUT_CHANGED))))
        elif fate < 0.6:
            cause = rng.choice(EXITS)
            self._after(world.task_us(), lambda: self._exit(cause))
        else:
            self._after(world.task_us(), lambda: self._raise(rng.choice(RAISES)))
        return True

    def _charge(self, cause: EndCause) -> None:
        self._world.control.injected(self._start.attempt, self._start.token, cause)

    def _raise(self, cause: EndCause) -> None:
        self._charge(cause)
        self._ended(Failed(self._start.attempt, self._start.token, cause, "it failed"))

    def _exit(self, cause: EndCause) -> None:
        self._charge(cause)
        self._slot.run = None
        self._say(lambda: self._worker.slot_exits(self._slot.number, cause))

    # --- user kinds --------------------------------------------------------------------------------------------------

    def _map(self) -> None:
        start, world = self._start, self._world
        if world.job(start.attempt.job).map_only:
            self._seal(0)
            return
        digest = world.job(start.attempt.job).digest(start.attempt.partition, start.token, world.rng)
        self._worker.blocks[start.token] = BlockOffer(start.attempt, start.token, digest, 1, 10)
        self._ended(MapDone(start.attempt, start.token, digest, 1, 10, {"maps": 1}))

    def _read(self, partition: int, consumed: int) -> None:
        """Fetch one map output after the other."""
        outputs = self._answer
        assert isinstance(outputs, MapOutputs)
        if partition == len(outputs.owner):
            self._say(lambda: self._worker.fetched(self._start.token))
            self._after(self._world.task_us() // 2, lambda: self._seal(consumed))
            return
        owner = outputs.owners[outputs.owner[partition]]
        source = self._world.workers[owner.directory]
        attempt = AttemptId(self._start.attempt.job, self._start.map_stage, partition, outputs.attempt[partition])
        if not self._world.reaches(self._worker, source):
            self._after(30 * MS, lambda: self._lost(attempt, LossKind.UNREACHABLE))
            return
        block = next((each for token, each in source.blocks.items() if token == outputs.token[partition]), None)
        if block is None:
            self._lost(attempt, LossKind.MISSING)
        elif self._world.rng.random() < self._world.faults.corruption:
            self._lost(attempt, LossKind.CORRUPT)
        else:
            assert block.attempt == attempt, (block, attempt)
            total = (consumed + block.digest) & DIGEST_MASK
            self._after(self._world.rng.randint(100, 2 * MS), lambda: self._read(partition + 1, total))

    def _lost(self, attempt: AttemptId, kind: LossKind) -> None:
        self._slot.run = None
        if kind is LossKind.CORRUPT:
            self._world.control.damaged(attempt)
        self._say(lambda: self._worker.cannot_read(self._start, [attempt], kind))

    def _seal(self, consumed: int) -> None:
        start = self._start
        if not self._world.outputs.stage(start.attempt.job, start.attempt.partition, start.token):
            self._world.control.no_stage(start.attempt)
            self._raise(EndCause.STORAGE)
            return
        files = [OutputFile("main", f"part-{start.attempt.partition}", consumed % 97, start.token, "crc32:0")]
        self._ended(Sealable(start.attempt, start.token, files, consumed, {"parts": 1}))

    # --- steps of the commit -----------------------------------------------------------------------------------------

    def _publish(self) -> str:
        if self._world.rng.random() < self._world.faults.refusals:
            self._world.mark("publication refused")
            return "refused"
        assert isinstance(self._answer, Winners)
        return self._world.outputs.publish(self._start.attempt.job, self._answer)

    def _step(self, step: Callable[[], str]) -> None:
        world, start = self._world, self._start
        outcome = step()
        if not (self._worker.running and self._worker.life == self._life):
            world.mark("step of a dead worker")
        world.note(f"{self._worker.name}: {start.attempt}: {outcome}")
        self._after(world.rng.randint(0, 5 * MS), lambda: self._ended(StepDone(start.attempt, start.token, outcome)))
