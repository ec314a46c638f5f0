"""The file operations of a commit, and patience with those that fail.

An interface, so that tests can stop, crash or fail between any two of them. Each call is one operation that other
processes see whole (but for `remove_tree`, which only ever gets names that are unique to one job).
"""

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jobrunner.errors import CommitRefused, StorageFailed

T = TypeVar("T")

OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})  # The target of a directory's rename is taken.
DEFINITE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EXDEV,
     errno.ENAMETOOLONG,
     errno.EIO}  # After a failed sync a second one may succeed without having written anything.
)  # fmt: skip
_ROUNDS_MAX = 1000  # Of one deletion, against others that delete or still create in the same tree.


class Disk(Protocol):
    """Raises OSError as the system calls do."""

    def mkdir(self, path: str) -> None: ...
    def make_parents(self, path: str) -> None:
        """Make `path` and what is missing above it; fine if it is there."""
        ...

    def rename(self, source: str, target: str) -> None: ...
    def write_new(self, path: str, data: bytes) -> None:
        """A new file, synced; its name is not."""
        ...

    def open_new(self, path: str) -> int:
        """A new file's descriptor, for writing."""
        ...

    def read(self, path: str) -> bytes: ...
    def list(self, path: str) -> list[str]:
        """Names in a directory, sorted."""
        ...

    def stat(self, path: str) -> os.stat_result | None:
        """Of the name itself, not of what a link points to; None if there is nothing."""
        ...

    def sync_directory(self, path: str) -> None: ...
    def remove_tree(self, path: str) -> None:
        """Delete; also beside others that do the same. Fine if it is not there."""
        ...


class PosixDisk:
    """The real one."""

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def make_parents(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def write_new(self, path: str, data: bytes) -> None:
        descriptor = self.open_new(path)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open_new(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def list(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_tree(self, path: str) -> None:
        for _ in range(_ROUNDS_MAX):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                if self.stat(path) is None:
                    return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        raise OSError(errno.ENOTEMPTY, "somebody keeps writing there", path)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte, however many calls it takes."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def is_directory(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def mkdir_unless_there(disk: Disk, path: str) -> None:
    with contextlib.suppress(FileExistsError):
        disk.mkdir(path)


def rename_unless_occupied(disk: Disk, source: str, target: str) -> bool:
    """Rename a directory; False if the target is a file or a directory that is not empty, and nothing happened."""
    try:
        disk.rename(source, target)
    except OSError as error:
        if error.errno in OCCUPIED:
            return False
        raise
    return True


@dataclass(frozen=True, slots=True)
class Patience:
    """How often an operation is tried whose failure time may mend (a full disk, a busy or stale server)."""

    tries_max: int
    retry_ms: int
    sleep: Callable[[float], None] = time.sleep

    def run(self, action: Callable[[], T], *, what: str, url: str) -> T:
        """Do `action`; it must be repeatable. Raises CommitRefused once its OSError is definite or stays."""
        for tried in range(1, self.tries_max + 1):
            try:
                return action()
            except OSError as error:
                if error.errno in DEFINITE or tried == self.tries_max:
                    text = os.strerror(error.errno) if error.errno else str(error)
                    often = f" (tried {tried} times)" if tried > 1 else ""
                    message = f"cannot {what} {url}: {text}: {error.filename or url}{often}"
                    raise CommitRefused(message, url=url) from error
            self.sleep(self.retry_ms / 1000)
        raise AssertionError("tries_max is at least 1")

    def insist(self, action: Callable[[], T], *, what: str, url: str) -> T:
        """As `run`, where no refusal is possible: raises StorageFailed, and the step is assigned again."""
        try:
            return self.run(action, what=what, url=url)
        except CommitRefused as error:
            raise StorageFailed(error.message, url=url) from error
