"""What the client checks of an output before it submits. The masters never open a user's URL.

A check only spares the user a long wait: the path lock and the publishing rename decide.
"""

import fnmatch
import glob
import os
from collections.abc import Iterable

from jobrunner.commit.disk import PosixDisk
from jobrunner.commit.manifest import IfExists
from jobrunner.commit.names import local_path, stage_names
from jobrunner.commit.publish import look_at
from jobrunner.errors import SpecError
from jobrunner.ids import job_id_from_number

_ANY_JOB = job_id_from_number(0)  # All are of one length.


def canonical_output(url: str) -> str:
    """The one name of an output directory: an absolute path, links resolved. Raises SpecError if it is not local."""
    path = local_path(url)
    if not path or "\0" in path:
        raise SpecError(f"output: {url!r} is not the path of a directory")
    return os.path.realpath(os.path.expanduser(path))


def check_output(url: str, if_exists: IfExists, inputs: Iterable[str] = ()) -> str:
    """The output's canonical URL, if a job may write there now; otherwise SpecError, in one line.

    `inputs` are what the user named or what was listed: files, directories, globs, URLs.
    """
    output = canonical_output(url)
    stage_names(output, _ANY_JOB)
    _check_inputs(output, inputs)
    _check_parent(output)
    _check_existing(output, if_exists)
    return output


def _check_existing(output: str, if_exists: IfExists) -> None:
    if os.path.lexists(output) and not os.path.isdir(output):
        raise SpecError(f"output: {output} is a file; expected a directory that is absent or empty")
    try:
        look = look_at(output, PosixDisk())
    except OSError as error:
        raise SpecError(f"output: cannot look at {output}: {error.strerror}") from error
    if look.is_free or (look.job is not None and if_exists == "replace"):
        return
    if look.job is not None:
        raise SpecError(f"output: {output} exists (the output of {look.job}); name another, or use --if-exists replace")
    hint = "; --if-exists replace replaces only outputs of jobrunner" if if_exists == "replace" else ""
    raise SpecError(f"output: {output} exists and is not empty; expected a directory that is absent or empty{hint}")


def _check_parent(output: str) -> None:
    above = os.path.dirname(output)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise SpecError(f"output: {above} is a file; {output} cannot be made below it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SpecError(f"output: no permission to write in {above}")


def _check_inputs(output: str, inputs: Iterable[str]) -> None:
    for url in inputs:
        if "://" in url and not url.startswith("file://"):
            continue
        path = os.path.expanduser(local_path(url))
        if glob.has_magic(path) and not os.path.lexists(path):
            _check_glob(output, path, url)
            continue
        path = os.path.realpath(path)
        if path == output:
            raise SpecError(f"output: {output} is also an input")
        if _is_inside(output, path):
            raise SpecError(f"output: {output} is inside the input {url}: the next run would read it")
        if _is_inside(path, output):
            raise SpecError(f"output: the input {url} is inside {output}")


def _check_glob(output: str, path: str, url: str) -> None:
    """A pattern matches no directory for sure before it is listed, but what it says for certain can be refused."""
    path = os.path.abspath(path)
    named = _fixed_part(path)
    fixed = os.path.realpath(named)
    pattern = os.path.join(fixed, os.path.relpath(path, named))
    if _is_inside(fixed, output) or fixed == output:
        raise SpecError(f"output: the input {url} is inside {output}")
    if fnmatch.fnmatchcase(output, pattern) or ("**" in path and _is_inside(output, fixed)):
        raise SpecError(f"output: {output} matches the input {url}: the next run would read it")


def _fixed_part(path: str) -> str:
    """The directory above the first component with a wildcard."""
    while glob.has_magic(path):
        path = os.path.dirname(path)
    return path


def _is_inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")
