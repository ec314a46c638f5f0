"""JobPlan: how a job will run, decided once by the client, carried to workers as a blob named by its hash.

    JobPlan ── splits ──► map tasks ── stages ──► reduce tasks ──► output
Masters never decode it: what they need is in SubmitJob.
"""

import hashlib
from typing import Literal

import msgspec

from jobrunner.control.messages import StageSpec
from jobrunner.ids import Hash, JobId


class PlanValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class InputFile(PlanValue, frozen=True):
    """A file as it was when the job was planned; a change while the job runs fails it, by name."""

    url: str
    bytes: int
    mtime_ns: int
    etag: str = ""


class Piece(PlanValue, array_like=True, frozen=True):
    """Bytes [start, start + length) of one input file. Its records are those that begin in it."""

    file: int  # Index into JobPlan.inputs.
    start: int
    length: int


class InputPlan(PlanValue, frozen=True):
    format: Literal["text"]
    errors: Literal["replace", "strict", "surrogateescape"]
    line_bytes_max: int


class OutputPlan(PlanValue, frozen=True):
    """`url` is the canonical directory; parts are `part-00000` + extension."""

    url: str
    if_exists: Literal["error", "replace"]
    format: Literal["text"]
    extension: str


class ShufflePlan(PlanValue, frozen=True):
    reducers: int  # 0 for a map-only job.
    hash_version: int
    buffer_bytes_max: int
    merge_runs_max: int
    batch_rows_max: int
    fetch_bytes_max: int
    fetch_retries_max: int
    fetch_timeout_ms: int
    compression: Literal["lz4", "zstd", "none"]
    sort_values: bool = False


class AttemptPlan(PlanValue, frozen=True):
    timeout_ms: int
    import_timeout_ms: int
    log_bytes_max: int
    tail_bytes_max: int


class JobPlan(PlanValue, frozen=True):
    """Everything a worker needs to run any attempt of the job, but for the code itself."""

    job: JobId
    name: str
    code: Hash  # Blob of the code bundle.
    params: dict[str, str]
    inputs: list[InputFile]
    splits: list[list[Piece]]  # One per map task.
    stages: list[StageSpec]
    input: InputPlan
    output: OutputPlan
    shuffle: ShufflePlan
    attempt: AttemptPlan
    publish_tries_max: int
    retry_ms: int


_decoder = msgspec.msgpack.Decoder(JobPlan)
_encoder = msgspec.msgpack.Encoder(order="deterministic")


def encode_plan(plan: JobPlan) -> bytes:
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> JobPlan:
    return _decoder.decode(data)


def blob_hash(data: bytes) -> Hash:
    """The name of a blob: sha256 of its bytes."""
    return Hash(hashlib.sha256(data).hexdigest())
