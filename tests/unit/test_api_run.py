"""Embedded runs: what is started, kept and stopped, whatever happens to the job."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import FakeMasters

from jobrunner import Client, Job, Sum
from jobrunner.api import run as module
from jobrunner.api.prepare import make_request, prepare
from jobrunner.control.messages import JobState, JobStatus, KillJob
from jobrunner.errors import JobKilled, SpecError, TaskError, Unavailable
from jobrunner.planner.build import BuiltJob
from jobrunner.spec.settings import Settings


def words(line: str) -> Iterator[tuple[str, int]]:
    yield line, 1


JOB = Job(map=words, reduce=Sum())


@dataclass
class FakeCluster:
    directory: Path
    addresses: list[str] = field(default_factory=lambda: ["a:1"])
    cluster_id: str = "c"
    token: str = "t"
    kept: bool = False
    stopped: int = 0

    def keep(self) -> None:
        self.kept = True

    def stop(self) -> None:
        self.stopped += 1


@dataclass
class FakePreforked:
    cluster: FakeCluster
    started: dict[str, Any] | None = None
    discarded: bool = False

    def start(self, settings: Settings, *, masters: int, workers: int, slots: int) -> FakeCluster:
        self.started = {"masters": masters, "workers": workers, "slots": slots}
        return self.cluster

    def discard(self) -> None:
        self.discarded = True


@pytest.fixture
def masters(monkeypatch: pytest.MonkeyPatch) -> FakeMasters:
    fake = FakeMasters()
    monkeypatch.setattr(module, "Client", lambda *_, **__: Client.over(fake))
    return fake


@pytest.fixture
def preforked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePreforked:
    fake = FakePreforked(FakeCluster(tmp_path / "temporary"))
    embedded = type(sys)("jobrunner.cluster.embedded")
    embedded.prefork_embedded = lambda: fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobrunner.cluster.embedded", embedded)
    return fake


@pytest.fixture
def built(tmp_path: Path) -> BuiltJob:
    (tmp_path / "in.txt").write_text("a\n")
    request = make_request(JOB, input=tmp_path / "in.txt", output=tmp_path / "out")
    return prepare(JOB, request, Settings(), slots=lambda: 2)


def run(preforked: FakePreforked, built: BuiltJob, **more: Any) -> module.EmbeddedEnd:
    return module.run_embedded(preforked, built, Settings(), masters=3, workers=1, slots=2, **more)


def test_a_committed_job_leaves_nothing_behind(masters: FakeMasters, preforked: FakePreforked, built: BuiltJob) -> None:
    """A temporary directory a run would fill the disk in a month."""
    seen: list[JobState] = []
    end = run(preforked, built, on_status=lambda status: seen.append(status.state))
    assert (end.status.state, end.kept, preforked.cluster.kept) == (JobState.COMMITTED, None, False)
    assert preforked.cluster.stopped == 1 and seen[-1] is JobState.COMMITTED
    assert preforked.started == {"masters": 3, "workers": 1, "slots": 2}


def test_a_failed_job_keeps_and_names_its_directory(
    masters: FakeMasters, preforked: FakePreforked, built: BuiltJob
) -> None:
    """The logs are in there."""
    masters.states = [JobState.FAILED]
    end = run(preforked, built)
    assert end.kept == preforked.cluster.directory and preforked.cluster.kept and preforked.cluster.stopped == 1


def test_an_error_of_the_cluster_keeps_and_names_its_directory(
    masters: FakeMasters, preforked: FakePreforked, built: BuiltJob
) -> None:
    """Without the masters' logs nobody could find out."""
    masters.fail_submit = Unavailable("nobody leads")
    with pytest.raises(Unavailable) as caught:
        run(preforked, built)
    assert str(preforked.cluster.directory) in caught.value.__notes__[0]
    assert preforked.cluster.kept and preforked.cluster.stopped == 1


def test_an_interrupt_kills_the_job_before_the_cluster_stops(
    masters: FakeMasters, preforked: FakePreforked, built: BuiltJob
) -> None:
    """Ctrl-C must leave neither half an output nor its stage directory."""

    def interrupt(status: JobStatus) -> None:
        assert preforked.cluster.stopped == 0
        raise KeyboardInterrupt

    masters.states = [JobState.RUNNING]
    with pytest.raises(KeyboardInterrupt):
        run(preforked, built, on_status=interrupt)
    assert any(isinstance(message, KillJob) for message in masters.told)
    assert [status.state for status in masters.jobs.values()] == [JobState.KILLED]
    assert preforked.cluster.stopped == 1 and not preforked.cluster.kept


def test_job_run_returns_the_result_or_raises(masters: FakeMasters, preforked: FakePreforked, tmp_path: Path) -> None:
    """The one-liner of the README."""
    (tmp_path / "in.txt").write_text("a\n")
    asked = {"input": [tmp_path / "in.txt"], "output": tmp_path / "out"}
    assert JOB.run(**asked, slots=4, workers=2).output == str(tmp_path / "out")
    assert preforked.started == {"masters": 3, "workers": 2, "slots": 4}
    for state, error in ((JobState.FAILED, TaskError), (JobState.KILLED, JobKilled)):
        masters.states = [state]
        masters.jobs.clear()
        with pytest.raises(error):
            JOB.run(**asked)


def test_a_wrong_run_starts_nothing(masters: FakeMasters, preforked: FakePreforked, tmp_path: Path) -> None:
    """Checks come first; the processes that wait for a cluster to become are let go."""
    (tmp_path / "in.txt").write_text("a\n")
    good: dict[str, Any] = {"input": tmp_path / "in.txt", "output": tmp_path / "out"}
    for wrong in (
        {"masters": 0},
        {"workers": 0},
        {"slots": 0},
        {"reducers": 0},
        {"input": tmp_path / "none"},
        {"settings": {"raft.nothing": 1}},
        {"if_exists": "append"},
    ):
        preforked.discarded = False
        with pytest.raises(SpecError):
            JOB.run(**{**good, **wrong})
        assert preforked.discarded and preforked.started is None


def test_an_interrupt_while_killing_still_stops_the_cluster(
    masters: FakeMasters, preforked: FakePreforked, built: BuiltJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who presses Ctrl-C twice wants to leave now."""
    from jobrunner.api.handle import JobHandle

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobHandle, "kill", interrupt)
    masters.states = [JobState.RUNNING]
    with pytest.raises(KeyboardInterrupt):
        run(preforked, built, on_status=interrupt)
    assert preforked.cluster.stopped == 1
