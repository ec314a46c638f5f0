"""How long a job stands still when a process is killed: median, minimum and maximum of several kills.

    python tests/benchmarks/recovery.py [--rounds 5] [--set section.key=value]...

(a) The leading master is killed while short maps run: until the first attempt that the next leader assigns starts.
(b) The same, with the leader stopped (SIGSTOP) instead: its sockets stay open, so only its silence tells.
(c) A worker's agent is killed while a long map runs: until another worker starts that map.
Times are from just before the signal to the first line of the attempt's user code, by the wall clock of this machine.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobrunner import Count, Job, param, task
from jobrunner.api.handle import JobHandle
from jobrunner.cluster.directory import Daemon
from jobrunner.ids import Epoch, JobId
from jobrunner.master.commands import Assign, decode_entry
from jobrunner.raft.messages import EntryKind
from jobrunner.testing.local import LocalCluster, wait_until
from tests.crash.cluster import committed_entries

_SHORT_S, _LONG_S = 0.05, 2.0
_CALM_S = 0.5  # Between a start and the next kill.


def tell_start(line: str) -> Iterator[str]:
    """One record a file: say when it was read and by which attempt, then take `seconds`."""
    with open(param("starts", default=""), "a", encoding="utf-8") as file:
        file.write(f"{task().partition} {task().attempt} {time.time()}\n")
    time.sleep(param("seconds", default=0.0))
    yield line


starts = Job(map=tell_start, reduce=Count())


class Round:
    """One job on a running cluster."""

    def __init__(self, cluster: LocalCluster, root: Path, *, tasks: int, seconds: float) -> None:
        self._cluster = cluster
        self.starts = root / "starts"
        source = root / "in"
        source.mkdir(parents=True)
        self.starts.touch()
        for number in range(tasks):
            (source / f"{number:04}.txt").write_text(f"{number}\n")
        self.handle: JobHandle = cluster.client.submit(
            starts, input=[source], output=root / "out", reducers=1,
            params={"starts": str(self.starts), "seconds": seconds},
        )  # fmt: skip

    def started(self) -> list[tuple[int, int, float]]:
        """(partition, attempt, seconds since 1970), as written."""
        rows = []
        for line in self.starts.read_text().splitlines():
            partition, number, at = line.split()
            rows.append((int(partition), int(number), float(at)))
        return rows


def wait_whole(cluster: LocalCluster) -> None:
    """Every master follows or leads: one killed before may still be starting."""
    wait_until(lambda: all(master.role in ("leader", "follower") for master in cluster.status().masters))
    time.sleep(_CALM_S)


def leader_killed(cluster: LocalCluster, root: Path) -> float:
    gap_s = _without_leader(cluster, root, lambda leader: [cluster.kill_master(leader.id)])
    cluster.start_missing()
    return gap_s


def leader_stopped(cluster: LocalCluster, root: Path) -> float:
    stopped: list[int] = []
    try:
        return _without_leader(cluster, root, lambda leader: stopped.extend(cluster.pause(leader)))
    finally:
        cluster.resume(stopped)


def _without_leader(cluster: LocalCluster, root: Path, strike: Callable[[Daemon], object]) -> float:
    wait_whole(cluster)
    work = Round(cluster, root, tasks=100, seconds=_SHORT_S)
    wait_until(lambda: len(work.started()) > 20)
    epoch, leader = cluster.status().epoch, cluster.leader()
    struck_at = time.time()
    strike(leader)
    work.handle.wait(120)
    later = assigned_after(cluster, work.handle.id, Epoch(epoch), except_slot=leader.id)
    return min(at for partition, _, at in work.started() if partition in later) - struck_at


def assigned_after(cluster: LocalCluster, job: JobId, epoch: Epoch, *, except_slot: int) -> set[int]:
    """Partitions of the map stage that were assigned in an epoch after `epoch`."""
    found: set[int] = set()
    for master in cluster.masters:
        if master.id == except_slot:
            continue
        for entry in committed_entries(cluster.directory / f"master-{master.id}"):
            if entry.kind == EntryKind.DATA:
                decoded = decode_entry(entry.data)
                if decoded.epoch > epoch and isinstance(decoded.command, Assign):
                    found |= {p.partition for p in decoded.command.placements if p.job == job and p.stage == "map"}
    return found


def worker_killed(cluster: LocalCluster, root: Path) -> float:
    wait_whole(cluster)
    work = Round(cluster, root, tasks=2, seconds=_LONG_S)
    wait_until(lambda: len(work.started()) == 2)
    running = {attempt: worker.id for worker in cluster.status().workers for attempt in worker.running}
    attempt, worker = next((a, w) for a, w in running.items() if "/map/" in a)
    partition = int(attempt.split("/")[-2])
    killed_at = time.time()
    cluster.kill_worker(worker)
    work.handle.wait(120)
    cluster.start_missing()
    return max(at for p, _, at in work.started() if p == partition) - killed_at


_MEASURES = {"leader killed": leader_killed, "leader stopped": leader_stopped, "worker killed": worker_killed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="kills of each kind (default 5)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting")
    options = parser.parse_args()
    settings: dict[str, object] = {"input.split_files_max": 1}
    settings.update(item.split("=", 1) for item in options.set)
    with tempfile.TemporaryDirectory(prefix="jobrunner-recovery-") as name:
        root = Path(name)
        with LocalCluster(masters=3, workers=2, slots=2, settings=settings, directory=root / "cluster") as cluster:
            for title, measure in _MEASURES.items():
                gaps_s = [measure(cluster, root / f"{title} {number}") for number in range(options.rounds)]
                ms = [gap_s * 1000 for gap_s in gaps_s]
                print(f"{title}: median {statistics.median(ms):.0f} ms, min {min(ms):.0f}, max {max(ms):.0f}, "
                      f"of {len(ms)} on {os.cpu_count()} processors", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
