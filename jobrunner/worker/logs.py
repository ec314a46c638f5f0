"""Logs of user code: two files an attempt, each with a limit, under `jobs/JOB/logs/STAGE/PARTITION/ATTEMPT/`.

Kept: the first bytes, up to the limit, and a last line that says how many were dropped. The end of both streams
together stays in memory while the attempt runs, to travel in the report of a failure. A file is made at the first byte.
Logs of the oldest jobs go when there are more jobs with logs than the masters remember.
"""

import os
import shutil
from collections import deque
from typing import BinaryIO

from jobrunner.ids import AttemptId

STREAMS = ("stdout", "stderr", "traceback")


class Tail:
    """The last bytes written, of all streams together."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._pieces: deque[bytes] = deque()
        self._bytes = 0

    def add(self, data: bytes) -> None:
        self._pieces.append(data[-self._bytes_max :])
        self._bytes += len(self._pieces[-1])
        while self._bytes - len(self._pieces[0]) >= self._bytes_max:
            self._bytes -= len(self._pieces.popleft())

    def text(self) -> str:
        return b"".join(self._pieces)[-self._bytes_max :].decode(errors="replace")


class StreamLog:
    """One stream of one attempt, as a file of at most `bytes_max` (and the last line)."""

    def __init__(self, path: str, bytes_max: int, tail: Tail) -> None:
        self._path = path
        self._room = bytes_max
        self._dropped = 0
        self._tail = tail
        self._file: BinaryIO | None = None

    def write(self, data: bytes) -> None:
        """Keep `data`, or count it. Raises OSError."""
        self._tail.add(data)
        kept = data[: self._room]
        self._dropped += len(data) - len(kept)
        self._room -= len(kept)
        if kept:
            if self._file is None:
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            self._file.write(kept)

    def close(self) -> None:
        """Say what was dropped, and close."""
        if self._file is not None:
            with self._file as file:
                if self._dropped:
                    file.write(f"\n[{self._dropped} more bytes dropped: attempt.log_bytes_max]\n".encode())
            self._file = None


class AttemptLog:
    """What one attempt, or the import of one job, wrote."""

    def __init__(self, directory: str, *, bytes_max: int, tail_bytes_max: int) -> None:
        self.directory = directory
        self.tail = Tail(tail_bytes_max)
        self.stdout = StreamLog(os.path.join(directory, "stdout"), bytes_max, self.tail)
        self.stderr = StreamLog(os.path.join(directory, "stderr"), bytes_max, self.tail)

    def traceback(self, text: str) -> None:
        """Keep the user's traceback beside the streams. Raises OSError."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        with open(os.path.join(self.directory, "traceback"), "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def close(self) -> None:
        self.stdout.close()
        self.stderr.close()


def log_directory(cluster_dir: str, attempt: AttemptId) -> str:
    return os.path.join(
        cluster_dir, "jobs", attempt.job, "logs", attempt.stage, str(attempt.partition), str(attempt.attempt)
    )


def read_log(cluster_dir: str, attempt: AttemptId, *, stream: str, offset: int, bytes_max: int) -> bytes | None:
    """Up to `bytes_max` of a log from `offset`; None if the attempt wrote none here. Raises OSError."""
    assert stream in STREAMS, stream
    try:
        with open(os.path.join(log_directory(cluster_dir, attempt), stream), "rb") as file:
            file.seek(offset)
            return file.read(bytes_max)
    except FileNotFoundError:
        return None


def prune_logs(cluster_dir: str, jobs_max: int) -> None:
    """Keep the logs of the newest jobs: their ids sort by time. Agents of a host share them, and may do it at once."""
    jobs = os.path.join(cluster_dir, "jobs")
    try:
        names = sorted(os.listdir(jobs))
    except FileNotFoundError:
        return
    for name in names[: max(0, len(names) - jobs_max)]:
        shutil.rmtree(os.path.join(jobs, name), ignore_errors=True)
