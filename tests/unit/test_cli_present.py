"""What commands print: the JSON contracts, the lines, and the displays."""

import io
import json

from cli_fakes import JOB, cluster_info, status_of

from jobrunner.cli.display import Lines, Live
from jobrunner.cli.present import cluster_object, cluster_text, end_line, jobs_text, progress_line, status_object
from jobrunner.cli.present import status_text as text_of
from jobrunner.control.messages import JobState, JobStatus


def test_the_status_object_is_the_contract() -> None:
    """Other people's scripts read these keys; `run`, `wait` and `status` print the same."""
    assert json.loads(json.dumps(status_object(status_of(JobState.FAILED)))) == {
        "id": JOB,
        "name": "wordcount",
        "state": "failed",
        "waiting_for": None,
        "output": "/data/out",
        "submitted_at": "2023-11-14T22:13:20.000Z",
        "finished_at": "2023-11-14T22:13:22.500Z",
        "stages": [
            {
                "name": "map",
                "kind": "map",
                "tasks": 3,
                "done": 1,
                "running": 2,
                "attempts": {"started": 4, "failed": 1, "lost": 0, "superseded": 0, "exception": 1},
            }
        ],
        "counters": {"lines": 5},
        "error": {
            "kind": "exception",
            "message": "ValueError: bad line",
            "task": f"{JOB}/map/1",
            "attempt": f"{JOB}/map/1/3",
            "traceback": 'Traceback (most recent call last):\n  File "job.py", line 3, in words\n'
            "ValueError: bad line\n",
            "input": {"url": "/data/in.txt", "offset": 42},
        },
    }


def test_a_running_job_has_no_end_and_no_error() -> None:
    """Readers test these for null."""
    running = status_object(status_of(JobState.RUNNING))
    assert (running["finished_at"], running["error"]) == (None, None)
    assert running["waiting_for"] == "a worker: none is alive"


def test_the_cluster_object_is_the_contract() -> None:
    """Supervisors read it; a down master keeps its place in the list."""
    found = json.loads(json.dumps(cluster_object(cluster_info())))
    assert list(found) == ["cluster_id", "leader", "epoch", "masters", "workers", "jobs"]
    assert found["masters"][1] == {
        "id": 1,
        "member": "b" * 32,
        "address": "127.0.0.1:2",
        "pid": None,
        "role": "down",
        "epoch": 3,
        "commit_index": 0,
        "applied_index": 0,
    }
    assert found["workers"][0] == {
        "id": 0,
        "address": "127.0.0.1:3",
        "pid": 12,
        "host": "host",
        "slots": 3,
        "state": "live",
        "running": [f"{JOB}/map/1/0"],
    }


def test_people_read_the_same_in_lines() -> None:
    """Every fact of the object that people act on is in the text."""
    failed = text_of(status_of(JobState.FAILED))
    assert "1/3 (2 running, 1 failed)" in failed and "at byte 42 of /data/in.txt: ValueError: bad line" in failed
    assert progress_line(status_of(JobState.RUNNING)) == "running: map 1/3 (2 running, 1 failed)"
    assert end_line(status_of(JobState.COMMITTED)) == f"job {JOB} committed in 2.5 s: 3 parts in /data/out"
    assert "master 1 leads (epoch 4)" in cluster_text(cluster_info())
    assert jobs_text([]).split() == ["JOB", "STATE", "TASKS", "SUBMITTED", "NAME", "OUTPUT"]


def changed(status: JobStatus, *, done: int, failed: int = 0) -> JobStatus:
    import msgspec

    stage = msgspec.structs.replace(status.stages[0], done=done, attempts={"failed": failed})
    return msgspec.structs.replace(status, stages=[stage])


def test_lines_are_printed_per_change_and_not_per_tick() -> None:
    """The log of a nightly job would hold a line per task."""
    stream, clock = io.StringIO(), [0.0]
    lines = Lines(stream, now=lambda: clock[0])
    running = status_of(JobState.RUNNING)

    def shown(status: JobStatus) -> int:
        before = len(stream.getvalue().splitlines())
        lines.show(status)
        return len(stream.getvalue().splitlines()) - before

    assert shown(changed(running, done=0)) == 2  # The job, and where it stands.
    assert shown(changed(running, done=0)) == 0
    assert shown(changed(running, done=1)) == 0  # Counts alone: too soon.
    assert shown(changed(running, done=1, failed=1)) == 1
    clock[0] = 1.5
    assert shown(changed(running, done=2, failed=1)) == 1
    assert shown(changed(running, done=3, failed=1)) == 1  # The stage is done.
    assert shown(changed(status_of(JobState.COMMITTED), done=3, failed=1)) == 1


def test_the_live_display_takes_every_state() -> None:
    """It runs where nobody can test it: on a terminal."""
    with Live() as display:
        for state in (JobState.QUEUED, JobState.RUNNING, JobState.COMMITTING, JobState.COMMITTED):
            display.show(changed(status_of(state), done=3 if state is JobState.COMMITTED else 1))
