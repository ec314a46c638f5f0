"""Finish decided outputs without any master: for the day the whole group is lost.

COMMIT.json exists only for a job whose commit was decided, so finishing it is always right, also beside a master that
does the same. A stage without it may belong to a running job and is left alone. A trash with it is a job that ended.
"""

import os
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from jobrunner.commit.backends import publish_record
from jobrunner.commit.disk import Disk, Patience, PosixDisk
from jobrunner.commit.manifest import decode_record
from jobrunner.commit.names import StageNames, local_path, parse_stage
from jobrunner.commit.publish import look_at, retract
from jobrunner.commit.stage import clean_up
from jobrunner.errors import CommitRefused, CorruptData
from jobrunner.ids import JobId


class Outcome(StrEnum):
    PUBLISHED = "published"  # The output is there and complete; nothing is left beside it.
    WITHDRAWN = "withdrawn"  # It had been refused; an old output is back, nothing is left beside it.
    REFUSED = "refused"  # It cannot be published now; the stage is kept.
    UNDECIDED = "undecided"  # No COMMIT.json: nothing was ever visible; the stage is kept.


@dataclass(frozen=True, slots=True)
class Recovered:
    job: JobId
    output: str
    outcome: Outcome
    detail: str = ""


def recover(output_or_stage: str, *, disk: Disk | None = None, patience: Patience | None = None) -> list[Recovered]:
    """Roll forward every decided job at an output, or the one of a stage directory; in the order of job ids.

    Safe to repeat. Raises CorruptData if a COMMIT.json or a winner's file is damaged, StorageFailed or OSError if
    the disk is.
    """
    disk = disk or PosixDisk()
    patience = patience or Patience(tries_max=10, retry_ms=500)
    path = os.path.abspath(local_path(output_or_stage))
    own = parse_stage(path)
    found = {own[0].job: own[0]} if own else _stages_of(path, disk)
    return [_recover_one(names, disk, patience) for _, names in sorted(found.items())]


def _stages_of(output: str, disk: Disk) -> dict[JobId, StageNames]:
    parent = os.path.dirname(output)
    parsed = (parse_stage(os.path.join(parent, name)) for name in disk.list(parent))
    return {names.job: names for names, _ in filter(None, parsed) if names.output == output}


def _recover_one(names: StageNames, disk: Disk, patience: Patience) -> Recovered:
    if disk.stat(names.record) is None:
        if disk.stat(names.stage) is not None:
            return Recovered(names.job, names.output, Outcome.UNDECIDED, f"{names.stage} has no COMMIT.json")
        return _finish_trash(names, disk)
    record = decode_record(disk.read(names.record), where=names.record)
    if record.job != names.job:
        raise CorruptData(f"{names.record} is of {record.job}", url=names.record)
    # Where the stage is now says where the output goes: a file system may be mounted elsewhere on this host.
    record = msgspec.structs.replace(record, output=names.output)
    try:
        publish_record(record, disk, patience)
    except CommitRefused as error:
        return Recovered(names.job, names.output, Outcome.REFUSED, error.message)
    clean_up(names, disk)
    return Recovered(names.job, names.output, Outcome.PUBLISHED)


def _finish_trash(names: StageNames, disk: Disk) -> Recovered:
    """A retraction or a clean-up that was cut short; a retraction of what is published only says so."""
    if disk.stat(names.trash) is None and look_at(names.output, disk).job != names.job:
        return Recovered(names.job, names.output, Outcome.UNDECIDED, f"there is no {names.stage}")
    published = retract(names, disk)
    clean_up(names, disk)
    return Recovered(names.job, names.output, Outcome.PUBLISHED if published else Outcome.WITHDRAWN)
