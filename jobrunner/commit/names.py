"""Where a job writes before its output has its name. Pure: text in, text out.

    <parent>/<name>                              the output; made by one rename
    <parent>/.<name>.jr-<job>/                   the stage, on the output's own file system
        attempts/<partition>-<attempt>-<token>/  what one attempt writes; the token is in no other name
        tmp/<uuid>                               files and directories on their way to a name
        commit/<instance>/final/                 the winners' files; becomes the output
        commit/<instance>/old/output/            what the output replaced
        COMMIT.json                              the winners
    <parent>/.<name>.jr-<job>-trash/             the stage after the job: every late step finds nothing

`<instance>` is drawn by the set-up that made the stage. A set-up that wakes after clean-up makes a stage again, but
with another instance, so that a publisher that wakes as well has neither the source nor the target of its renames.
"""

import posixpath
import re
from dataclasses import dataclass

from jobrunner.errors import SpecError
from jobrunner.ids import JobId, parse_job_id

SUCCESS = "_SUCCESS"
PLACEHOLDER = "nothing-was-replaced"  # Occupies old/output when there was no output to move there.
NAME_BYTES_MAX = 255  # Of one path component, on every file system we know.

_STAGE_NAME = re.compile(r"\.(?P<name>.+)\.jr-(?P<job>j-[0-9a-z]{26})(?P<trash>-trash)?")


@dataclass(frozen=True, slots=True)
class Instance:
    """One making of a stage; only its own set-up, before it counted, ever made these directories."""

    path: str

    @property
    def final(self) -> str:
        return posixpath.join(self.path, "final")

    @property
    def old(self) -> str:
        return posixpath.join(self.path, "old", "output")


@dataclass(frozen=True, slots=True)
class StageNames:
    """All paths of one job's commit. `output` is absolute, without a slash at its end."""

    output: str
    job: JobId

    @property
    def parent(self) -> str:
        return posixpath.dirname(self.output)

    @property
    def stage(self) -> str:
        return posixpath.join(self.parent, f".{posixpath.basename(self.output)}.jr-{self.job}")

    @property
    def trash(self) -> str:
        return self.stage + "-trash"

    @property
    def kept(self) -> str:
        """Where a replaced output goes if it must come back and its name is taken by somebody else."""
        return f"{self.output}.before-{self.job}"

    @property
    def attempts(self) -> str:
        return posixpath.join(self.stage, "attempts")

    @property
    def temporary(self) -> str:
        return posixpath.join(self.stage, "tmp")

    @property
    def commit(self) -> str:
        return posixpath.join(self.stage, "commit")

    @property
    def record(self) -> str:
        return posixpath.join(self.stage, "COMMIT.json")

    def attempt(self, *, partition: int, attempt: int, token: int) -> str:
        return posixpath.join(self.attempts, attempt_directory(partition=partition, attempt=attempt, token=token))

    def trashed(self, path: str) -> str:
        """Where a path inside the stage is once the stage is trash."""
        return self.trash + path.removeprefix(self.stage)


def local_path(url: str) -> str:
    """The path of a local URL (`file:///a/b`, or a plain path). Raises SpecError for any other scheme."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    if "://" in url:
        raise SpecError(f"output: {url} is not a local path; only local file systems can be written to")
    return url


def stage_names(url: str, job: JobId) -> StageNames:
    """Paths for an output's canonical URL. Raises SpecError if no output can be there."""
    path = local_path(url).rstrip("/")
    if not path.startswith("/"):
        raise SpecError(f"output: {url!r} is not the absolute path of a directory below /")
    names = StageNames(path, job)
    if len(posixpath.basename(names.trash).encode()) > NAME_BYTES_MAX:
        raise SpecError(f"output: {posixpath.basename(path)!r} is too long a name (we add {len(job) + 11} characters)")
    return names


def parse_stage(path: str) -> tuple[StageNames, bool] | None:
    """Whose stage (or trash: True) a path is, or None if it is no such path."""
    match = _STAGE_NAME.fullmatch(posixpath.basename(path))
    if match is None:
        return None
    try:
        job = parse_job_id(match["job"])
    except ValueError:
        return None
    return StageNames(posixpath.join(posixpath.dirname(path), match["name"]), job), match["trash"] is not None


def attempt_directory(*, partition: int, attempt: int, token: int) -> str:
    return f"{partition}-{attempt}-{token}"


def part_name(partition: int, extension: str) -> str:
    """`part-00000` and the extension (with its dot); sorts by partition up to 99999."""
    return f"part-{partition:05d}{extension}"


def is_part_name(name: str) -> bool:
    """Fit to stand in an output: one component, and neither hidden nor ours."""
    return bool(name) and "/" not in name and "\0" not in name and name[0] not in "._"
