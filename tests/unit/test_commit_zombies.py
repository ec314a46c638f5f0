"""Processes stopped before each operation, and woken when the job has long ended and another has the output."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commit_actors import Actor, SteppedDisk
from commit_fixtures import beside, contents, make_commit, prepare, run_job

from jobrunner.commit.backends import PosixCommit
from jobrunner.control.messages import Winners
from jobrunner.errors import CommitRefused, CorruptData, StageGone


@pytest.fixture
def output() -> Iterator[Path]:
    """In memory, if there is such a place: thousands of operations, and no power to cut."""
    memory = "/dev/shm"
    directory = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
    yield Path(directory) / "out"
    shutil.rmtree(directory)


def replacing(output: Path, number: int, disk: SteppedDisk | None = None) -> PosixCommit:
    return make_commit(output, number, if_exists="replace", disk=disk)


def publisher(output: Path, winners: Winners) -> Actor:
    return Actor("publisher", lambda disk: replacing(output, 2, disk).publish(winners))


def operations(output: Path, start: Callable[[], Actor]) -> int:
    """How many operations an undisturbed actor does; afterwards all is as before."""
    saved = output.parent.with_name(output.parent.name + "-saved")
    shutil.copytree(output.parent, saved)
    actor, count = start(), 0
    while not actor.is_done:
        actor.step()
        count += 1
    assert actor.error is None, actor.error
    shutil.rmtree(output.parent)
    os.rename(saved, output.parent)
    return count


@pytest.mark.parametrize("before", ["an old output", "nothing", "an empty directory", "an old output, deleted by hand"])
@pytest.mark.parametrize("wakes", ["before clean-up", "after clean-up", "after the next job"])
def test_a_publisher_that_wakes_late_changes_nothing(output: Path, before: str, wakes: str) -> None:
    """The next job's output would vanish, or become that of the last."""
    index, total = 0, 0
    old: dict[str, str] = {}
    while index <= total:
        if before.startswith("an old output"):
            run_job(replacing(output, 1))
            old = contents(output)
        elif before == "an empty directory":
            output.mkdir()
        winners = prepare(replacing(output, 2))
        total = total or operations(output, lambda winners=winners: publisher(output, winners))  # type: ignore[misc]
        zombie = publisher(output, winners)
        for _ in range(index):
            zombie.step()
        if before.endswith("by hand") and output.exists() and contents(output) == old:
            shutil.rmtree(output)
        replacing(output, 2).publish(winners)
        if wakes != "before clean-up":
            replacing(output, 2).clean_up()
        if wakes == "after the next job":
            run_job(replacing(output, 3), 1)
        expected = contents(output)
        zombie.finish()
        assert contents(output) == expected, zombie.next_call
        replacing(output, 2).clean_up()
        assert beside(output) == []
        assert zombie.error is None or isinstance(zombie.error, CommitRefused | CorruptData)
        shutil.rmtree(output)
        index += 1
    assert total > 15


@pytest.mark.parametrize("paused_at", ["rename {output} ", "rename .* {output}$"], ids=["making way", "publishing"])
def test_a_publisher_and_a_set_up_that_wake_together_change_nothing(output: Path, paused_at: str) -> None:
    """The set-up makes the stage again: a publisher must not take that for the one it knew."""
    index, ran_out = 0, False
    while not ran_out:
        run_job(replacing(output, 1))
        setup = Actor("set-up", lambda disk: replacing(output, 2, disk).set_up())
        for _ in range(index):
            setup.step()
        ran_out = setup.is_done
        winners = prepare(replacing(output, 2))
        zombie = publisher(output, winners)
        while not re.match(paused_at.format(output=output), zombie.next_call):
            zombie.step()
        replacing(output, 2).publish(winners)
        replacing(output, 2).clean_up()
        run_job(replacing(output, 3), 1)
        expected = contents(output)
        setup.finish()
        zombie.finish()
        assert contents(output) == expected, index
        replacing(output, 2).clean_up()
        assert beside(output) == []
        shutil.rmtree(output)
        index += 1
    assert index > 15


@pytest.mark.parametrize("step", ["clean_up", "retract", "discard_attempt"])
def test_every_other_step_that_wakes_after_the_next_job_changes_nothing(output: Path, step: str) -> None:
    """Cleaners and retractors are processes too."""
    bodies: dict[str, Callable[[PosixCommit], object]] = {
        "clean_up": lambda commit: commit.clean_up(),
        "retract": lambda commit: commit.retract(),
        "discard_attempt": lambda commit: commit.discard_attempt(5, 0, 5),
    }
    index, zombie_ran_out = 0, False
    while not zombie_ran_out:
        commit = replacing(output, 2)
        winners = prepare(commit)
        if step != "retract":
            commit.publish(winners)
        zombie = Actor(step, lambda disk: bodies[step](replacing(output, 2, disk)))
        for _ in range(index):
            zombie.step()
        zombie_ran_out = zombie.is_done
        if step == "retract":
            assert replacing(output, 2).retract() == "withdrawn"
        replacing(output, 2).clean_up()
        run_job(replacing(output, 3), 1)
        expected = contents(output)
        zombie.finish()
        assert contents(output) == expected and beside(output) == []
        shutil.rmtree(output)
        index += 1


def test_a_set_up_whose_job_is_cleaned_up_meanwhile_gives_up(output: Path) -> None:
    """Tried again, it would make the stage anew, and nobody would clean up a second time."""
    index, ran_out = 0, False
    while not ran_out:
        setup = Actor("set-up", lambda disk: replacing(output, 2, disk).set_up())
        while not setup.next_call.startswith("mkdir"):
            setup.step()
        for _ in range(index + 1):
            setup.step()
        ran_out = setup.is_done
        replacing(output, 2).clean_up()
        setup.finish()
        assert beside(output) == []
        assert setup.error is None if ran_out else isinstance(setup.error, StageGone | None), setup.error
        index += 1
    assert index > 10


def test_parallel_publishers_stopped_at_any_operation_tolerate_each_other(output: Path) -> None:
    """The leader may have lost one's answer and assigned the step again: both must find it done."""
    index, ran_out = 0, False
    while not ran_out:
        run_job(replacing(output, 1))
        winners = prepare(replacing(output, 2))
        first = publisher(output, winners)
        for _ in range(index):
            first.step()
        ran_out = first.is_done
        second = publisher(output, winners)
        while not (first.is_done and second.is_done):
            second.step()
            first.step()
        assert first.error is None and second.error is None, (first.error, second.error)
        replacing(output, 2).clean_up()
        assert set(contents(output)) == {"_SUCCESS", "part-00000.txt", "part-00001.txt"} and beside(output) == []
        shutil.rmtree(output)
        index += 1
