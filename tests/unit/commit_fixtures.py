"""Plans, winners and disks for the tests of commit/."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jobrunner.commit.backends import PosixCommit
from jobrunner.commit.disk import Disk, PosixDisk
from jobrunner.commit.manifest import IfExists, InputEntry
from jobrunner.control.messages import Winner, Winners
from jobrunner.ids import JobId, Token, job_id_from_number


@dataclass(frozen=True)
class Output:
    url: str
    if_exists: IfExists = "error"


@dataclass(frozen=True)
class Plan:
    """What commit needs of a JobPlan."""

    job: JobId
    output: Output
    inputs: list[InputEntry] = field(default_factory=lambda: [InputEntry("/data/a.txt", 10, 5)])
    publish_tries_max: int = 3
    retry_ms: int = 500


def no_sleep(seconds: float) -> None:
    pass


def make_commit(
    output: Path | str,
    number: int = 1,
    *,
    if_exists: IfExists = "error",
    disk: Disk | None = None,
    sleep: Callable[[float], None] = no_sleep,
) -> PosixCommit:
    return PosixCommit(Plan(job_id_from_number(number), Output(str(output), if_exists)), disk=disk, sleep=sleep)


def run_attempt(commit: PosixCommit, partition: int, *, attempt: int = 0, token: int = 0, text: str = "") -> Winner:
    """One attempt from mkdir to seal; its text names job, partition and token unless given."""
    token = token or 100 + partition
    data = (text or f"{commit.names.job}\t{partition}-{attempt}-{token}\n").encode()
    with commit.open_attempt(partition, attempt, token) as output:
        writer = output.create(f"part-{partition:05d}.txt")
        writer.write(data, records=data.count(b"\n"))
        return Winner(partition, attempt, Token(token), output.seal())


def prepare(commit: PosixCommit, parts: int = 2) -> Winners:
    """Set-up and every attempt of a job, up to CommitJob."""
    commit.set_up()
    return Winners([run_attempt(commit, partition) for partition in range(parts)], {"lines": 7})


def run_job(commit: PosixCommit, parts: int = 2) -> None:
    """A whole job without accidents."""
    commit.publish(prepare(commit, parts))
    commit.clean_up()


def contents(directory: Path | str) -> dict[str, str]:
    """Names and texts of an output."""
    return {name: (Path(directory) / name).read_text() for name in sorted(os.listdir(directory))}


def beside(output: Path) -> list[str]:
    """What is in the parent but for the output."""
    return sorted(name for name in os.listdir(output.parent) if name != output.name)


class FaultyDisk(PosixDisk):
    """The real disk, but for the calls that `fault` answers with an error."""

    def __init__(self, fault: Callable[[str, str], OSError | None]) -> None:
        self.fault = fault
        self.calls: list[str] = []

    def _pass(self, name: str, path: str) -> None:
        self.calls.append(name)
        error = self.fault(name, path)
        if error is not None:
            raise error

    def mkdir(self, path: str) -> None:
        self._pass("mkdir", path)
        super().mkdir(path)

    def rename(self, source: str, target: str) -> None:
        self._pass("rename", target)
        super().rename(source, target)

    def write_new(self, path: str, data: bytes) -> None:
        self._pass("write_new", path)
        super().write_new(path, data)

    def sync_directory(self, path: str) -> None:
        self._pass("sync_directory", path)
        super().sync_directory(path)
