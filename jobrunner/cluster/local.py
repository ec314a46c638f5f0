"""`cluster up` and `cluster down`: daemons of this host that outlive the command that starts them.

Run again on the same directory, `cluster up` starts what is not running, each with its old identity and port; nothing
else supervises them.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from jobrunner.clock import rfc3339
from jobrunner.cluster.daemons import default_slots, run_master, run_worker
from jobrunner.cluster.directory import (
    CLUSTER_FILE,
    SETTINGS_FILE,
    ClusterDir,
    Daemon,
    add_worker,
    create_cluster_dir,
    free_ports,
    locked,
)
from jobrunner.cluster.embedded import EmbeddedCluster, prefork_embedded
from jobrunner.control.messages import ClusterInfo, GetCluster, message_decoder
from jobrunner.errors import CorruptData, JobrunnerError, LogTooNew, SpecError, StorageFailed, Unavailable
from jobrunner.hosts import process_started
from jobrunner.rpc.client import Masters
from jobrunner.spec.settings import Settings

__all__ = [
    "ClusterDir",
    "EmbeddedCluster",
    "cluster_down",
    "cluster_up",
    "default_slots",
    "kept_as_it_was",
    "prefork_embedded",
    "run_master",
    "run_worker",
    "start_missing",
    "wait_accepting",
]

_POLL_S = 0.05
_DOWN_S = 10.0  # From SIGTERM to SIGKILL.


def cluster_up(directory: Path, settings: Settings, *, workers: int, slots: int | None) -> ClusterDir:
    """Start a cluster, or what of it is not running; return when it accepts jobs.

    An existing cluster keeps its masters, settings and slots; it gets more workers if `workers` asks for more.
    Raises SpecError (the directory, a port), Unavailable (not ready in time), each with what the logs say.
    """
    directory = directory.absolute()
    with locked(directory):
        if (directory / CLUSTER_FILE).exists():
            cluster = ClusterDir.read(directory)
            _add_workers(cluster, workers)
        else:
            per_worker = slots or settings.worker.slots or default_slots(workers)
            cluster = create_cluster_dir(directory, settings, workers=workers, slots=per_worker)
        for daemon in cluster.file.masters:
            cluster.init_master(daemon.id)
        started = start_missing(cluster)
        try:
            wait_accepting(cluster)
        except BaseException:
            _stop(started)
            raise
    return cluster


def kept_as_it_was(cluster: ClusterDir, settings: Settings, *, workers: int | None, slots: int | None) -> list[str]:
    """What was asked of an existing cluster that it does not follow, in lines; `workers` None: as many as it has."""
    file = cluster.file
    pairs = [("masters", settings.cluster.masters, len(file.masters)), ("workers", workers, len(file.workers))]
    pairs.append(("slots of each worker", slots or settings.worker.slots or None, file.slots))
    lines = [f"{what}: stays {found}, not {asked}" for what, asked, found in pairs if asked not in (None, found)]
    theirs, asked_for = msgspec.to_builtins(cluster.settings()), msgspec.to_builtins(settings)
    for section, keys in theirs.items():
        for key, found in keys.items():
            asked = asked_for[section][key]
            if asked != found and (section, key) not in _COUNTS:
                lines.append(f"{section}.{key}: stays {found}, not {asked}; to change it, edit {SETTINGS_FILE} between "
                             "`cluster down` and `cluster up`")  # fmt: skip
    return lines


_COUNTS = {("cluster", "masters"), ("cluster", "workers"), ("worker", "slots")}  # In cluster.json.


def _add_workers(cluster: ClusterDir, workers: int) -> None:
    missing = workers - len(cluster.file.workers)
    if missing > 0:
        host = cluster.file.masters[0].address.rpartition(":")[0]
        for port in free_ports(host, missing):
            add_worker(cluster, port=port)
        cluster.write()


def start_missing(cluster: ClusterDir) -> list[Daemon]:
    """Start every daemon that does not run; returns those. Their pids are in cluster.json when this returns."""
    started = []
    for role, daemons in (("master", cluster.file.masters), ("worker", cluster.file.workers)):
        for daemon in daemons:
            if not daemon.alive:
                _start(cluster, role, daemon)
                started.append(daemon)
    cluster.write()
    return started


def _start(cluster: ClusterDir, role: str, daemon: Daemon) -> None:
    home = cluster.path / f"{role}-{daemon.id}"
    home.mkdir(mode=0o700, exist_ok=True)
    env = {**os.environ, "PYTHONHASHSEED": str(cluster.file.hash_seed)}
    with open(home / f"{role}.log", "ab") as log:
        process = subprocess.Popen(
            daemon.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd=str(cluster.path),
            start_new_session=True,
        )
    daemon.pid, daemon.started = process.pid, process_started(process.pid)
    daemon.start_time = rfc3339(int(time.time() * 1000))
    _CHILDREN[process.pid] = process


_CHILDREN: dict[int, "subprocess.Popen[bytes]"] = {}  # Started by this process: it must bury them if they die early.


def wait_accepting(cluster: ClusterDir) -> None:
    """Wait until the cluster has a leader and every worker that runs has a session with it."""
    timeout_s = cluster.settings().cluster.start_timeout_ms / 1000
    asyncio.run(_wait_accepting(cluster, timeout_s))


async def _wait_accepting(cluster: ClusterDir, timeout_s: float) -> None:
    decoder = message_decoder()
    masters = Masters(
        tuple(cluster.addresses),
        cluster_id=cluster.cluster_id,
        cluster_token=cluster.token,
        role="client",
        decode=decoder.decode,
        settings=cluster.settings(),
    )
    deadline = time.monotonic() + timeout_s
    missing = "a leader"
    try:
        while time.monotonic() < deadline:
            _raise_if_ended(cluster)
            if _just_died(cluster):
                start_missing(cluster)
            try:
                info = await masters.call(GetCluster(), deadline_s=1.0)
            except Unavailable:
                continue
            assert isinstance(info, ClusterInfo)
            live = {(worker.id, worker.pid) for worker in info.workers if worker.state == "live"}
            absent = [daemon for daemon in cluster.file.workers if (daemon.id, daemon.pid) not in live]
            if not absent:
                return
            missing = f"worker {absent[0].id}"
            await asyncio.sleep(_POLL_S)
    finally:
        await masters.close()
    raise Unavailable(f"the cluster in {cluster.path} is not ready after {timeout_s:g} s: {missing} is missing")


def _raise_if_ended(cluster: ClusterDir) -> None:
    """A daemon that ended while starting says why in its log; its exit status is ours."""
    for role, daemons in (("master", cluster.file.masters), ("worker", cluster.file.workers)):
        for daemon in daemons:
            process = _CHILDREN.get(daemon.pid)
            status = process.poll() if process is not None else None
            if status is not None:
                log = cluster.path / f"{role}-{daemon.id}" / f"{role}.log"
                text = _tail(log)
                raise _error_of_status(status, f"{role} {daemon.id} ended while starting (status {status}): {text}")


def _just_died(cluster: ClusterDir) -> bool:
    """A daemon of an earlier start was still dying when it was looked at."""
    daemons = [*cluster.file.masters, *cluster.file.workers]
    return any(not daemon.alive and daemon.pid not in _CHILDREN for daemon in daemons)


def _error_of_status(status: int, message: str) -> JobrunnerError:
    for kind in (SpecError, CorruptData, StorageFailed, LogTooNew):
        if kind.exit_status == status:
            return kind(message)
    return Unavailable(message)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return f"see {log}"
    critical = [line for line in lines[-50:] if " CRITICAL " in line]
    if critical:
        return critical[-1].partition(" CRITICAL ")[2].partition(": ")[2]
    return lines[-1] if lines else f"see {log}"


def cluster_down(directory: Path) -> list[str]:
    """Stop all daemons of the directory, workers first; returns a line for each that ran. Raises SpecError."""
    directory = directory.absolute()
    cluster = ClusterDir.read(directory)
    with locked(directory):
        lines = []
        for role, daemons in (("worker", cluster.file.workers), ("master", cluster.file.masters)):
            running = [daemon for daemon in daemons if daemon.alive]
            _stop(running)
            lines += [f"{role} {daemon.id} (pid {daemon.pid}) stopped" for daemon in running]
        return lines


def _stop(daemons: list[Daemon]) -> None:
    for daemon in daemons:
        _signal(daemon, signal.SIGTERM)
        _signal(daemon, signal.SIGCONT)
    _wait_gone(daemons, lambda daemon: _signal(daemon, signal.SIGKILL))


def _signal(daemon: Daemon, number: signal.Signals) -> None:
    if daemon.alive:
        os.kill(daemon.pid, number)


def _wait_gone(daemons: list[Daemon], at_deadline: Callable[[Daemon], None]) -> None:
    deadline = time.monotonic() + _DOWN_S
    while any(_alive(daemon) for daemon in daemons):
        if time.monotonic() > deadline:
            for daemon in daemons:
                at_deadline(daemon)
            deadline = float("inf")
        time.sleep(_POLL_S / 5)


def _alive(daemon: Daemon) -> bool:
    process = _CHILDREN.get(daemon.pid)
    if process is not None:
        process.poll()
    return daemon.alive
