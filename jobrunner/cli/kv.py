"""kv: small values that the masters keep, from the command line."""

import sys
from typing import Annotated

import typer

from jobrunner.cli.locate import Where, open_client
from jobrunner.cli.options import ClusterOpt, DirOpt, JsonOpt, ReachOpt, TokenFileOpt
from jobrunner.errors import Refused

kv = typer.Typer(help="Small values that the masters keep.", no_args_is_help=True, rich_markup_mode=None)

KeyArg = Annotated[str, typer.Argument(metavar="KEY", help="Any text, like config/rate.", show_default=False)]
PrefixArg = Annotated[str, typer.Argument(metavar="PREFIX", help="What keys begin with.  [default: all]")]
IfModifiedOpt = Annotated[
    int | None,
    typer.Option("--if-modified", metavar="N", help="Only if the key is of this revision (0: not there); else exit 2."),
]


@kv.command("get")
def get(
    key: KeyArg,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Print a key's value as it is; exit status 2 if there is none."""
    from jobrunner.cli.present import to_json
    from jobrunner.cli.present_locks import key_object

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.kv.get(key)
    if found is None:
        raise Refused(f"no key {key}")
    if as_json:
        print(to_json(key_object(found)))
    else:
        sys.stdout.buffer.write(found.value)
        sys.stdout.buffer.flush()


@kv.command("put")
def put(
    key: KeyArg,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="Text; `-` reads stdin.", show_default=False)],
    if_modified: IfModifiedOpt = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Write a value; prints the revision that it made."""
    data = sys.stdin.buffer.read() if value == "-" else value.encode()
    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        written = client.kv.put(key, data, if_modified=if_modified)
    if written is None:
        raise Refused(f"key {key} is not of revision {if_modified}")
    print(written.modified)


@kv.command("delete")
def delete(
    key: KeyArg,
    if_modified: IfModifiedOpt = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Delete a key; exit status 2 if it was not there."""
    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        deleted = client.kv.delete(key, if_modified=if_modified)
    if not deleted:
        raise Refused(f"no key {key}" + ("" if if_modified is None else f" of revision {if_modified}"))


@kv.command("list")
def list_keys(
    prefix: PrefixArg = "",
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """List keys, one a line; with --json their values and revisions too."""
    from jobrunner.cli.present import to_json
    from jobrunner.cli.present_locks import key_object

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.kv.list(prefix)
    if as_json:
        print(to_json({"keys": [key_object(item) for item in found]}))
        return
    for item in found:
        print(item.key)


@kv.command("watch")
def watch(
    prefix: PrefixArg = "",
    revision: Annotated[
        int | None, typer.Option("--revision", metavar="N", help="Changes from this one on.  [default: from now on]")
    ] = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Print changes as they come, one JSON object a line; exit status 2 if the first are no longer kept."""
    import json

    from jobrunner.cli.present_locks import change_object

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        for change in client.kv.watch(prefix, revision=revision):
            print(json.dumps(change_object(change), ensure_ascii=False), flush=True)
