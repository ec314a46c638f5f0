"""Jobs whose functions harm their own process, and those around it."""

import os
import subprocess
import time
from collections.abc import Iterator

from jobrunner import Job, Sum, param
from tests.crash.jobs import total, words


def leave_child(line: str) -> Iterator[tuple[str, int]]:
    """Word count that at the line "bad" starts processes, says their numbers in the file `pids`, and hangs."""
    if line == "bad":
        group = subprocess.Popen(["sleep", "1000"])
        session = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        _tell("pids", f"{os.getpid()} {group.pid} {session.pid}")
        time.sleep(1000)
    for word in line.split():
        yield word, 1


def exit_in_reduce(key: str, values: Iterator[int]) -> Iterator[tuple[str, int]]:
    """Sum that ends the process at the key "bad"."""
    if key == "bad":
        os._exit(9)
    yield key, sum(values)


def unsteady(line: str) -> Iterator[tuple[str, int]]:
    """Word count that gives other values each time it runs, of the same sum: no two runs have the same digest."""
    if line.startswith("slow0"):
        noise = int.from_bytes(os.urandom(6), "big")
        yield "noise", noise
        yield "noise", -noise
    for word in line.split():
        yield word, 1


def _tell(name: str, text: str) -> None:
    path = param(name)
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.rename(f"{path}.tmp", path)


orphans = Job(map=leave_child, reduce=Sum())
bad_reduce = Job(map=words, reduce=exit_in_reduce)
random_map = Job(map=unsteady, reduce=total)
