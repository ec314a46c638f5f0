"""Proof, from the manifest alone, that an output is what was committed. Needs no cluster."""

import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobrunner.commit.manifest import Manifest, Part, decode_manifest
from jobrunner.commit.names import SUCCESS, local_path
from jobrunner.errors import CorruptData
from jobrunner.ids import JobId

_READ_BYTES = 1 << 20
_LINE_FORMATS = (".txt", ".jsonl")  # One record a line; in others a record may hold newlines.


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found. An output without problems is complete and as its winners wrote it."""

    path: str
    job: JobId | None = None
    parts: int = 0
    records: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)  # One line each.

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_output(url: str) -> VerifyReport:
    """Read every part and compare with _SUCCESS. Raises OSError only if `url` cannot be read at all."""
    path = local_path(url)
    success = os.path.join(path, SUCCESS)
    try:
        with open(success, "rb") as file:
            manifest = decode_manifest(file.read(), where=success)
    except (FileNotFoundError, NotADirectoryError):
        return VerifyReport(path, problems=[f"{success} is missing: there is no committed output"])
    except CorruptData as error:
        return VerifyReport(path, problems=[error.message])
    problems = list(_manifest_problems(manifest))
    for part in manifest.parts:
        problems += _part_problems(path, part)
    listed = {part.name for part in manifest.parts}
    for name in sorted(os.listdir(path)):
        if name not in listed and not name.startswith(("_", ".")):
            problems.append(f"{name} is not in the manifest")
    return VerifyReport(
        path,
        manifest.job,
        parts=len(manifest.parts),
        records=sum(part.records for part in manifest.parts),
        bytes=sum(part.bytes for part in manifest.parts),
        problems=problems,
    )


def _manifest_problems(manifest: Manifest) -> Iterator[str]:
    """One winner a partition, one part a name, no partition left out."""
    winners: dict[int, set[tuple[int, int]]] = {}
    for part in manifest.parts:
        winners.setdefault(part.partition, set()).add((part.attempt, part.token))
    for partition, attempts in sorted(winners.items()):
        if len(attempts) > 1:
            yield f"partition {partition} has parts of {len(attempts)} attempts"
    for name, times in Counter(part.name for part in manifest.parts).items():
        if times > 1:
            yield f"{name} is listed {times} times"
    for partition in sorted(set(range(max(winners, default=-1) + 1)) - winners.keys()):
        yield f"partition {partition} has no part"


def _part_problems(path: str, part: Part) -> Iterator[str]:
    if "/" in part.name:
        yield f"{part.name!r} is not the name of a part"
        return
    full = os.path.join(path, part.name)
    try:
        if not stat.S_ISREG(os.lstat(full).st_mode):
            yield f"{part.name} is not a file"
            return
        found = _measure(full)
    except FileNotFoundError:
        yield f"{part.name} is missing"
        return
    if found.bytes != part.bytes:
        yield f"{part.name} has {found.bytes} bytes, not {part.bytes}"
    algorithm, _, digest = part.checksum.partition(":")
    if algorithm != "crc32":
        yield f"{part.name}: checksum {part.checksum!r} is of a kind this version does not know"
    elif found.crc32 != digest:
        yield f"{part.name} has checksum {found.crc32}, not {digest}"
    if part.name.endswith(_LINE_FORMATS) and found.lines != part.records:
        yield f"{part.name} has {found.lines} records, not {part.records}"


@dataclass(frozen=True, slots=True)
class _Measure:
    bytes: int
    lines: int
    crc32: str


def _measure(path: str) -> _Measure:
    size = lines = crc = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            size += len(data)
            lines += data.count(b"\n")
            crc = zlib.crc32(data, crc)
    return _Measure(size, lines, f"{crc:08x}")
