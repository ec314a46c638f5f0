"""Snapshots in a member's directory: written whole or not at all, the newest good one found again.

    DIR/0000000000001234.snapshot    after the entry at that index; format in snapshot.py

Crash cases: before the rename there is a `.tmp` file, removed when the directory is opened; before the older ones are
removed there are several, and the newest counts. The log is shortened only after the snapshot has its name, durably.
"""

import contextlib
import logging
import os

from jobrunner.errors import CorruptData
from jobrunner.raft.files import File, Files, write_whole
from jobrunner.raft.messages import Member
from jobrunner.raft.snapshot import Snapshot, decode_snapshot, encode_snapshot

logger = logging.getLogger(__name__)

SUFFIX = ".snapshot"


class StoredSnapshot:
    """One that is durable. Stays readable while somebody sends it, whatever replaces it."""

    def __init__(self, index: int, term: int, members: tuple[Member, ...], file: File) -> None:
        self.index, self.term, self.members = index, term, members
        self.size = file.size()
        self._file = file

    def read(self, offset: int, length: int) -> bytes:
        return self._file.read(offset, length)

    def data(self, path: str = "the snapshot") -> bytes:
        """The machine's bytes. Raises CorruptData."""
        return decode_snapshot(self.read(0, self.size), path).data

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def write_snapshot(files: Files, directory: str, snapshot: Snapshot) -> StoredSnapshot:
    """Make `snapshot` durable, then remove older ones."""
    path = _path(directory, snapshot.index)
    write_whole(files, path, encode_snapshot(snapshot))
    for index in list_snapshots(files, directory):
        if index < snapshot.index:
            files.unlink(_path(directory, index))
    files.sync_dir(directory)
    return StoredSnapshot(snapshot.index, snapshot.term, snapshot.members, files.open(path))


def newest_snapshot(files: Files, directory: str) -> StoredSnapshot | None:
    """The newest that is whole, made durable. Raises LogTooNew; CorruptData if there are some, all damaged."""
    failure: CorruptData | None = None
    for index in reversed(list_snapshots(files, directory)):
        path = _path(directory, index)
        file = files.open(path)
        try:
            snapshot = decode_snapshot(file.read(0, file.size()), path)
        except CorruptData as error:
            logger.error("%s; looking for an older one", error)
            failure = failure or error
            file.close()
            continue
        file.sync()
        return StoredSnapshot(snapshot.index, snapshot.term, snapshot.members, file)
    if failure is not None:
        raise failure
    return None


def list_snapshots(files: Files, directory: str) -> list[int]:
    """Indexes, rising."""
    names = [name.removesuffix(SUFFIX) for name in files.list(directory) if name.endswith(SUFFIX)]
    return sorted(int(name) for name in names if name.isdigit())


def _path(directory: str, index: int) -> str:
    return os.path.join(directory, f"{index:016d}{SUFFIX}")
