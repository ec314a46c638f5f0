"""Every step of a commit killed or failed at each failpoint, then repeated, while a reader looks on."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commit_fixtures import FaultyDisk, beside, contents, make_commit, no_sleep, prepare, run_attempt, run_job

from jobrunner.commit.backends import PosixCommit
from jobrunner.commit.disk import Patience
from jobrunner.commit.recover import Outcome, recover
from jobrunner.control.messages import Winners
from jobrunner.errors import CommitRefused, Refused, StorageFailed
from jobrunner.failpoints import NAMES, arm

ATTEMPT = ["commit.setup.before", "commit.setup.after", "commit.attempt.mkdir", "commit.attempt.written",
           "commit.attempt.synced"]  # fmt: skip
PUBLISH = ["commit.record.temp", "commit.record.after", "commit.move.one", "commit.move.all", "commit.success.temp",
           "commit.success.after", "commit.replace.moved", "commit.publish.before", "commit.publish.after",
           "commit.publish.reported", "commit.cleanup.trash", "commit.cleanup.after"]  # fmt: skip
RETRACT = ["commit.retract.trash", "commit.retract.after", "commit.cleanup.trash", "commit.cleanup.after"]

Crash = Callable[[str, Callable[[], None]], None]


def by_signal(name: str, steps: Callable[[], None]) -> None:
    """Run `steps` in a process of its own that kill -9 ends at the failpoint."""
    child = os.fork()
    if child == 0:
        try:
            arm(f"{name}=kill")
            steps()
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name} was not passed"


def by_error(name: str, steps: Callable[[], None]) -> None:
    """Run `steps` here until the failpoint raises."""
    arm(f"{name}=error")
    try:
        with pytest.raises(StorageFailed, match=name):
            steps()
    finally:
        arm("")


class Reader:
    """Looks at an output again and again, the way readers do, and keeps each different thing it saw."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.seen: list[dict[str, str] | None] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.is_set()
            try:
                found = self._read()
            except OSError:
                continue  # It was moved away in the middle of reading: a reader starts again.
            if not self.seen or self.seen[-1] != found:
                self.seen.append(found)

    def _read(self) -> dict[str, str] | None:
        try:
            directory = os.open(self.output, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            found = {}
            for name in os.listdir(directory):
                with open(os.open(name, os.O_RDONLY, dir_fd=directory)) as file:
                    found[name] = file.read()
            if os.fstat(directory).st_ino != os.stat(self.output).st_ino:
                raise OSError("moved away")
            return found
        finally:
            os.close(directory)


@pytest.fixture(params=[by_signal, by_error], ids=["kill", "error"])
def crash(request: pytest.FixtureRequest) -> Iterator[Crash]:
    yield request.param
    arm("")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_these_are_all_failpoints_of_a_commit() -> None:
    """A new one must be crashed at too. The last is passed by the agent."""
    ours = {name for name in NAMES if name.startswith("commit.")}
    assert ours == {*ATTEMPT, *PUBLISH, *RETRACT, "commit.sealed"}


@pytest.mark.parametrize("name", ATTEMPT)
def test_a_crash_in_set_up_or_in_an_attempt_costs_that_attempt_only(output: Path, name: str, crash: Crash) -> None:
    """Its leftovers may neither stop the next attempt nor be published."""
    commit = make_commit(output)

    def steps() -> None:
        commit.set_up()
        run_attempt(commit, 0, token=1)

    crash(name, steps)
    assert not output.exists()
    commit.set_up()
    if name in ("commit.attempt.written", "commit.attempt.synced") and crash is by_signal:
        with pytest.raises(Refused, match="has run before"):
            commit.open_attempt(0, 0, 1)
    commit.publish(Winners([run_attempt(commit, 0, attempt=1, token=2, text="second\n")], {}))
    commit.clean_up()
    assert contents(output)["part-00000.txt"] == "second\n"
    assert set(contents(output)) == {"_SUCCESS", "part-00000.txt"} and beside(output) == []


@pytest.mark.parametrize(
    ("name", "replace"),
    [(name, replace) for name in PUBLISH for replace in (False, True) if replace or name != "commit.replace.moved"],
)
def test_a_crashed_publication_is_finished_by_another_and_readers_see_nothing_or_all(
    output: Path, name: str, replace: bool, crash: Crash
) -> None:
    """A reader that saw half an output would compute on it; where one replaces another: old, nothing, new."""
    expected = complete_output(output.parent / "elsewhere", replace)
    if replace:
        run_job(make_commit(output, 1), 3)
    before = contents(output) if replace else None
    winners = prepare(make_commit(output, 2, if_exists="replace" if replace else "error"))

    def steps() -> None:
        commit = make_commit(output, 2, if_exists="replace" if replace else "error")
        commit.publish(winners)
        commit.clean_up()

    with Reader(output) as reader:
        crash(name, steps)
        steps()
    assert contents(output) == expected and beside(output) == ["elsewhere"]
    assert [found for found in reader.seen if found is not None] in ([before, expected], [before], [expected])
    assert reader.seen[-1] == expected


@pytest.mark.parametrize("name", PUBLISH[1:])
def test_an_output_is_finished_without_any_master_from_its_record(output: Path, name: str, crash: Crash) -> None:
    """All masters may be lost for good between CommitJob and the end."""
    if name == "commit.replace.moved":
        run_job(make_commit(output, 1), 3)
    expected = complete_output(output.parent / "elsewhere", True)
    commit = make_commit(output, 2, if_exists="replace")
    winners = prepare(commit)

    def steps() -> None:
        commit.publish(winners)
        commit.clean_up()

    crash(name, steps)
    recovered = recover(str(output), patience=Patience(3, 1, no_sleep))
    assert [found.outcome for found in recovered] in ([Outcome.PUBLISHED], [])
    assert contents(output) == expected and beside(output) == ["elsewhere"]
    assert recover(str(output)) == []


@pytest.mark.parametrize("name", RETRACT)
def test_a_crashed_retraction_is_finished_by_another(output: Path, name: str, crash: Crash) -> None:
    """Crashed between the trash and putting back, the old output would be deleted with the trash."""
    run_job(make_commit(output, 1), 3)
    before = contents(output)
    refused = refuse_after_move(output)

    def steps() -> None:
        assert refused.retract() == "withdrawn"
        refused.clean_up()

    with Reader(output) as reader:
        crash(name, steps)
        steps()
    assert contents(output) == before and beside(output) == []
    assert [found for found in reader.seen if found is not None] == [before]


def complete_output(directory: Path, replace: bool) -> dict[str, str]:
    """What job 2 leaves when nothing happens to it."""
    directory.mkdir()
    run_job(make_commit(directory / "out", 2, if_exists="replace" if replace else "error"))
    return contents(directory / "out")


def refuse_after_move(output: Path) -> PosixCommit:
    """Job 2, refused when the old output was moved away already."""
    refusing = FaultyDisk(
        lambda name, path: OSError(errno.EROFS, "") if (name, path) == ("rename", str(output)) else None
    )
    commit = make_commit(output, 2, if_exists="replace", disk=refusing)
    with pytest.raises(CommitRefused):
        commit.publish(prepare(commit))
    assert not output.exists()
    return make_commit(output, 2, if_exists="replace")
