"""COMMIT.json and _SUCCESS: winners, sizes, checksums.

Both are pure functions of the log and the plan (no clock, no leader, no host), so that whoever publishes writes the
same bytes. COMMIT.json is all that publishing needs: with it, an output can be finished without any master.
_SUCCESS is for readers; a reader that finds it finds every part it lists, with that size.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from jobrunner.commit.names import is_part_name
from jobrunner.control.messages import OutputFile, Winner
from jobrunner.errors import CorruptData
from jobrunner.ids import JobId, parse_job_id

IfExists = Literal["error", "replace"]


class InputLike(Protocol):
    """An input file as the plan has it."""

    @property
    def url(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def etag(self) -> str: ...


class InputEntry(msgspec.Struct, frozen=True):
    """An input file as it was when the job was planned."""

    url: str
    bytes: int
    mtime_ns: int
    etag: str = ""


class CommitRecord(msgspec.Struct, frozen=True):
    """COMMIT.json: what will be the output, by partition."""

    job: JobId
    output: str
    if_exists: IfExists
    winners: list[Winner]
    counters: dict[str, int]
    inputs: list[InputEntry]


class Part(msgspec.Struct, frozen=True):
    """One file of the output, and the attempt that wrote it."""

    name: str
    output: str
    partition: int
    attempt: int
    token: int
    records: int
    bytes: int
    checksum: str


class Manifest(msgspec.Struct, frozen=True):
    """_SUCCESS."""

    job: JobId
    parts: list[Part]
    counters: dict[str, int]
    inputs: list[InputEntry]


_encoder = msgspec.json.Encoder(order="deterministic")
_record_decoder = msgspec.json.Decoder(CommitRecord)
_manifest_decoder = msgspec.json.Decoder(Manifest)


def make_record(
    job: JobId,
    *,
    output: str,
    if_exists: IfExists,
    winners: Iterable[Winner],
    counters: dict[str, int],
    inputs: Iterable[InputLike],
) -> CommitRecord:
    """The record of a decided commit. Raises CorruptData if it cannot be one output."""
    record = CommitRecord(
        job,
        output,
        if_exists,
        sorted(winners, key=lambda winner: winner.partition),
        counters,
        [InputEntry(file.url, file.bytes, file.mtime_ns, file.etag) for file in inputs],
    )
    _check_files(record.winners, where=f"the winners of {job}")
    return record


def encode_record(record: CommitRecord) -> bytes:
    """COMMIT.json: equal records give equal bytes."""
    return _indent(_encoder.encode(record))


def decode_record(data: bytes, *, where: str) -> CommitRecord:
    """COMMIT.json read back. Raises CorruptData, naming `where`."""
    try:
        record = _record_decoder.decode(data)
        parse_job_id(record.job)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CorruptData(f"{where} is damaged: {error}", url=where) from error
    _check_files(record.winners, where=where)
    return record


def make_manifest(record: CommitRecord) -> Manifest:
    """What _SUCCESS says of a record, parts in the order of partitions."""
    parts = [_part(winner, file) for winner in record.winners for file in winner.files]
    return Manifest(record.job, parts, record.counters, record.inputs)


def encode_manifest(manifest: Manifest) -> bytes:
    return _indent(_encoder.encode(manifest))


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """A _SUCCESS read back. Raises CorruptData, naming `where`, if it is not one of ours."""
    try:
        manifest = _manifest_decoder.decode(data)
        parse_job_id(manifest.job)
    except (msgspec.MsgspecError, ValueError) as error:
        raise CorruptData(f"{where} is not a manifest of jobrunner: {error}", url=where) from error
    return manifest


def _part(winner: Winner, file: OutputFile) -> Part:
    return Part(
        name=file.file,
        output=file.output,
        partition=winner.partition,
        attempt=winner.attempt,
        token=winner.token,
        records=file.records,
        bytes=file.bytes,
        checksum=file.checksum,
    )


def _check_files(winners: Sequence[Winner], *, where: str) -> None:
    """One winner a partition, one file a name, and no name that leads out of the output or hides in it."""
    names: set[str] = set()
    partitions: set[int] = set()
    for winner in winners:
        if winner.partition in partitions:
            raise CorruptData(f"{where}: partition {winner.partition} has two winners", url=where)
        partitions.add(winner.partition)
        for file in winner.files:
            if not is_part_name(file.file) or file.file in names:
                raise CorruptData(f"{where}: {file.file!r} cannot be the name of one part", url=where)
            names.add(file.file)


def _indent(data: bytes) -> bytes:
    return msgspec.json.format(data, indent=1) + b"\n"
