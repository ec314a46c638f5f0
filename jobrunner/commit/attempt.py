"""What one attempt of a final stage writes: a directory of its own, files made once, one checksum each.

    open_attempt ──► create(file) ──► write ... ──► seal() ──► [OutputFile]   durable; never opened again
                                               └──► discard()                 nothing is left

Runs in a slot process. Until the masters make it the winner, an attempt touches nothing but its own directory.
"""

import contextlib
import os
import zlib
from types import TracebackType

from jobrunner.commit.disk import Disk, write_all
from jobrunner.commit.names import StageNames, is_part_name
from jobrunner.commit.stage import stage_gone
from jobrunner.control.messages import OutputFile
from jobrunner.errors import Refused
from jobrunner.failpoints import failpoint

_BUFFER_BYTES = 1 << 20  # One write call each; larger pieces go straight through.


class OutputWriter:
    """A new file: counts bytes and checksum as they go by. `records` is the caller's to raise.

    A binary stream to whoever wants one: write, flush, tell, close.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.records = 0
        self.bytes = 0
        self._descriptor = descriptor
        self._buffer = bytearray()
        self._crc = 0

    def write(self, data: bytes | bytearray | memoryview, records: int = 0) -> int:
        """Append `data`, which holds `records` whole records; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self.records += records
        self.bytes += len(view)
        if len(view) >= _BUFFER_BYTES:
            self.flush()
            self._crc = zlib.crc32(view, self._crc)
            write_all(self._descriptor, view)
            return len(view)
        self._buffer += view
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(view)

    def flush(self) -> None:
        """Hand the buffer to the system; nothing is durable before `seal`."""
        if self._buffer:
            self._crc = zlib.crc32(self._buffer, self._crc)
            write_all(self._descriptor, self._buffer)
            self._buffer.clear()

    def tell(self) -> int:
        return self.bytes

    def writable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def sync(self) -> None:
        """Make the content durable; the name is the directory's matter."""
        self.flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close without syncing; what the buffer holds is written. Safe to repeat."""
        if not self.closed:
            try:
                self.flush()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close and forget the buffer. Safe to repeat."""
        if not self.closed:
            self._buffer.clear()
            os.close(self._descriptor)
            self._descriptor = -1

    def described(self, output: str) -> OutputFile:
        return OutputFile(output, self.name, self.records, self.bytes, f"crc32:{self._crc:08x}")


class AttemptOutput:
    """The directory of one attempt. Used as a context it is discarded on the way out, unless it was sealed."""

    def __init__(self, names: StageNames, path: str, disk: Disk) -> None:
        self.path = path
        self._names = names
        self._disk = disk
        self._writers: dict[str, tuple[str, OutputWriter]] = {}
        self._sealed = False

    def create(self, file_name: str, output: str = "main") -> OutputWriter:
        """A new file of the named output. Raises StageGone if the job is over meanwhile."""
        assert not self._sealed and is_part_name(file_name), file_name
        try:
            descriptor = self._disk.open_new(os.path.join(self.path, file_name))
        except FileNotFoundError as error:
            raise stage_gone(self._names) from error
        writer = OutputWriter(descriptor, file_name)
        self._writers[file_name] = (output, writer)
        return writer

    def seal(self) -> list[OutputFile]:
        """Close and sync every file and the names above; afterwards nobody opens them for writing again.

        On return all of it is durable. Raises OSError if the disk fails, StageGone if the job is over.
        """
        for _, writer in self._writers.values():
            writer.flush()
        failpoint("commit.attempt.written")
        for _, writer in self._writers.values():
            writer.sync()
            writer.close()
        try:
            self._disk.sync_directory(self.path)
            self._disk.sync_directory(self._names.attempts)
        except FileNotFoundError as error:
            raise stage_gone(self._names) from error
        self._sealed = True
        failpoint("commit.attempt.synced")
        return [writer.described(output) for _, (output, writer) in sorted(self._writers.items())]

    def discard(self) -> None:
        """Close and delete; also after `seal`, once the attempt has lost. Safe to repeat."""
        for _, writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.abandon()
        self._disk.remove_tree(self.path)

    def __enter__(self) -> "AttemptOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._sealed:
            self.discard()


def open_attempt(names: StageNames, disk: Disk, *, partition: int, attempt: int, token: int) -> AttemptOutput:
    """The attempt's own directory, made now.

    Raises Refused if it is there: this attempt ran before, and one name is written once. Raises StageGone if the
    stage is not there. Never makes what is missing above it.
    """
    path = names.attempt(partition=partition, attempt=attempt, token=token)
    try:
        disk.mkdir(path)
    except FileExistsError as error:
        raise Refused(f"{path} exists: this attempt has run before") from error
    except FileNotFoundError as error:
        raise stage_gone(names) from error
    failpoint("commit.attempt.mkdir")
    return AttemptOutput(names, path, disk)
