"""The stage directory of a job: made once, found again, deleted once. Runs in worker processes.

Any of these may run twice, beside itself, or long after the job has ended.
"""

import errno
import os
import uuid

from jobrunner.commit.disk import Disk, is_directory, mkdir_unless_there, rename_unless_occupied
from jobrunner.commit.names import Instance, StageNames
from jobrunner.errors import CommitRefused, StageGone
from jobrunner.failpoints import failpoint

_ROUNDS_MAX = 20  # Of clean-up, against set-ups that wake in between.


def set_up(names: StageNames, disk: Disk) -> None:
    """Make the stage and what is missing above the output; prove that renames there do what publishing needs.

    This is the only step that makes anything above the stage. Raises CommitRefused if renames are not those of a
    POSIX file system, StageGone if the job is cleaned up meanwhile, OSError if something cannot be made. If the masters
    answer that the job is over, the caller must run `clean_up`: a set-up that was paused before its first mkdir has
    made the stage again.
    """
    failpoint("commit.setup.before")
    disk.make_parents(names.parent)
    mkdir_unless_there(disk, names.stage)
    try:
        _fill(names, disk)
    except FileNotFoundError as error:  # Not to be tried again here: that would make it after its clean-up.
        raise stage_gone(names) from error
    disk.sync_directory(names.parent)
    failpoint("commit.setup.after")


def stage_gone(names: StageNames) -> StageGone:
    return StageGone(
        f"{names.stage} is not there: the job is over, or this host does not see {names.parent}", url=names.output
    )


def find_instance(names: StageNames, disk: Disk) -> Instance | None:
    """The one that counts, or None if the stage is gone."""
    return _instance_in(names.commit, disk)


def find_trashed_instance(names: StageNames, disk: Disk) -> Instance | None:
    return _instance_in(names.trashed(names.commit), disk)


def clean_up(names: StageNames, disk: Disk) -> None:
    """Delete everything of the job beside its output. First one rename, so that every late step finds nothing."""
    for _ in range(_ROUNDS_MAX):
        if disk.stat(names.stage) is not None:
            move_to_trash(names, disk)
        failpoint("commit.cleanup.trash")
        disk.remove_tree(names.trash)
        if disk.stat(names.stage) is None:
            failpoint("commit.cleanup.after")
            return
    raise OSError(errno.EBUSY, "somebody keeps making it again", names.stage)


def move_to_trash(names: StageNames, disk: Disk) -> bool:
    """Rename the stage away. False if trash is there already (a set-up has woken since): delete that first."""
    try:
        return rename_unless_occupied(disk, names.stage, names.trash)
    except FileNotFoundError:
        return True


def _fill(names: StageNames, disk: Disk) -> None:
    parent, stage = disk.stat(names.parent), disk.stat(names.stage)
    if parent is not None and stage is not None and parent.st_dev != stage.st_dev:
        raise CommitRefused(f"{names.stage} is another file system than {names.parent}", url=names.output)
    mkdir_unless_there(disk, names.attempts)
    mkdir_unless_there(disk, names.temporary)
    _make_instance(names, disk)
    _prove_renames(names, disk)
    disk.sync_directory(names.commit)
    disk.sync_directory(names.stage)


def _make_instance(names: StageNames, disk: Disk) -> None:
    """`commit/<instance>/` with final/ and old/ appears by one rename; the first set-up's counts."""
    drawn = uuid.uuid4().hex
    top = os.path.join(names.temporary, drawn)
    instance = Instance(os.path.join(top, drawn))
    for path in (top, instance.path, instance.final, os.path.dirname(instance.old)):
        disk.mkdir(path)
    disk.sync_directory(instance.path)
    if not rename_unless_occupied(disk, top, names.commit):
        disk.remove_tree(top)


def _prove_renames(names: StageNames, disk: Disk) -> None:
    """A directory must never replace one that is not empty, nor move into it: all of publishing rests on that."""
    probe = os.path.join(names.temporary, uuid.uuid4().hex)
    disk.mkdir(probe)
    disk.mkdir(os.path.join(probe, "probe"))
    before = disk.list(names.commit)
    if rename_unless_occupied(disk, probe, names.commit) or disk.list(names.commit) != before:
        raise CommitRefused(f"{names.parent}: a rename there replaces a directory that is not empty", url=names.output)
    disk.remove_tree(probe)


def _instance_in(directory: str, disk: Disk) -> Instance | None:
    try:
        found = disk.list(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    path = os.path.join(directory, found[0]) if len(found) == 1 else ""
    return Instance(path) if path and is_directory(disk.stat(path)) else None
