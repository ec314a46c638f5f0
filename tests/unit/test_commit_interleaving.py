"""A model of all that may touch one output at once: publishers, retractors, cleaners and set-ups of one job and the
next, stepped, stopped and killed operation by operation in an order that hypothesis draws, and judged by a reader.

The table of steps.py says what is due, as in the masters, and gets every report, however late.
"""

import errno
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from commit_actors import Actor, SteppedDisk
from commit_fixtures import contents, make_commit, prepare, run_job
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobrunner.commit.backends import PosixCommit
from jobrunner.commit.manifest import IfExists
from jobrunner.commit.steps import Event, State, is_ended, is_tidy, next_state, step_due
from jobrunner.control.messages import TaskKind, Winners
from jobrunner.errors import CommitRefused, CorruptData

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FOREIGN = {"foreign": "mine"}
ACTORS_MAX = 8  # Alive at once.
EXAMPLES = int(os.environ.get("COMMIT_EXAMPLES", "30"))

Seen = dict[str, str] | None


@cache
def output_of(number: int) -> dict[str, str]:
    """What job `number` writes when it is alone."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        run_job(make_commit(Path(directory) / "out", number))
        return contents(Path(directory) / "out")


class Disk(SteppedDisk):
    """The output's name may be refused for a while: a read-only remount, say."""

    def __init__(self, actor: Actor, world: "World") -> None:
        super().__init__(actor)
        self._world = world

    def rename(self, source: str, target: str) -> None:
        self._actor.pass_gate(f"rename {source} {target}")
        if self._world.is_broken and target == str(self._world.output):
            raise OSError(errno.EROFS, "")
        os.rename(source, target)


class Job:
    """One job, as the masters see it, with the processes that work for it."""

    def __init__(self, world: "World", number: int, if_exists: IfExists) -> None:
        self.world = world
        self.number = number
        self.if_exists = if_exists
        self.state = State.QUEUED
        self.actors: list[tuple[TaskKind, Actor]] = []
        self.winners = Winners([], {})

    def commit(self, disk: SteppedDisk | None = None) -> PosixCommit:
        return make_commit(self.world.output, self.number, if_exists=self.if_exists, disk=disk)

    def run_attempts(self) -> None:
        self.winners = prepare(self.commit())
        for event in (Event.SET_UP, Event.COMMIT):
            self.state = next_state(self.state, event)

    def start(self, kind: TaskKind) -> None:
        bodies = {
            TaskKind.SETUP: lambda commit: commit.set_up(),
            TaskKind.PUBLISH: lambda commit: commit.publish(self.winners),
            TaskKind.RETRACT: lambda commit: commit.retract(),
            TaskKind.CLEANUP: lambda commit: commit.clean_up(),
        }
        body = bodies[kind]
        actor = Actor(f"{kind} of {self.number}", lambda disk: body(self.commit(Disk(disk._actor, self.world))))
        self.actors.append((kind, actor))

    def collect(self) -> None:
        """Reports of actors that have ended, in the order in which they were started."""
        for kind, actor in [found for found in self.actors if found[1].is_done]:
            self.actors.remove((kind, actor))
            event = self._event(kind, actor)
            if event is not None:
                self.state = next_state(self.state, event)
            if kind is TaskKind.SETUP and is_ended(self.state):
                self.commit().clean_up()  # What an agent does that is told: gone.

    def _event(self, kind: TaskKind, actor: Actor) -> Event | None:
        if kind is TaskKind.SETUP:
            return Event.SET_UP if actor.error is None else None
        if kind is TaskKind.PUBLISH and isinstance(actor.error, CommitRefused | CorruptData):
            return Event.PUBLISH_REFUSED
        if actor.error is not None:
            return None
        if kind is TaskKind.RETRACT:
            return Event.WITHDRAWN if actor.result == "withdrawn" else Event.PUBLISHED_AFTER_ALL
        return Event.PUBLISHED if kind is TaskKind.PUBLISH else Event.CLEANED_UP


class World:
    """One output, the jobs that write there one after another, and a reader."""

    def __init__(self, directory: str, before: str, if_exists: IfExists) -> None:
        self.output = Path(directory) / "out"
        self.is_broken = False
        self.is_disturbed = False  # Somebody put something at the output's name.
        if before == "old":
            run_job(make_commit(self.output, 1))
        elif before == "empty":
            self.output.mkdir()
        self.before = self.look()
        self.job = Job(self, 2, if_exists)
        self.jobs = [self.job]
        self.newest = 1  # The youngest job whose output was seen.
        for _ in range(2):
            self.job.start(TaskKind.SETUP)

    def look(self) -> Seen:
        return contents(self.output) if self.output.exists() else None

    def actors(self) -> list[Actor]:
        return [actor for job in self.jobs for _, actor in job.actors]

    def act(self, action: str, choice: int, times: int) -> None:
        actors = self.actors()
        due = step_due(self.job.state)
        if action == "start" and due is not None and len(actors) < ACTORS_MAX:
            self.job.start(due)
        elif action == "break":
            self.is_broken = not self.is_broken
        elif action == "disturb" and not self.output.exists():
            self.is_disturbed = True
            self.output.mkdir()
            (self.output / "foreign").write_text("mine")
        elif action == "kill" and actors:
            actors[choice % len(actors)].kill()
        elif action == "step" and actors:
            for _ in range(times):
                actors[choice % len(actors)].step()
                self.judge()
        self.judge()
        self.go_on()

    def go_on(self) -> None:
        """The masters: reports in, the next step or the next job out."""
        for job in self.jobs:
            job.collect()
        if self.job.state is State.QUEUED:
            self.job.run_attempts()
        if is_tidy(self.job.state) and len(self.jobs) < 2:
            self.job = Job(self, 3, "replace")
            self.jobs.append(self.job)
        self.judge()

    def judge(self) -> None:
        """What a reader may see now."""
        seen = self.look()
        if self.is_disturbed and seen == FOREIGN:
            return
        if seen is None or seen == {}:
            assert seen is None or self.before == {}
            stable = not self.is_disturbed and self.job.number == 2 and is_ended(self.job.state)
            assert not (stable and self.job.state in (State.COMMITTED, State.COMMITTED_TIDY)), "G4: it has vanished"
            return
        number = next(number for number in (1, 2, 3) if seen == output_of(number))  # A mixture is none of them.
        assert number >= self.newest, f"{number} came back after {self.newest}"
        self.newest = number
        second = self.jobs[0]
        if number == 1:
            assert second.state not in (State.COMMITTED, State.COMMITTED_TIDY)
        if number == 2:
            assert second.state not in (State.QUEUED, State.RUNNING, State.FAILED, State.FAILED_TIDY)
        if number == 3:
            assert is_tidy(second.state) and self.job.state not in (State.QUEUED, State.FAILED, State.FAILED_TIDY)

    def settle(self) -> None:
        """No more faults: the jobs must come to their ends, whatever sleeps meanwhile; then the sleepers wake."""
        self.is_broken = False
        for _ in range(100):
            due = step_due(self.job.state)
            if len(self.jobs) == 2 and due is None:
                break
            if due is not None:
                self.job.start(due)
                actor = self.job.actors[-1][1]
                while not actor.is_done:
                    actor.step()
                    self.judge()
            self.go_on()
        else:
            raise AssertionError("the jobs do not end")
        settled = self.look()
        for actor in self.actors():
            while not actor.is_done:
                actor.step()
                assert self.look() == settled
        for job in self.jobs:
            job.collect()
            job.commit().clean_up()
        assert self.look() == settled
        second, third = self.jobs
        if not self.is_disturbed:
            if third.state is State.COMMITTED_TIDY:
                assert settled == output_of(3)
            elif second.state is State.COMMITTED_TIDY:
                assert settled == output_of(2)
            else:
                assert settled == self.before
            assert os.listdir(self.output.parent) in (["out"], [])


ACTIONS = st.tuples(
    st.sampled_from(["step"] * 12 + ["start"] * 3 + ["kill", "break"]), st.integers(0, 7), st.integers(1, 25)
)
DISTURBED = st.tuples(
    st.sampled_from(["step"] * 12 + ["start"] * 3 + ["kill", "break", "disturb"]), st.integers(0, 7), st.integers(1, 25)
)


def play(before: str, if_exists: IfExists, actions: list[tuple[str, int, int]]) -> None:
    directory = tempfile.mkdtemp(dir=MEMORY)
    world = World(directory, before, if_exists)
    try:
        world.go_on()
        for action, choice, times in actions:
            world.act(action, choice, times)
        world.settle()
    finally:
        for actor in world.actors():
            actor.kill()
        shutil.rmtree(directory)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@example("old", "replace", [("start", 0, 1)] * 2 + [("step", 2, 25), ("step", 3, 25), ("break", 0, 1)])
@given(
    st.sampled_from(["old", "nothing", "empty"]), st.sampled_from(["error", "replace"]), st.lists(ACTIONS, max_size=60)
)
def test_a_reader_sees_old_nothing_new_whatever_sleeps_dies_or_wakes(
    before: str, if_exists: IfExists, actions: list[tuple[str, int, int]]
) -> None:
    """The promise of the product. Broken by any operation that is not harmless when late, doubled or half done."""
    play(before, if_exists, actions)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["old", "nothing"]), st.lists(DISTURBED, max_size=60))
def test_what_others_put_at_the_output_is_never_touched(before: str, actions: list[tuple[str, int, int]]) -> None:
    """Another program, or another group of masters, knows nothing of our path lock."""
    play(before, "replace", actions)
