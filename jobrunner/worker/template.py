"""Templates: the warm processes that slots are forked from, so that a slot costs milliseconds.

    starter ─fork, before any loop or thread─► base template: our imports, Arrow warmed up
                                                  ├─fork─► slot for steps of the commit
                                                  ├─fork─► slot that imports for itself (modules that start threads)
                                                  └─fork─► job template: the user's modules ─fork─► slots of the job

Each has one thread and one loop: requests of the agent, and children's deaths. When the agent is gone, by its socket or
by its pid, a template kills all it forked or adopted, and ends; what dies with a template is told by the kernel.
User code runs in a job template (imports) and in slots, never in the base.
"""

import contextlib
import faulthandler
import io
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobrunner.worker import processes, wire

if TYPE_CHECKING:
    from jobrunner.worker.slot import JobCode

_POLL_S = 5.0  # Deaths wake the loop; this is for user code that took our SIGCHLD handler away.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


@dataclass(frozen=True, slots=True)
class TemplateHandle:
    """The agent's end of the base template. Every process that forks with it must `close` it, but for the agent."""

    socket: socket.socket
    pid: int

    def close(self) -> None:
        self.socket.close()


def start_base_template() -> TemplateHandle:
    """Fork the base template. Call before this process has a loop or a thread; it imports while the caller goes on."""
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        run_child(lambda: _base_main(theirs))
    theirs.close()
    return TemplateHandle(ours, pid)


def run_child(main: Callable[[], None]) -> None:
    """The whole life of a forked child: never returns to the frames of its parent."""
    status = 1
    try:
        main()
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def take_stdio(out: int, err: int) -> None:
    """Make `out` and `err` this process's stdout and stderr, and nothing its stdin."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in {null, out, err} - {0, 1, 2}:
        os.close(fd)


def open_stdio() -> None:
    """Fresh stream objects on 0, 1 and 2: the parent's may hold unwritten text. By lines: a crash loses none."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    for fd, name in ((1, "stdout"), (2, "stderr")):
        raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True))


class Forker:
    """The loop of a template: forks what the agent asks for, tells what died."""

    def __init__(
        self, pipe: wire.Pipe[wire.ToTemplate], fork: Callable[["Forker", wire.ForkTemplate | wire.ForkSlot], None]
    ) -> None:
        self.pipe = pipe
        self._fork = fork
        self._pids: dict[int, int] = {}  # By the agent's number of the child.
        self._helpers = frozenset(processes.children())  # Started by the user's modules; they live as long as we do.
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)

    def serve(self, agent: int) -> None:
        """Until the agent is gone; then nothing that was forked here is left."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        selector = selectors.DefaultSelector()
        selector.register(self.pipe.socket, selectors.EVENT_READ, self._requests)
        selector.register(self._wake, selectors.EVENT_READ, self._drain)
        watch = _open_pid(agent)
        if watch is not None:
            selector.register(watch, selectors.EVENT_READ, lambda: False)
        going = self._requests() if self.pipe.waiting else True
        try:
            while going:
                going = all(key.data() for key, _ in selector.select(_POLL_S))
                self._bury()
        finally:
            self._kill_all()

    def fork(self, child: int, main: Callable[[], None], fds: Sequence[int]) -> None:
        """Fork `main` as the agent's `child`; `fds` are the child's, closed here."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:

            def life() -> None:
                processes.die_with_parent(parent)
                main()

            run_child(life)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._pids[child] = pid
        for fd in fds:
            os.close(fd)

    def _requests(self) -> bool:
        try:
            requests = self.pipe.receive()
        except ConnectionError:
            requests = None
        for request in requests or ():
            if isinstance(request, wire.KillChild):
                if request.child in self._pids:
                    processes.kill_group(self._pids[request.child])
            elif not isinstance(request, wire.Hello):
                self._fork(self, request)
        return requests is not None

    def _drain(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass
        return True

    def _bury(self) -> None:
        """Tell what died. With no child left that the agent knows, what else there is was left by dead ones."""
        exits = processes.reap()
        for exit_ in exits:
            child = next((child for child, pid in self._pids.items() if pid == exit_.pid), None)
            if child is not None:
                del self._pids[child]
                with contextlib.suppress(OSError):  # The agent has gone; the loop is about to see it.
                    self.pipe.send(wire.ChildExited(child, exit_.status, exit_.signal))
        if exits and not self._pids:
            self._kill_rest(keep=self._helpers)

    def _kill_all(self) -> None:
        for pid in self._pids.values():
            processes.kill_group(pid)
        self._kill_rest(keep=frozenset())

    def _kill_rest(self, *, keep: frozenset[int]) -> None:
        for _ in range(100):  # Orphans of those killed become children here; they may have children too.
            processes.reap()
            rest = set(processes.children()) - keep
            if not rest:
                return
            for pid in rest:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


def _open_pid(pid: int) -> int | None:
    """A descriptor that is readable once `pid` is gone, where the system has such."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


# --- the base template ------------------------------------------------------------------------------------------------


def _base_main(sock: socket.socket) -> None:
    processes.begin_child([sock.fileno()])
    processes.adopt_orphans()
    os.environ.update(_ENVIRONMENT)
    pipe: wire.Pipe[wire.ToTemplate] = wire.Pipe(sock, wire.ToTemplate)
    _warm_up()
    hello = pipe.receive_one()
    if hello is not None:
        assert isinstance(hello, wire.Hello), hello
        agent = hello.agent
        Forker(pipe, lambda forker, request: _fork_from_base(forker, request, agent)).serve(agent)


def _warm_up() -> None:
    """Import what slots use and run one aggregation: the first in a process costs tens of milliseconds."""
    import gc

    import numpy
    import pyarrow
    import pyarrow.compute

    import jobrunner.worker.commit_task
    import jobrunner.worker.map_task
    import jobrunner.worker.reduce_task
    import jobrunner.worker.slot  # noqa: F401

    table = pyarrow.table({"key": ["a", "b", "a"], "value": numpy.array([1, 2, 3])})
    table.group_by("key", use_threads=False).aggregate([("value", "sum")])
    gc.collect()
    gc.freeze()


def _fork_from_base(forker: Forker, request: wire.ForkTemplate | wire.ForkSlot, agent: int) -> None:
    fds = forker.pipe.take_fds(3)
    if isinstance(request, wire.ForkTemplate):
        forker.fork(request.child, lambda: _template_main(request, fds, agent), fds)
    else:
        forker.fork(request.child, lambda: _slot_main(request, fds, None, fresh=True), fds)


# --- a job's template -------------------------------------------------------------------------------------------------


def _template_main(request: wire.ForkTemplate, fds: list[int], agent: int) -> None:
    from jobrunner.worker.slot import load_code
    from jobrunner.worker.user_code import explain

    sock = socket.socket(fileno=fds[0])
    take_stdio(fds[1], fds[2])
    processes.begin_child([sock.fileno()])
    processes.adopt_orphans()
    open_stdio()
    pipe: wire.Pipe[wire.ToTemplate] = wire.Pipe(sock, wire.ToTemplate)
    _limit_time(request.import_timeout_ms / 1000)
    try:
        code = load_code(request.code, request.plan)
    except BaseException as error:
        failure = explain(error)
        pipe.send(wire.ImportFailed(failure.cause, failure.message, failure.traceback))
        return
    _limit_time(0)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(wire.Ready(processes.threads()))
    Forker(pipe, lambda forker, request: _fork_from_template(forker, request, code)).serve(agent)


def _limit_time(seconds: float) -> None:
    """Be killed by SIGALRM after `seconds` (0: no more), with a traceback on stderr of where it hung."""
    if seconds:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, all_threads=False, chain=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if not seconds:
        faulthandler.unregister(signal.SIGALRM)


def _fork_from_template(forker: Forker, request: wire.ForkTemplate | wire.ForkSlot, code: "JobCode") -> None:
    fds = forker.pipe.take_fds(3)
    assert isinstance(request, wire.ForkSlot), request
    forker.fork(request.child, lambda: _slot_main(request, fds, code, fresh=False), fds)


# --- a slot -----------------------------------------------------------------------------------------------------------


def _slot_main(request: wire.ForkSlot, fds: list[int], code: "JobCode | None", *, fresh: bool) -> None:
    from jobrunner.worker.slot import Slot

    sock = socket.socket(fileno=fds[0])
    take_stdio(fds[1], fds[2])
    processes.begin_child([sock.fileno()])
    if fresh:
        open_stdio()
    Slot(sock, code=code, code_file=request.code, plan_file=request.plan).serve()
