"""cluster up, status, down; and the daemons by hand: master, worker."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobrunner.cli.locate import HOME, Where, open_client, settings_of
from jobrunner.cli.options import (
    ClusterOpt,
    ConfigOpt,
    DirOpt,
    JsonOpt,
    ReachOpt,
    SetOpt,
    SlotsOpt,
    StaleOpt,
    TokenFileOpt,
)
from jobrunner.errors import SpecError

cluster = typer.Typer(
    help="Start, look at and stop a cluster on this machine.", no_args_is_help=True, rich_markup_mode=None
)


@cluster.command("up")
def up(
    directory: DirOpt = None,
    masters: Annotated[int | None, typer.Option("--masters", metavar="N", help="Masters.  [default: 3]")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Workers.  [default: 2]")] = None,
    slots: SlotsOpt = None,
    config: ConfigOpt = None,
    sets: SetOpt = None,
    ray: Annotated[bool, typer.Option("--ray", help="Place the daemons with Ray; not built yet.", hidden=True)] = False,
    ray_address: Annotated[str | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Start a cluster's daemons and leave them running; returns when it accepts jobs.

    Run again on the same directory it starts what is not running, each daemon with its old identity and port, and more
    workers if --workers asks for more. Masters, slots and settings of an existing cluster stay as they are, and it says
    so where they are not what was asked for.

    \b
    Examples:
      jobrunner cluster up                           3 masters and 2 workers, in ./.jobrunner
      jobrunner cluster up --dir /var/lib/jr --workers 4 --slots 2
    """
    if ray:
        raise SpecError("--ray: not built yet, allowed: daemons on this machine (without --ray)")
    if ray_address is not None:
        raise SpecError(f"cluster up: found {ray_address!r}, allowed: options only (--dir DIR names the directory)")
    from jobrunner.cluster.local import cluster_up, kept_as_it_was

    home = directory or HOME
    existing = home / "cluster.toml"
    file = config or (existing if existing.is_file() else None)
    sets = list(sets or ())
    sets += [] if masters is None else [f"cluster.masters={masters}"]
    sets += [] if workers is None else [f"cluster.workers={workers}"]
    if slots is not None and slots < 1:
        raise SpecError(f"--slots: found {slots}, allowed: an integer, at least 1")
    settings = settings_of(Where(), config=file, sets=sets)
    found = cluster_up(home, settings, workers=settings.cluster.workers, slots=slots)
    for line in kept_as_it_was(found, settings, workers=workers, slots=slots):
        print(f"this cluster is as it was made: {line}", file=sys.stderr)
    print(f"cluster {found.cluster_id} accepts jobs; its directory is {home}", file=sys.stderr)
    print(",".join(found.addresses))


@cluster.command("status")
def status(
    address: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    stale: StaleOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show who leads, every master and worker, and how many jobs are in which state."""
    from jobrunner.cli.present import cluster_object, cluster_text, to_json

    with open_client(Where(address, directory, token_file, reach_timeout)) as client:
        info = client.cluster(stale=stale)
    print(to_json(cluster_object(info)) if as_json else cluster_text(info))


@cluster.command("down")
def down(directory: DirOpt = None) -> None:
    """Stop the daemons of a cluster directory. What they wrote stays: `cluster up` goes on from it."""
    from jobrunner.cluster.local import cluster_down

    home = directory or HOME
    if not home.is_dir():
        raise SpecError(f"--dir: no cluster directory {str(home)!r}")
    for line in cluster_down(home) or ["nothing was running"]:
        print(line, file=sys.stderr)


def master(
    config: Annotated[Path, typer.Option("--config", metavar="DIR/cluster.toml", help="In the cluster's directory.")],
    slot: Annotated[int, typer.Option("--id", metavar="N", help="Which master: 0, 1, 2 ...")],
    init: Annotated[
        bool, typer.Option("--init", help="Make the member directory first; only ever once in its life.")
    ] = False,
) -> None:
    """Run one master in the foreground, as a daemon by hand.

    \b
    Example:
      jobrunner master --config /var/lib/jr/cluster.toml --id 0
    """
    from jobrunner.cluster.daemons import run_master

    raise typer.Exit(run_master(config if init else _daemon_config(config), slot, init))


def worker(
    config: Annotated[Path, typer.Option("--config", metavar="DIR/cluster.toml", help="In the cluster's directory.")],
    number: Annotated[
        int | None, typer.Option("--id", metavar="N", help="Which worker: 0, 1, 2 ...  [default: the next free one]")
    ] = None,
) -> None:
    """Run one worker agent in the foreground, as a daemon by hand.

    \b
    Example:
      jobrunner worker --config /var/lib/jr/cluster.toml --id 3
    """
    from jobrunner.cluster.daemons import run_worker

    raise typer.Exit(run_worker(_daemon_config(config), number))


def _daemon_config(path: Path) -> Path:
    if not path.is_file():
        raise SpecError(f"--config: no file {str(path)!r}")
    return path
