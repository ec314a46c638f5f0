"""Jobs whose functions harm their own process and those around it, or wait at a gate for what the test does."""

import os
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from jobrunner import Job, Sum, param, task
from tests.crash.jobs import words


class Gate:
    """A directory through which a test holds user code, and sees who has come: `stage` is "map" or "reduce"."""

    def __init__(self, directory: Path, *stages: str) -> None:
        """Hold these stages until they are opened."""
        self.directory = directory
        directory.mkdir(parents=True)
        for stage in stages:
            (directory / f"hold.{stage}").touch()

    @property
    def params(self) -> dict[str, str]:
        return {"gate": str(self.directory)}

    def open(self, stage: str, what: str = "") -> None:
        """Let all of a stage pass, or only the one that has come with `what`."""
        if what:
            (self.directory / f"pass.{stage}.{what}").touch()
        else:
            (self.directory / f"hold.{stage}").unlink()

    def pids(self, stage: str) -> list[int]:
        """Of the processes that came to the gate."""
        return [int(path.name.rpartition(".")[2]) for path in self.directory.glob(f"seen.{stage}.*")]


def _pass_gate(stage: str, what: str) -> None:
    gate = Path(param("gate"))
    hold, let = gate / f"hold.{stage}", gate / f"pass.{stage}.{what}"
    if hold.exists():
        (gate / f"seen.{stage}.{what}.{os.getpid()}").touch()
        while hold.exists() and not let.exists():
            task().progress()
            time.sleep(0.02)


def held_words(line: str) -> Iterator[tuple[str, int]]:
    """Word count; waits at the gate at each line that begins with "slow0"."""
    if line.startswith("slow0"):
        _pass_gate("map", line.split()[1])
    yield from words(line)


def held_total(key: str, values: Iterator[int]) -> Iterator[tuple[str, int]]:
    """Sum; waits at the gate at each key that begins with "slow"."""
    if key.startswith("slow"):
        _pass_gate("reduce", key)
    yield key, sum(values)


def by_slow_word(key: str, reducers: int) -> int:
    """The key slowN to partition N, the others anywhere."""
    return int(key[4:]) % reducers if key.startswith("slow") else zlib.crc32(key.encode()) % reducers


def leave_child(line: str) -> Iterator[tuple[str, int]]:
    """Word count that at the line "bad" starts processes, says their numbers in the file `pids`, and hangs."""
    if line == "bad":
        group = subprocess.Popen(["sleep", "1000"])
        session = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        _tell("pids", f"{os.getpid()} {group.pid} {session.pid}")
        time.sleep(1000)
    yield from words(line)


def exit_in_reduce(key: str, values: Iterator[int]) -> Iterator[tuple[str, int]]:
    """Sum that ends the process at the key "bad"."""
    if key == "bad":
        os._exit(9)
    yield key, sum(values)


def unsteady(line: str) -> Iterator[tuple[str, int]]:
    """Word count, and other values each time it runs, of the sum 0: no two runs have the same digest."""
    if line.startswith("slow0"):
        noise = int.from_bytes(os.urandom(6), "big")
        yield "noise", noise
        yield "noise", -noise
    yield from words(line)


def bulky(line: str) -> Iterator[tuple[str, str]]:
    """100 kB that do not compress, for every line."""
    yield line, os.urandom(50_000).hex()


def count_values(key: str, values: Iterator[str]) -> Iterator[tuple[str, int]]:
    yield key, sum(1 for _ in values)


def _tell(name: str, text: str) -> None:
    path = param(name)
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.rename(f"{path}.tmp", path)


held = Job(map=held_words, reduce=held_total, partition=by_slow_word)
orphans = Job(map=leave_child, reduce=Sum())
bad_reduce = Job(map=words, reduce=exit_in_reduce)
random_map = Job(map=unsteady, reduce=held_total, partition=by_slow_word)
large = Job(map=bulky, reduce=count_values)
