"""The commit, struck at each of its steps: one cluster, one small job a case, real kills and stops.

A *kill* takes the child process that does the step; a *worker kill* the agent and all that it forked, at the same
instant; a *zombie* is a worker that is stopped there as a whole until another has done its work, and then wakes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobrunner.api.handle import JobHandle
from jobrunner.control.messages import JobState, JobStatus
from jobrunner.failpoints import NAMES
from jobrunner.testing.local import LocalCluster, descendants, wait_until
from tests.crash.cluster import Text, check_alone, check_output, cluster_for, make_text
from tests.crash.faults import Faults, end_stopped, make_ready, process_state
from tests.crash.jobs import slow_reduce, wordcount

RETRACTING = [name for name in NAMES if name.startswith("commit.retract.")]
COMMITTING = [name for name in NAMES if name.startswith("commit.") and name not in RETRACTING]
IN_AGENT = "commit.sealed"  # The others are passed by child processes.
ZOMBIES = ["commit.setup.before", "commit.attempt.synced", "commit.record.temp", "commit.move.one",
           "commit.replace.moved", "commit.publish.before", "commit.cleanup.trash"]  # fmt: skip


@dataclass(frozen=True)
class Field:
    """What all cases share."""

    cluster: LocalCluster
    faults: Faults
    text: Text
    root: Path

    def new_output(self) -> Path:
        """A name in a directory of its own."""
        directory = self.root / f"case-{len(list(self.root.iterdir()))}"
        directory.mkdir()
        return directory / "out"

    def submit(self, output: Path | None = None, *, replace: bool = False) -> JobHandle:
        output = output or self.new_output()
        return self.cluster.client.submit(
            wordcount, input=[self.text.directory], output=output, reducers=3,
            if_exists="replace" if replace else "error",
        )  # fmt: skip

    def submit_armed(self, point: str, action: str) -> JobHandle:
        """A job that will pass `point`, which is armed for it."""
        replace = point == "commit.replace.moved"
        output = self.new_output()
        if replace:
            self.submit(output).ended(30, tidy=True)
        self.faults.arm(point, action)
        return self.submit(output, replace=replace)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("commit")
    faults = Faults(root / "faults")
    text = make_text(root / "in", files=2, lines=50)
    # Three, so that a case need not wait for the worker that the one before has killed.
    with cluster_for(root, workers=3, slots=1, env=faults.env) as cluster:
        yield Field(cluster, faults, text, root)


@pytest.fixture
def field(shared: Field) -> Iterator[Field]:
    shared.faults.clear()
    make_ready(shared.cluster, workers=2)
    yield shared
    shared.faults.clear()


@pytest.mark.parametrize("point", COMMITTING)
def test_a_step_whose_process_is_killed_is_done_by_another(field: Field, point: str) -> None:
    """Each step must be safe to repeat from wherever it was cut off; else a kill loses or doubles output."""
    handle = field.submit_armed(point, "kill")
    status = handle.ended(30, tidy=True)
    assert field.faults.struck(point)
    check_output(field.cluster, status, field.text)


@pytest.mark.parametrize("point", COMMITTING)
def test_a_step_whose_worker_is_killed_is_done_by_another(field: Field, point: str) -> None:
    """As above, with nobody left there to report how it ended."""
    handle = field.submit_armed(point, "pause")
    kill_worker_of(field.cluster, field.faults.wait_paused(point))
    status = handle.ended(30, tidy=True)
    check_output(field.cluster, status, field.text)


@pytest.mark.parametrize("point", ZOMBIES)
def test_a_worker_that_wakes_after_another_did_its_work_changes_nothing(field: Field, point: str) -> None:
    """A stopped machine comes back with the next rename in its hands; the output must not notice."""
    handle = field.submit_armed(point, "pause")
    slot = field.faults.wait_paused(point)
    worker = worker_of(field.cluster, slot)
    stopped = field.cluster.pause(field.cluster.workers[worker])
    status = handle.ended(30, tidy=True)
    check_output(field.cluster, status, field.text)
    before = names_and_times(Path(status.output))
    # The slot first, alone: nobody is awake to stop it, so it gets as far as it can.
    field.cluster.resume([slot])
    wait_until(lambda: process_state(slot) in ("", "S", "Z"), what="the end of the zombie's step")
    assert names_and_times(Path(status.output)) == before
    field.cluster.resume(stopped)
    wait_until(lambda: not process_state(slot), what="the end of the zombie")
    # A set-up that woke before its first mkdir has made the stage again; its agent learns that the job is over.
    wait_until(lambda: is_alone(Path(status.output)), timeout_s=10, what="the end of a stage made too late")
    assert names_and_times(Path(status.output)) == before
    check_output(field.cluster, status, field.text)


@pytest.mark.parametrize("point", RETRACTING)
@pytest.mark.parametrize("action", ["kill", "pause"])
def test_a_refused_publication_is_retracted_by_whoever_is_left(field: Field, point: str, action: str) -> None:
    """A foreign file that came to the output's name is not touched, and the job fails instead of waiting."""
    field.faults.arm(point, action)
    field.faults.arm("commit.setup.after", "pause")
    foreign = field.new_output()
    handle = field.submit(foreign)
    slot = field.faults.wait_paused("commit.setup.after")
    foreign.write_text("mine")
    end_stopped([slot])
    if action == "pause":
        kill_worker_of(field.cluster, field.faults.wait_paused(point))
    status = handle.ended(30, tidy=True)
    assert field.faults.struck(point)
    assert status.state == JobState.FAILED and status.error is not None
    assert str(foreign) in status.error.message
    assert foreign.read_text() == "mine"
    check_alone(foreign)


MASTER_POINTS = [name for name in NAMES if name.startswith("master.")]


@pytest.mark.parametrize("point", MASTER_POINTS)
def test_a_leader_that_is_killed_at_a_decision_has_taken_it(field: Field, point: str) -> None:
    """What was applied is replicated: the others go on from it, without doing anything again."""
    field.faults.arm(point, "kill")
    handle = field.submit()
    status = handle.ended(30, tidy=True)
    assert field.faults.struck(point)
    check_output(field.cluster, status, field.text)
    assert_nothing_was_lost(status)


@pytest.mark.parametrize("point", ["master.seal.applied", "master.commit.applied"])
def test_a_leader_that_is_stopped_at_a_decision_wakes_as_nobody(field: Field, point: str) -> None:
    """An old leader wakes between applying and telling: what it says then is of an epoch that is over."""
    field.faults.arm(point, "pause")
    handle = field.submit()
    leader = field.faults.wait_paused(point)
    status = handle.ended(30, tidy=True)
    check_output(field.cluster, status, field.text)
    end_stopped([leader])
    make_ready(field.cluster)
    check_output(field.cluster, handle.status(), field.text)
    assert_nothing_was_lost(status)


def test_worker_and_leader_killed_at_the_publication_leave_one_output(field: Field) -> None:
    """Both who know of it die between the rename and the report; a third worker and leader find it done."""
    handle = field.submit_armed("commit.publish.after", "pause")
    slot = field.faults.wait_paused("commit.publish.after")
    field.cluster.kill_leader()
    kill_worker_of(field.cluster, slot)
    status = handle.ended(30, tidy=True)
    check_output(field.cluster, status, field.text)


def test_a_reduce_by_hand_is_committed_like_any_other(field: Field) -> None:
    """The cases above use a vectorised reducer; the seal of a Python one goes through the same points."""
    output = field.new_output()
    field.faults.arm("commit.attempt.written", "kill")
    handle = field.cluster.client.submit(slow_reduce, input=[field.text.directory], output=output, reducers=2)
    check_output(field.cluster, handle.ended(30, tidy=True), field.text)
    assert field.faults.struck("commit.attempt.written")


# --- what is struck --------------------------------------------------------------------------------------------------


def worker_of(cluster: LocalCluster, pid: int) -> int:
    """The number of the worker that `pid` is, or is a child of."""
    for daemon in cluster.workers:
        if pid == daemon.pid or pid in descendants(daemon.pid):
            return daemon.id
    raise AssertionError(f"{pid} is of no worker")


def kill_worker_of(cluster: LocalCluster, pid: int) -> None:
    """Kill the agent that `pid` is or belongs to, and see its children go."""
    number = worker_of(cluster, pid)
    forked = descendants(cluster.workers[number].pid)
    cluster.kill_worker(number)
    wait_until(lambda: all(process_state(child) in ("", "Z") for child in forked), what="the end of what it forked")
    cluster.start_missing(wait=False)


def is_alone(output: Path) -> bool:
    return not [path for path in output.parent.iterdir() if ".jr-" in path.name]


def names_and_times(output: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.iterdir()}


def assert_nothing_was_lost(status: JobStatus) -> None:
    """No task ran twice."""
    for stage in status.stages:
        assert stage.attempts.get("started") == stage.tasks, f"{stage.name}: {stage.attempts} for {stage.tasks} tasks"
