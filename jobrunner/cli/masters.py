"""masters list, transfer: the group of masters itself."""

from typing import Annotated

import typer

from jobrunner.cli.locate import Where, open_client
from jobrunner.cli.options import ClusterOpt, DirOpt, JsonOpt, ReachOpt, StaleOpt, TokenFileOpt

masters = typer.Typer(help="Look at the masters, and make one lead.", no_args_is_help=True, rich_markup_mode=None)


@masters.command("list")
def list_masters(
    address: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    stale: StaleOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show every master: who leads, and how far each one's log is."""
    from jobrunner.cli.present import cluster_object, masters_text, to_json

    with open_client(Where(address, directory, token_file, reach_timeout)) as client:
        info = client.cluster(stale=stale)
    print(to_json({"masters": cluster_object(info)["masters"]}) if as_json else masters_text(info))


@masters.command("transfer")
def transfer(
    to: Annotated[
        int | None, typer.Argument(metavar="[ID]", help="Which master.  [default: the most complete one]")
    ] = None,
    address: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Make another master lead, without the pause of an election.

    Nothing is lost: what was accepted is finished first, and what comes meanwhile waits.
    """
    with open_client(Where(address, directory, token_file, reach_timeout)) as client:
        print(f"master {client.transfer(to)} leads")
