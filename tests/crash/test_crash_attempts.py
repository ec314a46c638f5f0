"""User code that ends its own process, hangs, shouts or raises: each end has its own cause, and says where it was."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobrunner.api.client import Client
from jobrunner.control.messages import JobState
from jobrunner.testing.local import LocalCluster, wait_until
from tests.crash.bad_jobs import bad_reduce, orphans
from tests.crash.cluster import Text, check_alone, check_output, cluster_for, make_text
from tests.crash.jobs import bad

# Of the jobs: quick to fail, quick to be called hung, little kept of what they shout.
JOB_SETTINGS = {"attempt.faults_max": 2, "attempt.timeout_ms": 1500, "attempt.log_bytes_max": 65_536}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_for(tmp_path_factory.mktemp("attempts"), masters=1, workers=1) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client.from_dir(cluster.directory, settings=JOB_SETTINGS) as made:
        yield made


def bad_text(directory: Path) -> Text:
    """Three files, the second with a line "bad" at its end."""
    text = make_text(directory, files=3, lines=40, slow=0)
    with (directory / "001.txt").open("a") as file:
        file.write("bad\n")
    return Text(directory, {**text.counts, "bad": 1})


def jobrunner(cluster: LocalCluster, *words: str) -> "subprocess.CompletedProcess[str]":
    """The command line, as a person uses it."""
    command = [sys.executable, "-m", "jobrunner", *words, "--dir", str(cluster.directory)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("how", "cause", "attempts", "words"),
    [
        ("exit", "exited", 2, "status 7"),
        ("raise", "exception", 2, "ValueError: no such luck"),
        ("sysexit", "exception", 2, "SystemExit"),
        ("segfault", "signal", 2, "SIGSEGV"),
        ("kill", "signal", 2, "SIGKILL"),
        ("hang", "timeout", 2, "for 1.5 s"),
        ("fatal", "fatal", 1, "give up at once"),
    ],
)
def test_each_bad_end_has_its_cause(
    cluster: LocalCluster, client: Client, tmp_path: Path, how: str, cause: str, attempts: int, words: str
) -> None:
    """Somebody whose function dies without a traceback must at least be told how it died, and on what input."""
    text = bad_text(tmp_path / "in")
    params = {"how": how}
    handle = client.submit(bad, input=text.directory, output=tmp_path / "out", reducers=2, params=params)
    shown = check_failed(cluster, handle.id, tmp_path / "out", stage="map", cause=cause, attempts=attempts, words=words)
    error = shown["error"]
    assert error["task"].startswith(f"{handle.id}/map/")
    assert error["attempt"] == f"{error['task']}/{attempts - 1}"
    if cause in ("exception", "fatal"):
        assert "in misbehave" in error["traceback"] and "jobrunner/worker" not in error["traceback"]
        size = (text.directory / "001.txt").stat().st_size
        assert error["input"] == {"url": str(text.directory / "001.txt"), "offset": size - len("bad\n")}


def test_a_bad_end_in_a_reduce(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    """The maps stay done, the reduce fails the job, and its half-written partition is nowhere."""
    text = bad_text(tmp_path / "in")
    handle = client.submit(bad_reduce, input=text.directory, output=tmp_path / "out", reducers=2)
    shown = check_failed(
        cluster, handle.id, tmp_path / "out", stage="reduce", cause="exited", attempts=2, words="status 9"
    )
    assert shown["error"]["task"].startswith(f"{handle.id}/reduce/")
    waited = jobrunner(cluster, "wait", handle.id)
    assert waited.returncode == 1
    assert "status 9" in waited.stderr and shown["error"]["attempt"] in waited.stderr


def check_failed(
    cluster: LocalCluster, job: str, output: Path, *, stage: str, cause: str, attempts: int, words: str
) -> dict[str, Any]:
    """The job failed by `cause`; `status` and `logs` say so, and nothing of it is to be seen."""
    cluster.client.job(job).ended(60, tidy=True)
    shown: dict[str, Any] = json.loads(jobrunner(cluster, "status", job, "--json").stdout)
    assert shown["state"] == "failed"
    assert shown["error"]["kind"] == cause and words in shown["error"]["message"]
    ends = next(each for each in shown["stages"] if each["name"] == stage)["attempts"]
    assert ends[cause] == ends["failed"] == attempts
    logs = jobrunner(cluster, "logs", job, "--failed").stdout
    assert f"({cause})" in logs
    assert words in logs or "Segmentation fault" in logs  # What it wrote itself; else our words.
    assert not output.exists()
    check_alone(output)
    return shown


@pytest.mark.parametrize("how", ["exit", "raise", "segfault", "hang", "kill", "sysexit"])
def test_what_fails_once_is_tried_again(cluster: LocalCluster, client: Client, tmp_path: Path, how: str) -> None:
    """One bad moment of a machine must not cost a job."""
    text = bad_text(tmp_path / "in")
    params = {"how": how, "once": tmp_path / "once"}
    handle = client.submit(bad, input=text.directory, output=tmp_path / "out", reducers=2, params=params)
    status = handle.ended(60, tidy=True)
    check_output(cluster, status, text)
    maps = status.stages[0].attempts
    assert maps["failed"] == 1


def test_what_user_code_shouts_is_bounded(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    """Ten megabytes on stdout would fill a disk in a job of thousands of tasks."""
    text = bad_text(tmp_path / "in")
    handle = client.submit(bad, input=text.directory, output=tmp_path / "out", reducers=2, params={"how": "shout"})
    check_output(cluster, handle.ended(60, tidy=True), text)
    (log,) = (cluster.directory / "jobs" / handle.id / "logs").rglob("stdout")
    kept = log.read_bytes()
    limit = int(str(JOB_SETTINGS["attempt.log_bytes_max"]))
    assert kept[:limit] == b"x" * limit
    assert kept[limit:].decode() == f"\n[{10_000_000 - limit} more bytes dropped: attempt.log_bytes_max]\n"


def test_kill_leaves_no_process(cluster: LocalCluster, tmp_path: Path) -> None:
    """What user code started would otherwise run for ever, also in a session of its own."""
    text = bad_text(tmp_path / "in")
    pids = tmp_path / "pids"
    with Client.from_dir(cluster.directory) as patient:
        job = patient.submit(orphans, input=text.directory, output=tmp_path / "out", params={"pids": pids}).id
    wait_until(pids.exists, what="user code")
    numbers = [int(number) for number in pids.read_text().split()]
    assert all(running(number) for number in numbers)
    killed = jobrunner(cluster, "kill", job)
    assert killed.returncode == 0, killed.stderr
    wait_until(lambda: not any(running(number) for number in numbers), timeout_s=15, what="the end of every process")
    status = cluster.client.job(job).ended(30, tidy=True)
    assert status.state == JobState.KILLED
    assert jobrunner(cluster, "wait", job).returncode == 4
    assert not (tmp_path / "out").exists()
    check_alone(tmp_path / "out")


def running(pid: int) -> bool:
    """It exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
