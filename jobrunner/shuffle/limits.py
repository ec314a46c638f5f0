"""What the shuffle takes from a job's plan. `planner.plan.ShufflePlan` is one; tests make their own."""

from typing import Protocol


class ShuffleLimits(Protocol):
    """Field names and units are those of the `shuffle` section of the settings."""

    @property
    def buffer_bytes_max(self) -> int: ...
    @property
    def merge_runs_max(self) -> int: ...
    @property
    def batch_rows_max(self) -> int: ...
    @property
    def fetch_bytes_max(self) -> int: ...
    @property
    def fetch_retries_max(self) -> int: ...
    @property
    def fetch_timeout_ms(self) -> int: ...
    @property
    def compression(self) -> str: ...


def buffer_bytes(limits: ShuffleLimits) -> int:
    """The buffer, held under 1 GiB: a key column has 32-bit offsets."""
    return min(limits.buffer_bytes_max, 1 << 30)


def batch_bytes(limits: ShuffleLimits) -> int:
    """About how large one batch may be, so that a merge of merge_runs_max runs stays within the buffer."""
    return max(16_384, buffer_bytes(limits) // limits.merge_runs_max)
