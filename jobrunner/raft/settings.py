"""The settings of Raft, in its own words, so that it need not know where settings come from.

Fields, units and reasons are those of the `raft` section of the configuration.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RaftSettings:
    heartbeat_ms: int = 50
    election_ms: int = 500  # Silence before an election: drawn from this to twice this.
    append_bytes_max: int = 65_536  # Larger messages take the bulk connection.
    bulk_bytes_max: int = 786_432  # Also the largest proposal.
    inflight_max: int = 64
    proposals_bytes_max: int = 67_108_864
    segment_bytes_max: int = 16_777_216
    cache_bytes_max: int = 33_554_432
    queue_bytes_max: int = 8_388_608  # The transport's; Raft itself does not queue.
    sync_hang_ms: int = 5_000
    snapshot_bytes: int = 16_777_216  # Of entries applied since the last snapshot, before the next is taken;
    snapshot_entries: int = 100_000  # or so many.
    snapshot_piece_bytes: int = 262_144
    trailing_entries: int = 10_000  # Kept before a snapshot, so that a slow follower needs none.
