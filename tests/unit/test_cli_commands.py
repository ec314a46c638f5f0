"""Commands against a cluster in memory: what they print where, and with which exit status they end."""

import json
from pathlib import Path

import pytest
from cli_fakes import JOB, FakeMasters, failed_attempt, status_of
from typer.testing import CliRunner

from jobrunner import Client
from jobrunner.cli import clusters, jobs, logs, run, verify
from jobrunner.cli.app import app
from jobrunner.cli.locate import Located
from jobrunner.control.messages import JobState, SubmitJob
from jobrunner.errors import Denied, StorageFailed, Unavailable, Unknown
from jobrunner.ids import job_id_from_number

assert verify  # Imported for its side by app.

WORDCOUNT = (
    "from jobrunner import Job, Sum\ndef words(line):\n    return [(line, 1)]\njob = Job(map=words, reduce=Sum())\n"
)


@pytest.fixture
def masters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMasters:
    fake = FakeMasters()
    for module in (clusters, jobs, logs, run):
        monkeypatch.setattr(module, "open_client", lambda *_, **__: Client.over(fake))
    monkeypatch.setattr(logs, "locate", lambda *_: Located(("a:1",), "", "token", tmp_path))
    monkeypatch.setenv("JOBRUNNER_CLUSTER", "a:1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wordcount.py").write_text(WORDCOUNT)
    (tmp_path / "in.txt").write_text("a\n")
    return fake


def invoke(*words: str, status: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `status`."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == status, (result.exit_code, result.output)
    assert 'Traceback (most recent call last):\n  File "/' not in result.stderr
    return result.stdout, result.stderr


def test_submit_prints_the_job_id_alone(masters: FakeMasters) -> None:
    """`JOB=$(jobrunner submit ...)` is how scripts use it."""
    out, _ = invoke("submit", "wordcount.py", "in.txt", "--output", "out")
    (job,) = masters.jobs
    assert out == f"{job}\n"


def test_submit_passes_every_word_on(masters: FakeMasters) -> None:
    """A word that is lost on the way shows only in the output."""
    id = "00000000-0000-0000-0000-000000000005"
    invoke(
        *("submit", "wordcount.py", "in.txt", "--input", "wordcount.py", "--output", "out", "--reducers", "7"),
        *("--param", "a=b=c", "--job-id", id, "--set", "input.split_bytes=1"),
    )
    (job,) = (message for message in masters.told if isinstance(message, SubmitJob))
    assert (job.job, job.name, job.stages[1].tasks) == (job_id_from_number(5), "wordcount", 7)


def test_run_json_prints_one_object_and_all_else_to_stderr(masters: FakeMasters) -> None:
    """A reader of stdout parses it whole."""
    out, err = invoke("run", "wordcount.py", "in.txt", "--output", "out", "--json")
    assert json.loads(out)["state"] == "committed"
    assert "-> " in err


def test_run_without_json_says_where_the_output_is(masters: FakeMasters) -> None:
    """The last line is what people look for."""
    out, _ = invoke("run", "wordcount.py", "in.txt", "--output", "out")
    assert "committed in 2.5 s" in out and len(out.splitlines()) == 1


def test_a_failed_job_shows_the_users_traceback_then_one_line(masters: FakeMasters) -> None:
    """Exit status 1; the object is printed all the same."""
    masters.states = [JobState.FAILED]
    out, err = invoke("run", "wordcount.py", "in.txt", "--output", "out", "--json", status=1)
    assert json.loads(out)["error"]["kind"] == "exception"
    assert err.index("line 3, in words") < err.index("jobrunner: job ")
    assert "it read /data/in.txt at byte 42" in err


def test_a_killed_job_is_exit_status_4(masters: FakeMasters) -> None:
    """Schedulers tell a kill from a failure."""
    masters.jobs[JOB] = status_of(JobState.KILLED)
    out, err = invoke("wait", JOB, "--json", status=4)
    assert json.loads(out)["state"] == "killed" and "was killed" in err


def test_wait_gives_up_after_its_timeout(masters: FakeMasters) -> None:
    """The job goes on, and the line says what to do."""
    masters.states = [JobState.RUNNING]
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    _, err = invoke("wait", JOB, "--timeout", "0.01", status=3)
    assert f"jobrunner kill {JOB}" in err
    invoke("wait", JOB, "--timeout", "-1", status=2)


def test_status_and_jobs_print_objects(masters: FakeMasters) -> None:
    """`status`, `wait` and `run` print the same object; `jobs` a list of them under one key."""
    masters.jobs[JOB] = status_of(JobState.COMMITTED)
    status = json.loads(invoke("status", JOB, "--json")[0])
    assert json.loads(invoke("jobs", "--json")[0]) == {"jobs": [status]}
    assert json.loads(invoke("wait", JOB, "--json")[0]) == status
    assert "committed" in invoke("status", JOB)[0] and JOB in invoke("jobs")[0]
    assert json.loads(invoke("cluster", "status", "--json")[0])["epoch"] == 4


def test_kill_of_an_ended_job_is_no_error(masters: FakeMasters) -> None:
    """Clean-up scripts call it whatever happened."""
    masters.jobs[JOB] = status_of(JobState.COMMITTED)
    assert "committed" in invoke("kill", JOB)[1]
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    assert invoke("kill", JOB) == ("", "")


def test_an_unknown_job_is_wrong_use(masters: FakeMasters) -> None:
    """Exit status 2, for each command that names a job."""
    for command in ("wait", "status", "kill", "logs"):
        masters.attempts = []
        if command != "logs":
            assert "no job" in invoke(command, JOB, status=2)[1]
        assert "not a job id" in invoke(command, "j-x", status=2)[1]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unavailable("nobody"), 3), (Unknown("perhaps"), 3), (Denied("no"), 2), (StorageFailed("disk"), 6)],
)
def test_an_error_of_the_cluster_is_one_line_and_its_exit_status(
    masters: FakeMasters, error: Exception, status: int
) -> None:
    """The exit statuses are a contract; a traceback of ours helps nobody."""
    masters.fail_submit = error
    out, err = invoke("submit", "wordcount.py", "in.txt", "--output", "out", status=status)
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"jobrunner: {error}")


def test_wrong_words_are_one_line_and_nothing_is_submitted(masters: FakeMasters) -> None:
    """Exit status 2, with the key, what was found and what is allowed."""
    good = ["submit", "wordcount.py", "in.txt", "--output", "out"]
    for words, line in (
        ([*good, "--reducers", "0"], "reducers: found 0, allowed: at least 1"),
        ([*good, "--if-exists", "append"], "if_exists: found 'append', allowed: error or replace"),
        ([*good, "--param", "x"], "--param: found 'x', allowed: NAME=VALUE"),
        ([*good, "--job-id", "x"], "not a job id: 'x'"),
        (["submit", "wordcount.py", "--output", "out"], "input: found none"),
        (["submit", "wordcount.py", "no1", "no2", "--output", "out"], "no1"),
        (["submit", "wordcount.py", "in.txt", "--output", "in.txt"], "in.txt"),
        (["run", "wordcount.py", "in.txt", "--output", "out", "--masters", "3"], "only without one"),
        (["cluster", "up", "--ray"], "not built yet"),
        (["cluster", "up", "--slots", "0"], "--slots: found 0"),
        (["cluster", "down", "--dir", "none"], "no cluster directory 'none'"),
        (["master", "--config", "none", "--id", "0"], "no file 'none'"),
        (["verify", "none"], "OUTPUT: found 'none'"),
    ):
        _, err = invoke(*words, status=2)
        assert line in err and len(err.splitlines()) == 1, err
    assert masters.jobs == {}


def test_click_errors_are_exit_status_2(masters: FakeMasters) -> None:
    """Misspelt options and commands too."""
    for words in (["run"], ["frobnicate"], ["run", "x.py", "--outptu", "y"], ["submit", "x", "--reducers", "many"]):
        invoke(*words, status=2)


def test_an_interrupted_wait_leaves_the_job_and_says_how_to_go_on(
    masters: FakeMasters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C on a submitted job: exit 130, the job goes on."""
    from jobrunner.cli import display

    def interrupt(self: object, status: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(display.Lines, "show", interrupt)
    masters.states = [JobState.RUNNING]
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    _, err = invoke("wait", JOB, status=130)
    assert f"the job goes on: `jobrunner wait {JOB}`" in err
    assert masters.jobs[JOB].state is JobState.RUNNING


def test_logs_come_from_the_directory_when_the_worker_is_gone(masters: FakeMasters, tmp_path: Path) -> None:
    """A failed attempt's words must outlive its worker."""
    masters.attempts = [failed_attempt(worker="127.0.0.1:1")]
    place = tmp_path / "jobs" / JOB / "logs" / "map" / "1" / "3"
    place.mkdir(parents=True)
    (place / "stdout").write_text("printed\n")
    (place / "traceback").write_text("Traceback: boo\n")
    out, _ = invoke("logs", JOB, "--failed")
    assert out == (
        f"==> {JOB}/map/1/3 stdout (exception) <==\nprinted\n\n"
        f"==> {JOB}/map/1/3 traceback (exception) <==\nTraceback: boo\n"
    )


def test_logs_fall_back_to_the_tail_in_the_masters(masters: FakeMasters) -> None:
    """Worker and directory may both be another machine's."""
    masters.attempts = [failed_attempt()]
    out, _ = invoke("logs", f"{JOB}/map/1/3")
    assert "the tail\n" in out and "Traceback: x" in out
    assert "no such attempt" in invoke("logs", f"{JOB}/map/1/4")[1]


def test_version_failpoints_and_help() -> None:
    """What --failpoints lists is what JOBRUNNER_FAILPOINTS takes."""
    from jobrunner.failpoints import NAMES

    assert invoke("--version")[0].startswith("jobrunner 0.")
    assert {line.split()[0] for line in invoke("--failpoints")[0].splitlines()} == set(NAMES)
    assert "Examples:" in invoke("--help")[0] and "Exit status:" in invoke("--help")[0]
    for command in ("run", "submit", "wait", "logs", "master", "worker"):
        assert "Example" in invoke(command, "--help")[0]
