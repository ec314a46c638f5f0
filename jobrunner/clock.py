"""The system clock, behind an interface that tests replace.

`now()` is monotonic and orders waits; `wall()` is only for what people read.
"""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Unix seconds; may jump. Only for display."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


def rfc3339(unix_ms: int) -> str:
    """Unix milliseconds as RFC 3339 in UTC, e.g. 2026-11-22T21:18:13.042Z."""
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{unix_ms % 1000:03d}Z"
