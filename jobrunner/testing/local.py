"""LocalCluster: real masters and workers of this machine in a directory of their own, for tests that hurt them."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from jobrunner.api.client import Client
from jobrunner.api.prepare import resolve_settings
from jobrunner.cluster.directory import ClusterDir, Daemon
from jobrunner.cluster.local import cluster_down, cluster_up, start_missing, wait_accepting
from jobrunner.control.messages import ClusterInfo
from jobrunner.errors import Unavailable
from jobrunner.spec.settings import Settings

_LOG_BYTES = 20_000


class LocalCluster:
    """A cluster as `jobrunner cluster up` starts it; stopped and deleted at the end of the `with`.

    Kills are SIGKILL, by pid, of the daemon alone unless said: what a worker forked dies with it.
    """

    def __init__(
        self,
        masters: int = 3,
        workers: int = 2,
        slots: int = 2,
        *,
        settings: Settings | Mapping[str, object] | None = None,
        directory: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`env` is added to the daemons' environment (say, JOBRUNNER_FAILPOINTS)."""
        resolved = resolve_settings(settings)
        self._settings = _with_masters(resolved, masters)
        self._workers, self._slots = workers, slots
        self._own = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="jobrunner-test-"))
        self._env = dict(env or {})
        self._client: Client | None = None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def up(self) -> None:
        """Start what is not running."""
        with _environment(self._env):
            cluster_up(self.directory, self._settings, workers=self._workers, slots=self._slots)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        for daemon in self._daemons():
            self._send(daemon, signal.SIGCONT)
        cluster_down(self.directory)
        if self._own:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client.from_dir(self.directory, settings=self._settings)
        return self._client

    # --- looking -----------------------------------------------------------------------------------------------------

    def status(self) -> ClusterInfo:
        return self.client.cluster()

    def leader(self) -> Daemon:
        """The leading master. Waits for one; raises Unavailable."""
        info = self.status()
        if info.leader is None:
            raise Unavailable("no master leads")
        return self.cluster.file.masters[info.leader]

    @property
    def cluster(self) -> ClusterDir:
        return ClusterDir.read(self.directory)

    @property
    def masters(self) -> list[Daemon]:
        return self.cluster.file.masters

    @property
    def workers(self) -> list[Daemon]:
        return self.cluster.file.workers

    def _daemons(self) -> list[Daemon]:
        return [*self.masters, *self.workers]

    def logs(self) -> str:
        """The end of every daemon's log: print it when a test fails."""
        parts = []
        for path in sorted(self.directory.glob("*-*/*.log")):
            if path.name in ("master.log", "worker.log"):
                text = path.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
                parts.append(f"--- {path.relative_to(self.directory)}\n{text}")
        return "\n".join(parts)

    # --- hurting -----------------------------------------------------------------------------------------------------

    def kill_worker(self, number: int = 0) -> int:
        """Kill a worker's agent; returns its pid."""
        return self._send(self.workers[number], signal.SIGKILL)

    def kill_master(self, slot: int) -> int:
        return self._send(self.masters[slot], signal.SIGKILL)

    def kill_leader(self) -> int:
        """Kill the leading master; returns its slot."""
        leader = self.leader()
        self._send(leader, signal.SIGKILL)
        return leader.id

    def pause(self, daemon: Daemon) -> list[int]:
        """SIGSTOP a daemon and all its descendants; returns the pids for `resume`."""
        pids = [daemon.pid, *descendants(daemon.pid)]
        for pid in pids:
            _kill(pid, signal.SIGSTOP)
        return pids

    def resume(self, pids: list[int]) -> None:
        for pid in pids:
            _kill(pid, signal.SIGCONT)

    def start_missing(
        self, *, wait: bool = True, workers: int | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Start every daemon that does not run, as `cluster up` does; with `workers`, have at least that many.

        `env`: the environment's additions for those started now and later.
        """
        if env is not None:
            self._env = dict(env)
        if workers is not None:
            self._workers = max(self._workers, workers)
            self.up()
            return
        cluster = self.cluster
        with _environment(self._env):
            start_missing(cluster)
        if wait:
            wait_accepting(cluster)

    def _send(self, daemon: Daemon, number: signal.Signals) -> int:
        if daemon.alive:
            _kill(daemon.pid, number)
        if number == signal.SIGKILL:  # Else `start_missing` may see it alive for an instant more.
            wait_until(lambda: not daemon.alive, what=f"the end of pid {daemon.pid}")
        return daemon.pid


def descendants(pid: int) -> list[int]:
    """Pids of all children of a process, and of theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def wait_until(condition: Callable[[], object], *, timeout_s: float = 30.0, what: str = "it") -> None:
    """Poll a condition until it is true. Raises TimeoutError naming what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(0.02)


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _with_masters(settings: Settings, masters: int) -> Settings:
    import msgspec

    return msgspec.structs.replace(settings, cluster=msgspec.structs.replace(settings.cluster, masters=masters))


class _environment:
    """Variables that daemons started meanwhile inherit."""

    def __init__(self, more: Mapping[str, str]) -> None:
        self._more = more
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._more}
        os.environ.update(self._more)

    def __exit__(self, *exc: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
