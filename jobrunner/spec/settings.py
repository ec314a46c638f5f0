"""Every timeout and every limit, with its default, unit and reason: the one list that files, flags and docs follow.

Frozen structs: daemons read them from `cluster.toml` without pydantic. `load.py` builds the validated models
for people from this list, and `conf/*.toml` is checked against it by a test.
Each field is `Annotated[type, about("reason", unit=..., ge=..., le=...)]`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec


@dataclass(frozen=True)
class About:
    """Reason and bounds of one setting."""

    reason: str
    unit: str = ""
    ge: int | None = None
    le: int | None = None


def about(reason: str, *, unit: str = "", ge: int | None = None, le: int | None = None) -> About:
    return About(reason, unit, ge, le)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ClusterSection(Section, frozen=True):
    masters: Annotated[int, about("masters of the group; 3 survive the loss of one, 5 of two", ge=1, le=7)] = 3
    workers: Annotated[int, about("worker agents that `cluster up` starts", ge=0, le=1000)] = 2
    host: Annotated[str, about("address that daemons bind and announce; other than loopback needs TLS")] = "127.0.0.1"
    tls_cert: Annotated[str, about("certificate file; reserved, TLS is not built yet")] = ""
    tls_key: Annotated[str, about("key file; reserved, TLS is not built yet")] = ""
    start_timeout_ms: Annotated[int, about("how long a start may take before it is an error", unit="ms", ge=100)] = (
        30_000
    )


class RaftSection(Section, frozen=True):
    heartbeat_ms: Annotated[int, about("leader's beat to its followers", unit="ms", ge=5)] = 50
    election_ms: Annotated[
        int, about("silence before an election; drawn from this to twice this", unit="ms", ge=50)
    ] = 500
    append_bytes_max: Annotated[
        int, about("entries in one message on the control connection", unit="bytes", ge=1024)
    ] = 65_536
    bulk_bytes_max: Annotated[int, about("entries in one message on the bulk connection", unit="bytes", ge=65_536)] = (
        786_432
    )
    inflight_max: Annotated[int, about("unacknowledged append messages a follower may have", ge=1)] = 64
    proposals_bytes_max: Annotated[
        int, about("uncommitted bytes before proposals are refused", unit="bytes", ge=65_536)
    ] = 67_108_864
    segment_bytes_max: Annotated[int, about("size at which a log segment is closed", unit="bytes", ge=4096)] = (
        16_777_216
    )
    cache_bytes_max: Annotated[
        int, about("recent entries kept in memory; older are read from disk", unit="bytes", ge=65_536)
    ] = 33_554_432
    queue_bytes_max: Annotated[
        int, about("unsent bytes per peer connection before messages are dropped", unit="bytes", ge=1_048_576)
    ] = 8_388_608
    sync_hang_ms: Annotated[int, about("a disk sync longer than this makes a leader step down", unit="ms", ge=100)] = (
        5_000
    )
    snapshot_bytes: Annotated[
        int, about("log applied since the last snapshot before the next is taken", unit="bytes", ge=4096)
    ] = 16_777_216
    snapshot_entries: Annotated[int, about("the same, in entries", ge=10)] = 100_000
    snapshot_piece_bytes: Annotated[
        int, about("piece of a snapshot on its way to a follower", unit="bytes", ge=4096, le=786_432)
    ] = 262_144
    trailing_entries: Annotated[
        int, about("entries kept before a snapshot, so that a slow follower needs none", ge=0)
    ] = 10_000


class SessionSection(Section, frozen=True):
    ttl_ms: Annotated[int, about("silence after which a worker is lost", unit="ms", ge=200)] = 5_000
    beat_ms: Annotated[int, about("a worker's heartbeat", unit="ms", ge=20)] = 1_000
    beacon_ms: Annotated[int, about("the leader's sign of life to clients and workers", unit="ms", ge=20)] = 200


class AttemptSection(Section, frozen=True):
    faults_max: Annotated[int, about("attempts that may fail by the task's own fault before the job fails", ge=1)] = 4
    timeout_ms: Annotated[
        int, about("no record read or written and no progress() for this long kills an attempt", unit="ms", ge=100)
    ] = 600_000
    log_bytes_max: Annotated[
        int, about("kept of each of stdout and stderr; the rest is counted and dropped", unit="bytes", ge=4096)
    ] = 1_048_576
    tail_bytes_max: Annotated[
        int, about("end of a failed attempt's log that is kept in the masters", unit="bytes", ge=256)
    ] = 16_384
    slot_attempts_max: Annotated[int, about("attempts after which a slot process is replaced", ge=1)] = 1_000


class ShuffleSection(Section, frozen=True):
    buffer_bytes_max: Annotated[
        int, about("map output or reduce input in memory per slot before it spills", unit="bytes", ge=65_536)
    ] = 67_108_864
    merge_runs_max: Annotated[int, about("sorted runs merged at once", ge=2)] = 64
    batch_rows_max: Annotated[int, about("rows in one record batch", ge=16)] = 16_384
    fetch_bytes_max: Annotated[int, about("bytes of map output in flight per reducer", unit="bytes", ge=65_536)] = (
        50_331_648
    )
    fetch_retries_max: Annotated[int, about("tries of one fetch before it is reported as lost output", ge=1)] = 4
    fetch_timeout_ms: Annotated[
        int, about("silence of a block server before a fetch is tried again", unit="ms", ge=100)
    ] = 10_000
    compression: Annotated[Literal["lz4", "zstd", "none"], about("of block files")] = "lz4"


class InputSection(Section, frozen=True):
    split_bytes: Annotated[int, about("size of an input split; small files share one", unit="bytes", ge=1)] = 33_554_432
    split_files_max: Annotated[int, about("small files packed into one split", ge=1)] = 10_000
    errors: Annotated[
        Literal["replace", "strict", "surrogateescape"], about("undecodable bytes: replace and count, fail, or carry")
    ] = "replace"
    line_bytes_max: Annotated[
        int, about("longest line; a longer one fails the attempt by name", unit="bytes", ge=1024)
    ] = 268_435_456


class OutputSection(Section, frozen=True):
    publish_tries_max: Annotated[int, about("tries of a publication that fails for reasons time may mend", ge=1)] = 10
    retry_ms: Annotated[int, about("pause between such tries", unit="ms", ge=1)] = 500


class WorkerSection(Section, frozen=True):
    slots: Annotated[int, about("attempts at once; 0 means the machine's processors divided by its workers", ge=0)] = 0
    import_timeout_ms: Annotated[int, about("importing a job's modules may take this long", unit="ms", ge=100)] = 60_000
    queue_max: Annotated[
        int, about("attempts assigned ahead per slot, so that no slot waits for the masters", ge=0, le=64)
    ] = 4
    stop_timeout_ms: Annotated[int, about("how long a stopping agent waits for its slots", unit="ms", ge=10)] = 2_000


class LocksSection(Section, frozen=True):
    ttl_ms: Annotated[int, about("silence after which a client's locks are lost, if it asks for no other", unit="ms",
                                 ge=100)] = 10_000  # fmt: skip
    delay_ms: Annotated[
        int, about("how long a lock stays closed after its holder failed, if it asks for no other", unit="ms", ge=0)
    ] = 1_000
    ttl_ms_min: Annotated[int, about("shortest ttl a client may ask for", unit="ms", ge=100)] = 500
    ttl_ms_max: Annotated[int, about("longest ttl a client may ask for", unit="ms", ge=1_000)] = 3_600_000
    delay_ms_max: Annotated[int, about("longest delay a client may ask for", unit="ms", ge=0)] = 60_000
    sessions_max: Annotated[int, about("clients' sessions open at once", ge=1)] = 10_000
    unanswered_max: Annotated[int, about("requests of one session whose answers it has not acknowledged", ge=1)] = 1_024
    locks_max: Annotated[int, about("locks held, waited for or closed at once", ge=1)] = 100_000
    waiters_max: Annotated[int, about("clients in line for one lock", ge=1)] = 1_000
    name_bytes_max: Annotated[
        int, about("length of a lock's name, a key or an owner", unit="bytes", ge=16, le=4096)
    ] = 1_024
    value_bytes_max: Annotated[int, about("length of one small value", unit="bytes", ge=16, le=262_144)] = 65_536
    kv_bytes_max: Annotated[int, about("keys and small values together", unit="bytes", ge=4096)] = 67_108_864
    history_bytes_max: Annotated[int, about("changes kept for those who watch", unit="bytes", ge=4096)] = 8_388_608
    steps_max: Annotated[int, about("steps in one transaction", ge=1, le=1024)] = 64


class LimitsSection(Section, frozen=True):
    frame_bytes_max: Annotated[int, about("largest message between processes", unit="bytes", ge=65_536)] = 1_048_576
    piece_bytes: Annotated[int, about("piece of a blob in one log entry", unit="bytes", ge=4096)] = 262_144
    job_bytes_max: Annotated[int, about("code and plan of one job in the masters", unit="bytes", ge=65_536)] = 4_194_304
    jobs_running_max: Annotated[int, about("jobs not ended before a submission is refused", ge=1)] = 1_000
    jobs_kept_max: Annotated[int, about("ended jobs remembered", ge=1)] = 1_000
    tasks_max: Annotated[int, about("tasks in one stage", ge=1)] = 1_000_000
    attempts_kept_max: Annotated[int, about("ended attempts remembered per job, for `logs` and `status`", ge=10)] = (
        1_000
    )
    calls_max: Annotated[int, about("unanswered calls per connection", ge=16)] = 4_096
    reach_timeout_ms: Annotated[int, about("how long a client looks for the cluster", unit="ms", ge=100)] = 60_000
    call_timeout_ms: Annotated[int, about("one call between processes", unit="ms", ge=100)] = 10_000


class Settings(Section, frozen=True):
    """All sections. Precedence when loaded for people: flag, environment, file, default."""

    cluster: ClusterSection = ClusterSection()
    raft: RaftSection = RaftSection()
    session: SessionSection = SessionSection()
    attempt: AttemptSection = AttemptSection()
    shuffle: ShuffleSection = ShuffleSection()
    input: InputSection = InputSection()
    output: OutputSection = OutputSection()
    worker: WorkerSection = WorkerSection()
    locks: LocksSection = LocksSection()
    limits: LimitsSection = LimitsSection()
