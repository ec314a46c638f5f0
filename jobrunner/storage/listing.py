"""Listing: what the user named as input, as files with their sizes and versions.

Files are taken as they are named; a directory means all files below it, sorted by path, without names that start with
`_` or `.`; a glob means what matches, without such names unless the pattern spells the first character. The order is
that of the inputs; a file named twice comes once. All that is missing or unreadable is reported in one SpecError.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobrunner.errors import SpecError
from jobrunner.storage.filesystem import canonical_url, is_local, local_path, remote, stat_info

_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class ListedFile:
    url: str
    bytes: int
    mtime_ns: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    files: tuple[ListedFile, ...]


def list_inputs(inputs: Sequence[str]) -> Listing:
    """Files of the inputs. Runs in the client, before anything starts. Raises SpecError naming every bad input."""
    problems: list[str] = []
    files: dict[str, ListedFile] = {}
    for text in inputs:
        found = _local(text, problems) if is_local(text) else _remote(text, problems)
        for file in found:
            files.setdefault(file.url, file)
    if problems:
        shown = problems[:_PROBLEMS_SHOWN]
        more = len(problems) - len(shown)
        lines = shown + ([f"and {more} more"] if more else [])
        raise SpecError("input: " + "; ".join(lines), problems=problems)
    return Listing(tuple(files.values()))


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _local(text: str, problems: list[str]) -> Iterator[ListedFile]:
    path = local_path(text)
    if not path:
        problems.append("'' is no path")
        return
    if os.path.lexists(path) or not glob.has_magic(path):
        yield from _named(path, path, problems)
        return
    matches = sorted(match for match in glob.iglob(path, recursive=True) if _wanted(match, path))
    if not matches:
        problems.append(f"{text}: nothing matches")
    for match in matches:
        yield from _named(match, match, problems)


def _wanted(match: str, pattern: str) -> bool:
    """Whether a glob meant this: no component that a wildcard matched is hidden."""
    spelt = {part for part in pattern.split(os.sep) if not glob.has_magic(part)}
    dots = tuple(part[0] for part in pattern.split(os.sep) if glob.has_magic(part) and part[0] in "_.")
    return not any(
        _hidden(part) and part not in spelt and not part.startswith(dots) for part in match.split(os.sep) if part
    )


def _named(path: str, text: str, problems: list[str]) -> Iterator[ListedFile]:
    """A path that the user named: a file, or all below a directory."""
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError as error:
        problems.append(f"{text}: {error.strerror}")
        return
    if stat.S_ISDIR(found.st_mode):
        yield from _below(real, {(found.st_dev, found.st_ino)}, problems)
    else:
        yield from _file(real, found, problems)


def _file(real: str, found: os.stat_result, problems: list[str]) -> Iterator[ListedFile]:
    if not stat.S_ISREG(found.st_mode):
        problems.append(f"{real}: not a regular file")
    elif not os.access(real, os.R_OK):
        problems.append(f"{real}: no permission to read")
    else:
        yield ListedFile(real, found.st_size, found.st_mtime_ns)


def _below(directory: str, above: set[tuple[int, int]], problems: list[str]) -> Iterator[ListedFile]:
    """Files below a directory, by path. `above`: the directories it is in, so that links cannot lead in circles."""
    try:
        with os.scandir(directory) as entries:
            wanted = [entry for entry in entries if not _hidden(entry.name)]
    except OSError as error:
        problems.append(f"{directory}: {error.strerror}")
        return
    # A directory sorts as its name with a slash: then the files of the whole tree are in order of their paths.
    ordered = sorted((entry.name + ("/" if _is_dir(entry) else ""), entry) for entry in wanted)
    for _, entry in ordered:
        try:
            found = entry.stat()
        except OSError as error:
            problems.append(f"{entry.path}: {error.strerror}")
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        if not stat.S_ISDIR(found.st_mode):
            yield from _file(real, found, problems)
            continue
        identity = (found.st_dev, found.st_ino)
        if identity not in above:
            yield from _below(real, above | {identity}, problems)


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _remote(text: str, problems: list[str]) -> Iterator[ListedFile]:
    url = canonical_url(text)
    try:
        filesystem, path = remote(url)
        if glob.has_magic(path) and not filesystem.exists(path):
            roots = sorted(match for match in filesystem.glob(path) if _wanted(match, path))
            if not roots:
                problems.append(f"{text}: nothing matches")
        else:
            roots = [path]
        for root in roots:
            for name, info in sorted(filesystem.find(root, detail=True).items()):
                if name == root or not any(map(_hidden, name.removeprefix(root).strip("/").split("/"))):
                    found = stat_info(info)
                    yield ListedFile(filesystem.unstrip_protocol(name), found.bytes, found.mtime_ns, found.etag)
        for root in roots:
            if not filesystem.exists(root):
                problems.append(f"{text}: No such file or directory")
    except SpecError as error:
        problems.append(error.message)
    except Exception as error:  # Each store has errors of its own; all of them mean that this input cannot be read.
        problems.append(f"{text}: {type(error).__name__}: {error}")
