"""A slot: the child process that runs one job's attempts, one after another.

It does what a Run says and answers with how it ended; it holds no session and asks no master. It may be killed at any
instruction, and may wake up after its attempt was given to another: whatever it writes carries its token, and counts
only if a master says so. One thread.
"""

import random
import socket
import sys
import zlib
from dataclasses import dataclass
from typing import Any

from jobrunner.control.messages import Ended, Failed, TaskKind
from jobrunner.ids import TaskId
from jobrunner.planner.code import StepCode, open_code
from jobrunner.planner.plan import JobPlan, decode_plan
from jobrunner.shuffle.fetch import LostOutput
from jobrunner.worker import wire
from jobrunner.worker.commit_task import run_step
from jobrunner.worker.map_task import run_map
from jobrunner.worker.reduce_task import run_reduce
from jobrunner.worker.user_code import explain


@dataclass(frozen=True, slots=True)
class JobCode:
    """A job as a slot holds it: its plan, and its functions once the user's modules are imported."""

    plan: JobPlan
    steps: list[StepCode]

    def step_of(self, stage: str) -> StepCode:
        """The functions of the step that a stage belongs to."""
        position = next(index for index, spec in enumerate(self.plan.stages) if spec.name == stage)
        maps = sum(spec.kind is TaskKind.MAP for spec in self.plan.stages[: position + 1])
        return self.steps[maps - 1]


def load_code(code_file: str, plan_file: str) -> JobCode:
    """Import the user's modules. Raises what they raise."""
    with open(code_file, "rb") as file:
        bundle = open_code(file.read())
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.python != here:
        raise RuntimeError(f"the job was packed with Python {bundle.python}, this worker runs {here}")
    sys.path[:0] = [path for path in bundle.sys_path if path not in sys.path]
    return JobCode(load_plan(plan_file), bundle.load())


def load_plan(plan_file: str) -> JobPlan:
    with open(plan_file, "rb") as file:
        return decode_plan(file.read())


class Slot:
    """`code` None: import `code_file` at the first attempt; with no file either, only steps of the commit run here."""

    def __init__(self, sock: socket.socket, *, code: JobCode | None, code_file: str, plan_file: str) -> None:
        self._pipe: wire.Pipe[wire.Run] = wire.Pipe(sock, wire.Run)
        self._code = code
        self._files = (code_file, plan_file)

    def serve(self) -> None:
        """Run attempts until the agent closes its end."""
        while (run := self._pipe.receive_one()) is not None:
            answer: wire.Said
            try:
                answer = wire.Finished(self._attempt(run))
            except LostOutput as error:
                answer = wire.LostInput(run.start.token, list(error.lost), error.kind, str(error))
            except BaseException as error:
                answer = wire.Finished(_failed(run, error))
            sys.stdout.flush()
            sys.stderr.flush()
            self._pipe.send(answer)

    def _attempt(self, run: wire.Run) -> Ended:
        start = run.start
        seed(start.attempt.task)

        def progress() -> None:
            self._pipe.send(wire.Progress(start.token))

        if start.kind not in (TaskKind.MAP, TaskKind.REDUCE):
            return run_step(run, load_plan(run.plan), progress)
        if self._code is None:
            self._code = load_code(*self._files)
        plan, step = self._code.plan, self._code.step_of(start.attempt.stage)
        if start.kind is TaskKind.MAP:
            return run_map(run, plan, step, progress)
        return run_reduce(run, plan, step, progress, lambda: self._pipe.send(wire.Fetched(start.token)))


def _failed(run: wire.Run, error: BaseException) -> Failed:
    failure = explain(error)
    start = run.start
    return Failed(
        start.attempt, start.token, failure.cause, failure.message, traceback=failure.traceback, place=failure.place
    )


def seed(task: TaskId) -> None:
    """Make chance a function of the task, so that a re-run is the same run."""
    number = zlib.crc32(str(task).encode())
    random.seed(number)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)
