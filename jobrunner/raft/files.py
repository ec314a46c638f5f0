"""The file operations of the store, behind an interface that the simulator implements with a disk that tears and loses.

What the store may rely on: bytes appended are durable after `sync` of the file, a name (new, renamed or removed) after
`sync_dir` of its directory. Nothing else is, and anything else may come true at a crash, in part and in any order.
"""

import contextlib
import fcntl
import os
import sys
from typing import Protocol


class File(Protocol):
    """An open file that only grows, or is cut."""

    def append(self, data: bytes) -> None: ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer at the end of the file."""
        ...

    def size(self) -> int: ...

    def cut(self, length: int) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """All raise OSError."""

    def make_dir(self, directory: str) -> None:
        """Make it and its parents, with mode 0700; it may exist."""
        ...

    def lock(self, path: str) -> File:
        """Hold `path` until the file is closed. Raises BlockingIOError if another process holds it."""
        ...

    def list(self, directory: str) -> list[str]:
        """Names in it, sorted."""
        ...

    def create(self, path: str) -> File:
        """A new, empty file; one that exists is emptied."""
        ...

    def open(self, path: str) -> File: ...

    def rename(self, old: str, new: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def sync_dir(self, directory: str) -> None: ...


class RealFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
            data += more
        return data

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def cut(self, length: int) -> None:
        os.ftruncate(self._fd, length)

    def sync(self) -> None:
        if sys.platform == "darwin":
            fcntl.fcntl(self._fd, fcntl.F_FULLFSYNC)  # There, fsync does not reach the disk.
        else:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1  # Closed again, it would be somebody else's.


class RealFiles:
    """The operating system's."""

    def make_dir(self, directory: str) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def lock(self, path: str) -> RealFile:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return RealFile(fd)

    def list(self, directory: str) -> list[str]:
        return sorted(os.listdir(directory))

    def create(self, path: str) -> RealFile:
        return RealFile(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    def open(self, path: str) -> RealFile:
        return RealFile(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_dir(self, directory: str) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_whole(files: Files, path: str, data: bytes) -> None:
    """Make `path` hold `data`, durably, or (after a crash) not exist: a temporary name, sync, rename, sync."""
    temporary = path + TEMPORARY
    file = files.create(temporary)
    with contextlib.closing(file):
        file.append(data)
        file.sync()
    files.rename(temporary, path)
    files.sync_dir(os.path.dirname(path))


TEMPORARY = ".tmp"
