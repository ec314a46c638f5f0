"""Jobs for the crash tests: slow where a test needs time to strike, and told by parameters how slow."""

import os
import time
from collections.abc import Iterator

from jobrunner import Fatal, Job, Sum, param

_DELAYS = {"map": 0.0, "reduce": 0.0}


def _delay(name: str) -> None:
    seconds = param(f"{name}_s", default=0.0)
    if seconds:
        time.sleep(seconds)
    gate = param(f"{name}_gate", default="")
    while gate and not os.path.exists(gate):
        time.sleep(0.02)


def words(line: str) -> Iterator[tuple[str, int]]:
    """Word count; `map_s` seconds for every line that begins with the word "slow", and until `map_gate` exists."""
    if line.startswith("slow"):
        _delay("map")
    for word in line.split():
        yield word, 1


def total(key: str, values: Iterator[int]) -> Iterator[tuple[str, int]]:
    """Sum by hand; `reduce_s` seconds for the keys that begin with "slow", and until `reduce_gate` exists."""
    if key.startswith("slow"):
        _delay("reduce")
    yield key, sum(values)


def misbehave(line: str) -> Iterator[tuple[str, int]]:
    """Word count that does what `how` says at the line "bad", as long as the file `once` does not exist."""
    if line == "bad" and not _already():
        how = param("how")
        if how == "exit":
            os._exit(7)
        if how == "raise":
            raise ValueError("no such luck")
        if how == "fatal":
            raise Fatal("give up at once")
        if how == "segfault":
            import ctypes

            ctypes.string_at(0)
        if how == "hang":
            while True:
                pass
        if how == "shout":
            os.write(1, b"x" * 10_000_000)
        if how == "sysexit":
            raise SystemExit(0)
        if how == "kill":
            os.kill(os.getpid(), 9)
    for word in line.split():
        yield word, 1


def _already() -> bool:
    """With a parameter `once`, misbehave only the first time."""
    path = param("once", default="")
    if not path:
        return False
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    return False


wordcount = Job(map=words, reduce=Sum())
slow_reduce = Job(map=words, reduce=total)
bad = Job(map=misbehave, reduce=Sum())
map_only = Job(map=words)
