"""An embedded run and the signals that a shell, a terminal or `timeout` sends to all of its processes at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobrunner.testing.local import descendants, wait_until
from tests.crash.cluster import entries

JOB = """
import time
from jobrunner import Job, Sum, param
def words(line):
    time.sleep(param("map_s", default=0.1))
    yield line, 1
job = Job(map=words, reduce=Sum())
"""


@dataclass
class Embedded:
    """`jobrunner run` as a job of a shell: a process group of its own."""

    process: "subprocess.Popen[str]"
    directory: Path

    def wait_running(self) -> list[int]:
        """Until user code runs; returns all its processes."""
        wait_until(lambda: entries(self.directory, "tmp/jobrunner-*/worker-0/scratch/*/*"), what="the first map")
        return [self.process.pid, *descendants(self.process.pid)]

    def end(self) -> tuple[str, str]:
        return self.process.communicate(timeout=30)

    def left(self) -> list[str]:
        """Names beside the input, the job and the output."""
        known = {"tmp", "job.py", "in.txt", "out"}
        return sorted(path.name for path in self.directory.iterdir() if path.name not in known)


@contextmanager
def embedded(directory: Path, map_s: float, *, nohup: bool = False) -> Iterator[Embedded]:
    (directory / "tmp").mkdir()
    (directory / "job.py").write_text(JOB)
    (directory / "in.txt").write_text("a\nb\na\n")
    words = ["run", str(directory / "job.py"), str(directory / "in.txt"), "--output", str(directory / "out"),
             "--slots", "1", "--param", f"map_s={map_s}", "--reach-timeout", "10"]  # fmt: skip
    process = subprocess.Popen(
        ["nohup"] * nohup + [sys.executable, "-m", "jobrunner", *words],
        env={**os.environ, "TMPDIR": str(directory / "tmp")},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        yield Embedded(process, directory)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_whole_group_kills_the_job_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """A closed terminal, or `timeout`: masters that died of it could not kill the job, and its stage would stay."""
    with embedded(tmp_path, map_s=30) as run:
        pids = run.wait_running()
        os.killpg(run.process.pid, number)
        out, err = run.end()
        assert run.process.returncode == 130, (out, err)
        assert not (tmp_path / "out").exists()
        assert run.left() == []
        wait_until(lambda: all(gone(pid) for pid in pids), timeout_s=5, what="the end of its processes")
        assert list((tmp_path / "tmp").iterdir()) == []


def test_under_nohup_a_closed_terminal_is_nothing(tmp_path: Path) -> None:
    """That is what nohup is for."""
    with embedded(tmp_path, map_s=0.3, nohup=True) as run:
        run.wait_running()
        os.killpg(run.process.pid, signal.SIGHUP)
        out, err = run.end()
        assert run.process.returncode == 0, (out, err)
        assert (tmp_path / "out" / "_SUCCESS").exists()


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    """Masters and agents without it would run for ever: nobody is left who would end them."""
    with embedded(tmp_path, map_s=30) as run:
        pids = run.wait_running()
        zygote = next(pid for pid in descendants(run.process.pid) if len(descendants(pid)) > 3)
        os.kill(zygote, signal.SIGKILL)
        run.process.send_signal(signal.SIGINT)
        run.end()
        wait_until(lambda: all(gone(pid) for pid in pids), timeout_s=10, what="the end of its processes")
