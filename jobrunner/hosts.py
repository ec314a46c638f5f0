"""This host, and which of its processes are alive: a dead neighbour is noticed at once, without a time-out."""

import os
import socket
from functools import cache
from pathlib import Path

from jobrunner.control.messages import HostInfo


@cache
def this_host() -> HostInfo:
    """Equal boot_id and pid_namespace mean: we see each other's pids. Empty where the system does not tell."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot_id = namespace = ""
    return HostInfo(socket.gethostname(), boot_id, namespace)


def processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_pid_space(other: HostInfo) -> bool:
    mine = this_host()
    return bool(mine.boot_id) and (mine.boot_id, mine.pid_namespace) == (other.boot_id, other.pid_namespace)


def process_alive(pid: int) -> bool:
    """Whether `pid` runs (or is stopped). A zombie, dead but not yet reaped by its parent, is not alive."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
        return _answers_signal(pid)
    except OSError:
        return _answers_signal(pid)
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _answers_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def process_started(pid: int) -> int:
    """Clock ticks since boot when `pid` started (0 if unknown): with the pid it names one process for ever."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
