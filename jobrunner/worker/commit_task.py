"""Steps of a job's commit, run by a slot without user code: set-up, publication, retraction, clean-up.

Each may be repeated, also beside itself, by a worker that was thought dead; what they do is the commit package's.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from jobrunner.commit.backends import PosixCommit
from jobrunner.control.messages import StepDone, TaskKind, Winners
from jobrunner.errors import CommitRefused
from jobrunner.planner.plan import JobPlan
from jobrunner.worker import wire

_PROGRESS_S = 5.0


def run_step(run: wire.Run, plan: JobPlan, progress: Callable[[], None]) -> StepDone:
    """Do one step and say how it ended. Raises StorageFailed, CorruptData, OSError: the step may be tried again."""
    start = run.start
    commit = PosixCommit(plan)
    outcome, detail = "done", ""
    with _signs_of_life(progress):
        try:
            if start.kind is TaskKind.SETUP:
                commit.set_up()
            elif start.kind is TaskKind.PUBLISH:
                commit.publish(msgspec.msgpack.decode(Path(run.answer).read_bytes(), type=Winners))
            elif start.kind is TaskKind.RETRACT:
                outcome = commit.retract()
            else:
                assert start.kind is TaskKind.CLEANUP, start.kind
                commit.clean_up()
        except CommitRefused as error:
            outcome, detail = "refused", str(error)
    return StepDone(start.attempt, start.token, outcome, detail)


@contextmanager
def _signs_of_life(progress: Callable[[], None]) -> Iterator[None]:
    """A step moves and syncs many files, or waits for a store to mend; it has its own limits and is no user's hang."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_PROGRESS_S):
            progress()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
