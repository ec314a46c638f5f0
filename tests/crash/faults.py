"""Failpoints of a running cluster, armed one at a time by files; and looks at what a test has struck."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from jobrunner.control.messages import JobState
from jobrunner.failpoints import NAMES
from jobrunner.master.commands import AnyCommand, decode_entry
from jobrunner.raft.messages import EntryKind
from jobrunner.testing.local import LocalCluster, descendants, wait_until
from tests.crash.cluster import committed_entries

ENDED = (JobState.COMMITTED, JobState.FAILED, JobState.KILLED)


class Faults:
    """The directory of JOBRUNNER_FAILPOINTS_DIR: whichever process passes an armed point first acts, once."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory

    @property
    def env(self) -> dict[str, str]:
        return {"JOBRUNNER_FAILPOINTS_DIR": str(self._directory)}

    def arm(self, name: str, action: str) -> None:
        assert name in NAMES, name
        draft = self._directory / f".{name}"
        draft.write_text(action)
        draft.rename(self._directory / name)

    def struck(self, name: str) -> int:
        """Pid of the process that acted; 0 if none has. Waits for nothing."""
        found = list(self._directory.glob(f"{name}.[0-9]*"))
        return int(found[0].name.rpartition(".")[2]) if found else 0

    def wait_struck(self, name: str) -> int:
        wait_until(lambda: self.struck(name), what=f"passing {name}")
        return self.struck(name)

    def wait_paused(self, name: str) -> int:
        pid = self.wait_struck(name)
        wait_until(lambda: process_state(pid) == "T", what=f"pausing at {name}")
        return pid

    def clear(self) -> None:
        for path in self._directory.iterdir():
            path.unlink()


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def make_ready(cluster: LocalCluster, *, workers: int | None = None) -> None:
    """No daemon is stopped or missing, whatever the test before has left, and the cluster accepts jobs.

    With `workers` it is enough that so many have a session; the others may still be starting.
    """
    for daemon in [*cluster.masters, *cluster.workers]:
        if daemon.alive:
            cluster.resume([daemon.pid, *descendants(daemon.pid)])
    cluster.start_missing(wait=workers is None)
    wait_until(lambda: all(m.role in ("leader", "follower") for m in cluster.status().masters), what="all masters")
    if workers is not None:
        wait_until(lambda: live_workers(cluster) >= workers, what=f"the session of {workers} workers")


def live_workers(cluster: LocalCluster) -> int:
    """Workers with a session, of those that run."""
    running = {daemon.pid for daemon in cluster.workers if daemon.alive}
    return sum(worker.state == "live" and worker.pid in running for worker in cluster.status().workers)


def end_stopped(pids: list[int]) -> None:
    """Let stopped processes whose parents were killed find that out."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


def committed_commands(cluster: LocalCluster, slot: int) -> Iterator[AnyCommand]:
    """Every command in the log of one master, in order, up to what it knows to be committed."""
    for entry in committed_entries(cluster.directory / f"master-{slot}"):
        if entry.kind == EntryKind.DATA:
            yield decode_entry(entry.data).command


def count_commands(cluster: LocalCluster, kind: type) -> int:
    """How many commands of a kind are committed, by the master that knows most."""
    return max(sum(isinstance(c, kind) for c in committed_commands(cluster, m.id)) for m in cluster.masters)
