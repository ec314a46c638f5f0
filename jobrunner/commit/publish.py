"""Publish, retract: what brings a decided output to its name, or proves that it is not there. Runs in workers.

    COMMIT.json ──► winners into final/ ──► _SUCCESS ──► (old output out of the way) ──► rename(final, output)

Every operation is one that a process may repeat after any pause, since it either names only what is unique to the
job, or is a rename whose source is unique and consumed, or one whose target is occupied from then on:

- rename(final, output): there is one `final`, and once it has gone nobody can make it again.
- rename(output, old/output): `old/output` is occupied before the output gets its name, also when nothing was
  replaced. So the rename can never take away our own output, nor, once the stage is trash, the next job's.

A publisher may lose its stage at any point, because another has published or retracted and cleaned up. It then sees
FileNotFoundError and looks again. Answers are taken in an order that makes each final: first the stage, then the
output (a stage that has gone while the output is not ours never comes back).
"""

import errno
import os
import uuid
from dataclasses import dataclass

from jobrunner.commit.disk import Disk, is_directory, rename_unless_occupied
from jobrunner.commit.manifest import CommitRecord, decode_manifest, encode_manifest, encode_record, make_manifest
from jobrunner.commit.names import PLACEHOLDER, SUCCESS, Instance, StageNames, attempt_directory
from jobrunner.commit.stage import find_instance, find_trashed_instance, move_to_trash
from jobrunner.control.messages import Winner
from jobrunner.errors import CommitRefused, CorruptData
from jobrunner.failpoints import failpoint
from jobrunner.ids import JobId

_ROUNDS_MAX = 20  # Each round that ends early saw another process get further; three are the most in practice.


@dataclass(frozen=True, slots=True)
class Look:
    """What is at an output's name: nothing, an empty directory, the output of `job`, or something foreign."""

    is_free: bool = False
    job: JobId | None = None


def look_at(path: str, disk: Disk) -> Look:
    """What is there, as seen at some moment between call and return."""
    status = disk.stat(path)
    if status is None:
        return Look(is_free=True)
    if not is_directory(status):
        return Look()
    success = os.path.join(path, SUCCESS)
    for _ in range(2):  # Twice: it may have been published between the read and the listing.
        try:
            return Look(job=decode_manifest(disk.read(success), where=success).job)
        except CorruptData:
            return Look()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except IsADirectoryError:
            return Look()
        try:
            if not disk.list(path):
                return Look(is_free=True)
        except FileNotFoundError:
            return Look(is_free=True)
        except NotADirectoryError:
            return Look()
    return Look()


class Publisher:
    """One process's try at publishing one record."""

    def __init__(self, names: StageNames, record: CommitRecord, disk: Disk) -> None:
        assert names.job == record.job
        self._names = names
        self._record = record
        self._disk = disk

    def publish(self) -> None:
        """Bring the winners' files to the output's name; on return they are there, durably.

        Raises CommitRefused if that cannot be, CorruptData if a winner's file is lost, OSError if it may be later.
        """
        for _ in range(_ROUNDS_MAX):
            try:
                if self._publish_once():
                    break
            except FileNotFoundError:
                continue
        else:
            raise OSError(errno.EAGAIN, "the output keeps changing", self._names.output)
        self._disk.sync_directory(self._names.parent)
        failpoint("commit.publish.reported")

    def _publish_once(self) -> bool:
        """One round; False if another process came in between."""
        instance = find_instance(self._names, self._disk)
        is_staged = instance is not None and self._disk.stat(instance.final) is not None
        look = look_at(self._names.output, self._disk)
        if look.job == self._names.job:
            return True
        if instance is None:
            raise CommitRefused(f"{self._names.stage} has gone, and nothing was published", url=self._names.output)
        if not is_staged:
            return self._refuse_if_taken_away()
        self._refuse_unless_free(look)
        self._write_record()
        self._gather(instance)
        self._write_success(instance)
        if self._record.if_exists == "replace" and not self._make_way(look, instance):
            return False
        failpoint("commit.publish.before")
        if not rename_unless_occupied(self._disk, instance.final, self._names.output):
            return False
        failpoint("commit.publish.after")
        return True

    def _refuse_if_taken_away(self) -> bool:
        """`final` has gone while the output is not ours: into the trash with the stage, or published and removed."""
        if find_instance(self._names, self._disk) is not None:
            message = f"{self._names.output} was published, and somebody has removed it since"
            raise CommitRefused(message, url=self._names.output)
        return False

    def _refuse_unless_free(self, look: Look) -> None:
        output = self._names.output
        if look.is_free:
            return
        if look.job is None:
            raise CommitRefused(f"{output} exists and is not an output of jobrunner", url=output)
        if self._record.if_exists == "error":
            raise CommitRefused(f"{output} exists (the output of {look.job})", url=output)

    def _write_record(self) -> None:
        """COMMIT.json: from here on nobody needs the masters to finish. The same bytes each time."""
        temporary = self._write_temporary(encode_record(self._record))
        failpoint("commit.record.temp")
        self._disk.rename(temporary, self._names.record)
        self._disk.sync_directory(self._names.stage)
        failpoint("commit.record.after")

    def _gather(self, instance: Instance) -> None:
        """Winners' files into final/, each checked for its size."""
        for winner in self._record.winners:
            for file in winner.files:
                target = os.path.join(instance.final, file.file)
                self._move(winner, file.file, target, instance)
                status = self._disk.stat(target)
                if status is None:
                    raise FileNotFoundError(errno.ENOENT, "moved on", target)
                if status.st_size != file.bytes:
                    found = f"{target} of attempt {self._of(winner)} has {status.st_size} bytes, not {file.bytes}"
                    raise CorruptData(found, url=target)
                failpoint("commit.move.one")
        failpoint("commit.move.all")

    def _move(self, winner: Winner, file: str, target: str, instance: Instance) -> None:
        directory = attempt_directory(partition=winner.partition, attempt=winner.attempt, token=winner.token)
        source = os.path.join(self._names.attempts, directory, file)
        try:
            self._disk.rename(source, target)
        except FileNotFoundError:
            # Moves go one way. Not at its source, then not at its target, then `final` still there: it is lost.
            if self._disk.stat(target) is None and self._disk.stat(instance.final) is not None:
                message = f"{file}, written and synced by attempt {self._of(winner)}, is neither at {source} nor moved"
                raise CorruptData(message, url=source) from None

    def _write_success(self, instance: Instance) -> None:
        temporary = self._write_temporary(encode_manifest(make_manifest(self._record)))
        failpoint("commit.success.temp")
        self._disk.rename(temporary, os.path.join(instance.final, SUCCESS))
        self._disk.sync_directory(instance.final)
        failpoint("commit.success.after")

    def _make_way(self, look: Look, instance: Instance) -> bool:
        """Move an old output of ours away, and occupy its new place in any case. False: look again."""
        if look.job is not None:
            if not rename_unless_occupied(self._disk, self._names.output, instance.old):
                self._refuse_if_still(look.job)
                return False
            failpoint("commit.replace.moved")
            if look_at(instance.old, self._disk).job is None:
                message = f"{self._names.output} was changed by somebody else meanwhile"
                raise CommitRefused(message, url=self._names.output)  # A retraction puts it back.
        occupant = os.path.join(self._names.temporary, uuid.uuid4().hex)
        self._disk.mkdir(occupant)
        self._disk.mkdir(os.path.join(occupant, PLACEHOLDER))
        rename_unless_occupied(self._disk, occupant, instance.old)
        return True

    def _refuse_if_still(self, job: JobId) -> None:
        """The place for the old output is taken: then none of ours can be at the output's name but this job's."""
        if look_at(self._names.output, self._disk).job == job:
            message = f"{self._names.output} (the output of {job}) came back after it was moved away"
            raise CommitRefused(message, url=self._names.output)

    def _write_temporary(self, data: bytes) -> str:
        path = os.path.join(self._names.temporary, uuid.uuid4().hex)
        self._disk.write_new(path, data)
        return path

    def _of(self, winner: Winner) -> str:
        return f"{winner.attempt} of partition {winner.partition}"


def retract(names: StageNames, disk: Disk) -> bool:
    """After a refusal: make publication impossible, then say whether it had happened. True: it is published.

    False: it is not and never will be, and an output that had been moved away for it is back. On return the answer
    is durable, and clean-up may run; not before, since an old output may be in the trash until then.
    """
    move_to_trash(names, disk)
    failpoint("commit.retract.trash")
    published = look_at(names.output, disk).job == names.job
    if not published:
        instance = find_trashed_instance(names, disk)
        if instance is not None:
            _put_back(names, instance, disk)
    if disk.stat(names.parent) is not None:
        disk.sync_directory(names.parent)
    failpoint("commit.retract.after")
    return published


def _put_back(names: StageNames, instance: Instance, disk: Disk) -> None:
    """The old output gets its name again, or, if that is taken, a name beside it: it is not ours to delete."""
    try:
        if disk.list(instance.old) == [PLACEHOLDER]:
            return
        if not rename_unless_occupied(disk, instance.old, names.output):
            rename_unless_occupied(disk, instance.old, names.kept)
    except FileNotFoundError:
        return  # Nothing was moved, or another retraction has put it back.
