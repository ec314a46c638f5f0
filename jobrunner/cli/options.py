"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

TargetArg = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="path/to/file.py, path/to/file.py:name or package.module:name; the default name is `job`.",
        show_default=False,
    ),
]
InputsArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="INPUT", help="Files, globs, directories (recursively), URLs.", show_default=False),
]
InputOpt = Annotated[
    list[str] | None, typer.Option("--input", metavar="URL", help="Another input; may be repeated.", show_default=False)
]
OutputOpt = Annotated[
    str, typer.Option("--output", metavar="URL", help="Directory to make, with all parts and _SUCCESS.")
]
ReducersOpt = Annotated[
    int | None, typer.Option("--reducers", metavar="N", help="Number of output parts.  [default: one a slot]")
]
ParamOpt = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="K=V", help="A parameter, read by jobrunner.param(K); may be repeated."),
]
IfExistsOpt = Annotated[
    str, typer.Option("--if-exists", metavar="error|replace", help="What to do if the output is there.")
]
JobIdOpt = Annotated[
    str | None,
    typer.Option("--job-id", metavar="UUID", help="Id of this run; submitting it again is the same job."),
]
SlotsOpt = Annotated[
    int | None,
    typer.Option("--slots", metavar="N", help="Attempts at once per worker.  [default: processors / workers]"),
]
ConfigOpt = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (TOML); conf/local.toml lists them all.")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, over file and environment; repeatable."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, all else to stderr.")]
StaleOpt = Annotated[
    bool, typer.Option("--stale", help="As whichever master is asked has it: maybe old, but also without a quorum.")
]
ClusterOpt = Annotated[
    str | None, typer.Option("--cluster", metavar="ADDR,ADDR", help="Addresses of masters, host:port each.")
]
DirOpt = Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Cluster directory.  [default: .jobrunner]")]
TokenFileOpt = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="The cluster's token, if not in its directory.")
]
ReachOpt = Annotated[
    float | None,
    typer.Option(
        "--reach-timeout", metavar="S", help="Give up (exit 3) when no master answers for so long.  [default: 60]"
    ),
]
JobArg = Annotated[str, typer.Argument(metavar="JOB", help="Job id: j-... or a uuid.", show_default=False)]
