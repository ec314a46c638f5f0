"""lock, locks: run a command while holding a named lock; show locks; take one from its holder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobrunner.cli.locate import Where, open_client
from jobrunner.cli.options import ClusterOpt, DirOpt, JsonOpt, ReachOpt, TokenFileOpt
from jobrunner.errors import LockLost, SpecError

if TYPE_CHECKING:
    from jobrunner.api.locks import Lock

TOKEN_VARIABLE = "JOBRUNNER_LOCK_TOKEN"
_LOOK_S = 0.02
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Any text, like warehouse/orders.", show_default=False)]


def lock(
    name: NameArg,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="What to run, after `--`.", show_default=False)
    ],
    ttl: Annotated[
        float | None,
        typer.Option("--ttl", metavar="S", help="Silence of the masters after which COMMAND is killed.  [default: 10]"),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", metavar="S", help="Stand in line for so long; 0: not at all.  [default: no limit]"),
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Together with others that hold it shared.")] = False,
    delay: Annotated[
        float | None,
        typer.Option("--delay", metavar="S", help="Keep it closed for so long if this fails.  [default: 1]"),
    ] = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Run COMMAND while holding a lock; its exit status is passed on (128 + N if signal N killed it).

    COMMAND finds the lock's token in JOBRUNNER_LOCK_TOKEN: a number above that of every earlier holder. It runs in a
    process group of its own, of which nothing is left when the lock is given back. When the masters no longer confirm
    the lock, all of it is killed at once, and the exit status is 3. Exit status 2: the lock was not free in time.

    \b
    Example:
      jobrunner lock warehouse/orders --wait 60 -- ./load_orders.sh
    """
    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        held = client.lock(name, ttl=ttl, wait=wait, shared=shared, delay=delay)
        held.acquire()
        try:
            status = run_under(held, command)
        finally:
            kept = held.release()
        if status is None:
            raise LockLost(f"lock {name} was lost, and the command killed", name=name)
        if not kept and status == 0:  # Whoever relies on the lock must not take this for a success.
            raise LockLost(f"lock {name} could not be confirmed up to the end of the command", name=name)
    raise typer.Exit(status)


def run_under(held: "Lock", command: Sequence[str]) -> int | None:
    """The exit status of `command`; None if it was killed because the lock is not held any more. Raises SpecError."""
    from jobrunner.locks.holder import Hold
    from jobrunner.worker.processes import die_with_parent

    parent = os.getpid()
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, TOKEN_VARIABLE: str(held.token)},
            process_group=0,
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - two system calls, no lock, no import.
        )
    except OSError as error:
        raise SpecError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    with _forwarding(process.pid), _in_foreground(process.pid):
        try:
            while held.state is Hold.HELD:
                # Not waited for: while it is a zombie its number names its group, and no other.
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    kill_group(process.pid)
                    status = process.wait()
                    return status if status >= 0 else 128 - status
                time.sleep(_LOOK_S)
            return None
        finally:
            if process.returncode is None:
                kill_group(process.pid)
                process.wait()


def kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # Nobody is left, or (macOS) only the dead.


@contextmanager
def _forwarding(group: int) -> Iterator[None]:
    """Signals sent to us are for the command."""

    def forward(number: int, frame: FrameType | None) -> None:
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            pass

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _in_foreground(group: int) -> Iterator[None]:
    """On a terminal the command may read it, and Ctrl-C is its own."""
    if not os.isatty(0):
        yield
        return
    handler = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    ours = os.tcgetpgrp(0)
    try:
        if ours == os.getpgrp():
            os.tcsetpgrp(0, group)
        yield
    finally:
        if ours == os.getpgrp():
            os.tcsetpgrp(0, ours)
        signal.signal(signal.SIGTTOU, handler)


locks = typer.Typer(help="Show named locks; take one from its holder.", rich_markup_mode=None)


@locks.callback(invoke_without_command=True)
def show(
    ctx: typer.Context,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show who holds which lock, since when, and who waits; or, with `release`, take one away."""
    if ctx.invoked_subcommand is not None:
        return
    from jobrunner.cli.present import to_json
    from jobrunner.cli.present_locks import locks_object, locks_text

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.locks()
    print(to_json(locks_object(found)) if as_json else locks_text(found))


@locks.command("release")
def release(
    name: NameArg,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; shown by `jobrunner locks`.")],
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Take a lock from its holder, who may be alive and learns it with its next keepalive.

    The lock stays closed for its delay before another gets it.
    """
    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        for holder in client.release_lock(name, reason=reason):
            print(f"took {name} (token {holder.token}) from {holder.owner}", file=sys.stderr)
