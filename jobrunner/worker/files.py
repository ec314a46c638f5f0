"""A worker's directory: who it is, and what its attempts need and leave.

    worker-N/directory.json          {"uuid", "cluster_id"}, written once
    worker-N/blobs/<hash>            plans and code, checked against their name
    worker-N/answers/<job>/...       MapOutputs and Winners, as files for slots
    worker-N/scratch/<job>/slot-1/   a slot's own; emptied after each attempt, deleted after the slot
    worker-N/blocks/<job>/...        map output, laid out by the shuffle
    worker-N/trash/                  on its way out

One agent a directory: it holds a lock on directory.json as long as it lives.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jobrunner.commit.names import stage_names
from jobrunner.control.messages import Start, TaskKind
from jobrunner.errors import CorruptData, SpecError
from jobrunner.ids import DirectoryId, Hash, JobId
from jobrunner.planner.plan import JobPlan, blob_hash
from jobrunner.shuffle.blocks import block_path

_HASH = re.compile(r"[0-9a-f]{64}")
_OF_JOBS = ("answers", "scratch", "blocks")  # Each with a directory a job.


@dataclass(frozen=True, slots=True)
class Directory:
    """A worker's directory, locked by this process; `uuid` names it for ever."""

    path: str
    uuid: DirectoryId
    lock: int  # Descriptor; the lock goes when it is closed.

    def below(self, *names: str) -> str:
        return os.path.join(self.path, *names)


def open_directory(path: str, cluster_id: str) -> Directory:
    """The directory at `path`, made if it is not there, and locked.

    Raises SpecError if another process has it or it is another cluster's, CorruptData if it cannot be read.
    """
    for name in ("", "blobs", "answers", "scratch", "blocks", "trash"):
        os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
    file = os.path.join(path, "directory.json")
    if not os.path.exists(file):
        text = json.dumps({"uuid": uuid.uuid4().hex, "cluster_id": cluster_id})
        write_whole(file, text.encode(), durable=True)
    lock = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise SpecError(f"{path} is in use by another worker process", path=path) from None
    try:
        with open(file, "rb") as stored:
            said = json.loads(stored.read())
        found, of_cluster = DirectoryId(said["uuid"]), said["cluster_id"]
    except (ValueError, KeyError, TypeError) as error:
        os.close(lock)
        raise CorruptData(f"{file}: {error!r}", path=file) from None
    if of_cluster != cluster_id:
        os.close(lock)
        raise SpecError(f"{path} belongs to cluster {of_cluster}, not {cluster_id}", path=path)
    return Directory(path, found, lock)


def write_whole(path: str, data: bytes, *, durable: bool = False) -> None:
    """Write a file that is there whole or not at all; with `durable`, for good on return. Raises OSError."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(temporary, path)
    if durable:
        parent = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def blob_file(directory: Directory, blob: Hash) -> str:
    """Where a blob is kept. Raises CorruptData for what is no hash: it becomes a path."""
    if not _HASH.fullmatch(blob):
        raise CorruptData(f"not the name of a blob: {blob!r}")
    return directory.below("blobs", blob)


def load_blob(directory: Directory, blob: Hash) -> bytes | None:
    """A kept blob, None if it is not here, or not what its name says. Raises OSError."""
    path = blob_file(directory, blob)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    if blob_hash(data) != blob:
        os.unlink(path)
        return None
    return data


def keep_blob(directory: Directory, blob: Hash, data: bytes) -> str:
    """Keep a blob that was fetched; returns its file. Raises CorruptData if it is not what its name says."""
    if blob_hash(data) != blob:
        raise CorruptData(f"a master sent other bytes for blob {blob}")
    path = blob_file(directory, blob)
    write_whole(path, data)
    return path


def keep_answer(directory: Directory, job: JobId, name: str, answer: msgspec.Struct) -> str:
    """Keep a master's answer for slots to read; returns its file. Raises OSError."""
    folder = directory.below("answers", job)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, name)
    write_whole(path, msgspec.msgpack.encode(answer))
    return path


def empty_directory(path: str) -> None:
    """Delete what is in a directory, but not itself: making and deleting one costs more than a short attempt."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)


def delete_attempt(directory: Directory, start: Start, plan: JobPlan | None) -> None:
    """Delete what an attempt left that cannot count. May race with its last writes: the job's end deletes the rest."""
    attempt = start.attempt
    if start.kind is TaskKind.MAP:
        with contextlib.suppress(OSError):
            block_path(Path(directory.below("blocks")), attempt, start.token).unlink(missing_ok=True)
    if start.kind in (TaskKind.MAP, TaskKind.REDUCE) and plan is not None:
        stage = stage_names(plan.output.url, attempt.job)
        staged = stage.attempt(partition=attempt.partition, attempt=attempt.attempt, token=start.token)
        shutil.rmtree(staged, ignore_errors=True)


def jobs_left(directory: Directory) -> set[JobId]:
    """Jobs that have something in this directory. Raises OSError."""
    return {JobId(name) for folder in _OF_JOBS for name in os.listdir(directory.below(folder))}


def drop_job(directory: Directory, job: JobId, blobs: list[Hash]) -> str:
    """Take everything of a job out of the way at once, so that what is told of it later starts anew.

    Returns the directory to delete, which may take its time. Raises OSError.
    """
    trash = directory.below("trash", uuid.uuid4().hex)
    os.mkdir(trash, mode=0o700)
    for folder in _OF_JOBS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory.below(folder, job), os.path.join(trash, folder))
    for blob in blobs:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(blob_file(directory, blob))
    return trash


def delete_leftovers(directory: Directory) -> None:
    """At start: nothing runs, so every scratch directory and answer is of a process that is gone. Nobody would know
    any more which job a blob is of, nor when that job is over: those still needed are fetched again."""
    for folder in ("answers", "blobs", "scratch", "trash"):
        shutil.rmtree(directory.below(folder), ignore_errors=True)
        os.makedirs(directory.below(folder), mode=0o700, exist_ok=True)
