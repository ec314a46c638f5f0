"""Child processes as the operating system sees them: groups, death with the parent, who is reaped when.

A child is killed by group, and its group is killed once more between its death and its burial: only then is its
number sure to name this group and no other. On Linux a template adopts orphans, so that what user code leaves behind
dies with the template at the latest.
"""

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_RESET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)

# Loaded before any fork: a child of a process with threads should not need the loader's lock.
_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended; `signal` is 0 unless one killed it."""

    pid: int
    status: int
    signal: int


def die_with_parent(parent: int) -> None:
    """Be killed when the parent dies. Call first thing in a child; `parent` is the pid that forked it."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It died before the line above.
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent died."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def begin_child(keep: Iterable[int]) -> None:
    """Make a fresh child its own: group, signals, no descriptor but 0, 1, 2 and `keep`.

    Objects of the parent that own closed descriptors are never freed here (`gc.freeze`, and the frames below never
    return), so no later descriptor of the same number is closed by mistake.
    """
    with contextlib.suppress(OSError):  # Already done by the parent, or leader of its session.
        os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    gc.freeze()
    close_all_but(keep)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.disable()  # Enabled by a parent, its handlers may have been replaced: enable() would not look.
        faulthandler.enable(file=2, all_threads=False)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in `keep`.

    Where libuv is loaded (a parent ran uvloop), their numbers stay taken by /dev/null: at each fork libuv closes, in
    the child, the numbers of a pipe it remembers, whatever they name by then.
    """
    kept = sorted({fd for fd in keep if fd > 2})
    if "uvloop" in sys.modules:
        _replace_all_but(kept)
        return
    low = 3
    for fd in kept:
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, _open_max())


def _replace_all_but(kept: list[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3, _open_max()):
        if fd != null and fd not in kept:
            with contextlib.suppress(OSError):
                os.fstat(fd)  # Only what is open: a number that is free stays free.
                os.dup2(null, fd, inheritable=False)
    os.close(null)


def _open_max() -> int:
    try:
        return max(int(name) for name in os.listdir("/proc/self/fd" if _LINUX else "/dev/fd")) + 1
    except (OSError, ValueError):
        return os.sysconf("SC_OPEN_MAX")


def threads() -> int:
    """Threads of this process, those of libraries included."""
    if _LINUX:
        return len(os.listdir("/proc/self/task"))
    import threading

    return threading.active_count()


def kill_group(pid: int) -> None:
    """Kill the group that `pid` leads; `pid` is a child not yet reaped."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # The instant before it made its group.
        os.kill(pid, signal.SIGKILL)


def reap() -> list[Exit]:
    """Bury every dead child, each after the rest of its group."""
    exits: list[Exit] = []
    while True:
        try:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return exits
        if dead is None:
            return exits
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(dead.si_pid, signal.SIGKILL)
        os.waitpid(dead.si_pid, 0)
        killed = dead.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        exits.append(Exit(dead.si_pid, 0 if killed else dead.si_status, dead.si_status if killed else 0))


def children() -> list[int]:
    """Pids of living and dead children not yet reaped, adopted ones included; empty where this cannot be known."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
