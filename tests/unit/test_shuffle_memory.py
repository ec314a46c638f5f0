"""Memory follows the buffer, not the data: peak memory of a process that maps and reduces much more than its buffer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, sys, threading
from pathlib import Path

from jobrunner.ids import AttemptId, JobId, StageName, Token
from jobrunner.planner.plan import ShufflePlan
from jobrunner.shuffle.blocks import read_index
from jobrunner.shuffle.reduce import reduce_partition
from jobrunner.shuffle.reducers import Sum
from jobrunner.shuffle.runs import FileRun
from jobrunner.shuffle.writer import MapOutputWriter

directory, what, count, buffer = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def limits(buffer):
    return ShufflePlan(1, 1, buffer, 64, 16_384, 1 << 20, 1, 1_000, "lz4")


def total(key, values):
    yield key, sum(map(len, values)) if key == "text" else sum(values)


def work(count, name, buffer):
    combine = Sum() if what == "sums" else None
    given = {
        "one_key": lambda: (("k", i) for i in range(count)),
        "sorted": lambda: (("k", (i * 7919) % count) for i in range(count)),
        "many_keys": lambda: ((f"key {i}", i) for i in range(count)),
        "sums": lambda: ((f"key {i}", i) for i in range(count)),
        "text": lambda: (("text", "x" * 1_000) for _ in range(count // 20)),
    }[what]()
    path, scratch = directory / f"{name}.jrb", directory / name
    scratch.mkdir()
    attempt = AttemptId(JobId("j"), StageName("map"), 0, 0)
    sort_values = what == "sorted"
    writer = MapOutputWriter(scratch, path, attempt, Token(1), 1, limits(buffer), combine, sort_values=sort_values)
    writer.add(given)
    spills = writer.finish().spills
    index = read_index(path)
    run = FileRun(path, index.offsets[0], index.lengths[0])
    pairs = reduce_partition([run], combine or total, limits(buffer), scratch, sort_values=sort_values)
    return spills, sum(1 for _ in pairs)


seen, over = [0], threading.Event()


def watch():  # Memory of its own, in MiB: pages of mapped files are the page cache's, which gives them back.
    while not over.wait(0.005):
        status = Path("/proc/self/status").read_text()
        seen.append(int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) >> 10)


work(20_000, "warm", 1 << 16)  # What kernels and allocators take once.
watcher = threading.Thread(target=watch)
watcher.start()
while len(seen) < 2:
    over.wait(0.001)
before = seen[-1]
spills, pairs = work(count, "real", buffer)
over.set()
watcher.join()
print(max(seen) - before, spills, pairs)
"""


def measure(directory: Path, what: str, *, count: int, buffer: int) -> tuple[int, int]:
    """How many MiB the peak grew by, and how many spills there were."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), what, str(count), str(buffer)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
    )  # fmt: skip
    grown, spills, _ = map(int, answer.stdout.split())
    return grown, spills


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["one_key", "sorted", "many_keys", "sums", "text"])
def test_memory_follows_the_buffer(tmp_path: Path, what: str) -> None:
    """One heavy key, or a map that emits a hundred times its input, would be killed for its memory on some day."""
    grown, spills = measure(tmp_path, what, count=300_000, buffer=1 << 20)
    assert spills > 3
    assert grown < 8, f"{grown} MiB above what the same work needs for little data"
