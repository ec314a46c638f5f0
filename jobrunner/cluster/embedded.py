"""Masters and workers for one `jobrunner run`: forked from this command, gone with it.

    command ─fork─► base template: imports Arrow, on the other processor
        │ imports what masters, agents and clients need, once for all of them
        ├─fork, before any loop or thread─► zygote: waits
        │ start(directory) ──────────────────────►  ├─fork─► master 0..n
        │                                           ├─fork─► agent 0..n   (the first has that template)
        └ stop, or its death (the pipe closes) ──►  ends them all, then itself

The zygote starts again what dies unexpectedly, with its old identity and port. All stay in the command's process
group, so that Ctrl-Z stops and `fg` wakes them together. Ctrl-C, a hang-up and `timeout`, which signal all of them,
are the command's to handle: it needs the masters to end its job cleanly.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jobrunner.errors import JobrunnerError, Unavailable
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.cluster.directory import ClusterDir
    from jobrunner.worker.template import TemplateHandle

logger = logging.getLogger(__name__)

_STOP_S = 3.0  # From SIGTERM to SIGKILL.
_RESTARTS_MAX = 100
_RESTART_PAUSE_S = 0.2
_FINAL_STATUSES = (2, 5, 6, 7)  # Starting again would end the same way.


class EmbeddedCluster:
    """A running cluster of this process. `directory` is deleted by `stop` unless `keep` was called."""

    def __init__(self, directory: "ClusterDir", zygote: socket.socket, pids: tuple[int, int]) -> None:
        self._cluster = directory
        self._zygote = zygote
        self._pids = pids
        self._kept = False
        self._stopped = False

    @property
    def directory(self) -> Path:
        return self._cluster.path

    @property
    def cluster_id(self) -> str:
        return self._cluster.cluster_id

    @property
    def token(self) -> str:
        return self._cluster.token

    @property
    def addresses(self) -> list[str]:
        return self._cluster.addresses

    def keep(self) -> None:
        """Leave the directory (logs, the masters' log, attempts) behind for whoever looks for the reason."""
        self._kept = True

    def stop(self) -> None:
        """End all its processes; may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        with _uninterrupted():
            _end_zygote(self._zygote, self._pids)
            if not self._kept:
                shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> "EmbeddedCluster":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Preforked:
    """A zygote that waits to be told what to start, or to go."""

    def __init__(self, zygote: socket.socket, pids: tuple[int, int]) -> None:
        self._zygote = zygote
        self._pids = pids  # Of zygote and base template, both children of this process.

    def start(self, settings: Settings, *, masters: int, workers: int, slots: int) -> EmbeddedCluster:
        """Make a cluster directory and start its processes. Raises JobrunnerError, with the zygote gone."""
        import msgspec

        from jobrunner.cluster.directory import create_cluster_dir

        path = Path(tempfile.mkdtemp(prefix="jobrunner-"))
        try:
            section = msgspec.structs.replace(settings.cluster, masters=masters)
            settings = msgspec.structs.replace(settings, cluster=section)
            directory = create_cluster_dir(path, settings, workers=workers, slots=slots)
            for slot in range(masters):
                directory.init_master(slot)
            self._zygote.sendall(str(path).encode() + b"\n")
        except BaseException as error:
            self.discard()
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, JobrunnerError):
                raise Unavailable(f"cannot start a cluster in {path}: {error}") from error
            raise
        return EmbeddedCluster(directory, self._zygote, self._pids)

    def discard(self) -> None:
        """End the zygote and the template: there is nothing to run, and they have started nothing."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _end_zygote(self._zygote, self._pids)


def prefork_embedded() -> Preforked:
    """Fork template and zygote. Call before this process has a loop or a thread.

    Imports, in between, what the cluster's processes and this one's client need: forks share it, and the template
    imports Arrow meanwhile.
    """
    from jobrunner.worker.template import start_base_template

    template = start_base_template()
    _import_for_children()
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(lambda: _Zygote(theirs, template).run())
    theirs.close()
    template.close()
    os.set_inheritable(ours.fileno(), False)
    return Preforked(ours, (pid, template.pid))


def _end_zygote(zygote: socket.socket, pids: tuple[int, int]) -> None:
    """Close the pipe and bury both; the template sees its agent go, or is killed."""
    zygote.close()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pids[0], 0)
    deadline = time.monotonic() + _STOP_S
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while os.waitpid(pids[1], os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pids[1], signal.SIGKILL)
            time.sleep(0.005)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C once more, in the seconds that stopping takes, must not leave half of it undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _child(main: Callable[[], int]) -> None:
    """The whole life of a forked child: never returns to the frames of its parent."""
    status = 1
    try:
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


@dataclass(slots=True)
class _Child:
    name: str
    main: Callable[[], int]
    restarts: int = 0
    due: float = 0.0  # When to start it again.
    pid: int = field(default=0)


class _Zygote:
    """The parent of an embedded cluster's processes: no loop, no thread, nothing but forks and waits."""

    def __init__(self, command: socket.socket, template: "TemplateHandle") -> None:
        self._command = command
        self._children: list[_Child] = []
        self._template: TemplateHandle | None = template
        self._path = Path()
        self._wake, self._waker = socket.socketpair()

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # Only the pipe ends it; masters that died of one are started again.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for wakeable in (self._wake, self._waker):
            wakeable.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        path = self._command.recv(4096)
        try:
            if path.endswith(b"\n"):
                self._start(Path(path[:-1].decode()))
                self._supervise()
        finally:
            self._end_all()
            if self._template is not None:
                self._template.close()
        return 0

    def _start(self, path: Path) -> None:
        from jobrunner.cluster.directory import ClusterDir

        self._path = path
        directory = ClusterDir.read(path)
        for daemon in directory.file.masters:
            self._children.append(_Child(f"master-{daemon.id}", partial(self._master, directory, daemon.id)))
        for daemon in directory.file.workers:
            self._children.append(_Child(f"worker-{daemon.id}", partial(self._worker, directory, daemon.id)))
        for child in self._children:
            self._fork(child)

    def _fork(self, child: _Child) -> None:
        from jobrunner.worker.processes import die_with_parent

        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:

            def life() -> int:
                die_with_parent(zygote)
                _become_daemon(self._path, child.name, [self._command, self._wake, self._waker])
                return child.main()

            _child(life)
        child.pid = pid
        if child.name == "worker-0" and self._template is not None:
            self._template.close()  # Its agent has it now; a later agent gets one of its own.
            self._template = None

    def _master(self, directory: "ClusterDir", slot: int) -> int:
        from jobrunner.cluster.daemons import Place, reported, serve_master_of

        if self._template is not None:
            self._template.close()
        host, _, port = directory.file.masters[slot].address.rpartition(":")
        return reported(lambda: serve_master_of(directory, slot, Place(host, int(port)), handle_sigint=False))

    def _worker(self, directory: "ClusterDir", number: int) -> int:
        from jobrunner.cluster.daemons import Place, reported, serve_worker_of
        from jobrunner.worker.template import start_base_template

        template = self._template
        if number != 0 or template is None:
            if template is not None:
                template.close()
            template = start_base_template()
        ready = template
        host, _, port = directory.file.workers[number].address.rpartition(":")
        place = Place(host, int(port))
        return reported(lambda: serve_worker_of(directory, number, place, ready, handle_sigint=False))

    # --- supervision -------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Until the command closes its end, or is gone."""
        while True:
            due = [child.due for child in self._children if not child.pid and child.due]
            timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
            ready, _, _ = select.select([self._command, self._wake], [], [], timeout_s)
            if self._command in ready:
                return
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
            self._bury()
            for child in self._children:
                if not child.pid and child.due and child.due <= time.monotonic():
                    child.due = 0.0
                    self._fork(child)

    def _bury(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self._children:
                if child.pid == pid:
                    child.pid = 0
                    final = os.WIFEXITED(status) and os.WEXITSTATUS(status) in _FINAL_STATUSES
                    if not final and child.restarts < _RESTARTS_MAX:
                        child.restarts += 1
                        child.due = time.monotonic() + _RESTART_PAUSE_S

    def _end_all(self) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)
                os.kill(child.pid, signal.SIGCONT)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline and any(child.pid for child in self._children):
            self._bury()
            time.sleep(0.005)
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)


def _import_for_children() -> None:
    """Import once what every master and agent needs; forks share it."""
    import gc

    import jobrunner.cluster.daemons
    import jobrunner.master.server
    import jobrunner.worker.main  # noqa: F401

    with contextlib.suppress(ImportError):
        import uvloop  # noqa: F401
    gc.collect()
    gc.freeze()


def _become_daemon(path: Path, name: str, close: list[socket.socket]) -> None:
    """Its own log as stdout and stderr, its own signals; SIGINT and SIGHUP stay ignored."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for sock in close:
        sock.close()
    (path / name).mkdir(mode=0o700, exist_ok=True)
    log = os.open(path / name / f"{name.partition('-')[0]}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from jobrunner.cluster.daemons import start_logging

    start_logging()
