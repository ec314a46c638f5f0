"""A worker, as its launcher describes it."""

import socket
from dataclasses import dataclass

from jobrunner.spec.settings import Settings


@dataclass(frozen=True)
class AgentConfig:
    """All that a worker process needs. `listening` is a bound socket; without it host and port are bound."""

    cluster_id: str
    cluster_token: str
    masters: tuple[str, ...]
    settings: Settings
    directory: str  # worker-N/
    cluster_dir: str  # jobs/JOB/logs/ is below it.
    name: int  # The N of worker-N.
    slots: int
    host: str = "127.0.0.1"
    port: int = 0
    listening: socket.socket | None = None
    ignore_interrupt: bool = False  # Ctrl-C is for the process that embeds us; it stops us.
