"""logs: what attempts of user code wrote; from the worker while it lives, else the cluster directory, else the tail.

The masters know which attempts there are and where; each stream is read from its worker's port, by urllib: a command
that prints a file needs no event loop.
"""

import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobrunner.cli.locate import Located, Where, locate, open_client
from jobrunner.cli.options import ClusterOpt, DirOpt, ReachOpt, TokenFileOpt
from jobrunner.errors import SpecError
from jobrunner.ids import AttemptId, TaskId, parse_path

if TYPE_CHECKING:
    from jobrunner.api.client import Client
    from jobrunner.control.messages import AttemptInfo

STREAMS = ("stdout", "stderr", "traceback")
_READ_S = 5.0  # For one answer of a worker; it may be gone.
_FOLLOW_S = 0.5


def logs(
    what: Annotated[
        str,
        typer.Argument(metavar="JOB|TASK|ATTEMPT", help="j-..., j-.../map/17 or j-.../map/17/2", show_default=False),
    ],
    failed: Annotated[bool, typer.Option("--failed", help="Only attempts that failed.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job has ended.")] = False,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Print what attempts of user code wrote.

    Their stdout and stderr, and the traceback of those that failed.

    \b
    Examples:
      jobrunner logs j-06f0... --failed
      jobrunner logs j-06f0.../map/17 --follow
    """
    try:
        wanted = parse_path(what)
    except ValueError as error:
        raise SpecError(str(error)) from error
    where = Where(cluster, directory, token_file, reach_timeout)
    located = locate(where)
    printer = Printer()
    with open_client(where) as client:
        while True:
            ended = not follow or _job_ended(client, wanted)  # Asked first: what was written before is then printed.
            _print_all(client, located, wanted, printer, failed=failed)
            if ended:
                break
            time.sleep(_FOLLOW_S)
    if not printer.found:
        print("no such attempt is remembered" if not failed else "no attempt has failed", file=sys.stderr)


@dataclass
class Printer:
    """Prints each stream from where it stopped, under a heading when the stream changes."""

    found: bool = False
    offsets: dict[tuple[AttemptId, str], int] = field(default_factory=dict)
    heading: str = ""

    def write(self, info: "AttemptInfo", stream: str, data: bytes) -> None:
        key = info.attempt, stream
        heading = f"==> {info.attempt} {stream} ({info.state}) <=="
        if heading != self.heading:
            print(("\n" if self.heading else "") + heading, flush=True)
            self.heading = heading
        self.offsets[key] = self.offsets.get(key, 0) + len(data)
        text = data.decode(errors="replace")
        print(text, end="" if text.endswith("\n") else "\n", flush=True)


def _print_all(
    client: "Client", located: Located, wanted: AttemptId | TaskId | str, printer: Printer, *, failed: bool
) -> None:
    for info in _attempts(client, wanted, failed=failed):
        printer.found = True
        wrote = False
        for stream in STREAMS:
            for data in _read(located, info, stream, printer.offsets.get((info.attempt, stream), 0)):
                printer.write(info, stream, data)
            wrote |= (info.attempt, stream) in printer.offsets
        if not wrote and info.state != "running":
            for stream, text in (("tail", info.tail), ("traceback", info.traceback or info.message)):
                if text and (info.attempt, stream) not in printer.offsets:
                    printer.write(info, stream, text.encode())


def _attempts(client: "Client", wanted: AttemptId | TaskId | str, *, failed: bool) -> "list[AttemptInfo]":
    if isinstance(wanted, AttemptId):
        found = client.job(wanted.job).attempts(wanted.task, failed_only=failed)
        return [info for info in found if info.attempt == wanted]
    if isinstance(wanted, TaskId):
        return client.job(wanted.job).attempts(wanted, failed_only=failed)
    return client.job(wanted).attempts(failed_only=failed)


def _job_ended(client: "Client", wanted: AttemptId | TaskId | str) -> bool:
    from jobrunner.cli.present import has_ended

    job = wanted if isinstance(wanted, str) else wanted.job
    return has_ended(client.job(job).status())


def _read(located: Located, info: "AttemptInfo", stream: str, offset: int) -> Iterator[bytes]:
    """The stream from `offset`: of the worker, else of the directory; nothing if neither has it."""
    try:
        while data := _from_worker(located, info, stream, offset):
            yield data
            offset += len(data)
    except OSError:
        if located.directory is not None and (data := _from_directory(located.directory, info, stream, offset)):
            yield data


def _from_worker(located: Located, info: "AttemptInfo", stream: str, offset: int) -> bytes:
    """A piece of the stream; b"" at its end. Raises OSError when the worker, or the log there, is gone."""
    if not info.worker:
        raise OSError("no worker")
    query = urllib.parse.urlencode({"stream": stream, "offset": offset})
    request = urllib.request.Request(
        f"http://{info.worker}/logs/{info.attempt}?{query}", headers={"Authorization": f"Bearer {located.token}"}
    )
    # No proxy: the token is for this worker only.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_READ_S) as answer:
        body: bytes = answer.read()
    return body


def _from_directory(directory: Path, info: "AttemptInfo", stream: str, offset: int) -> bytes:
    id = info.attempt
    path = directory / "jobs" / id.job / "logs" / id.stage / str(id.partition) / str(id.attempt) / stream
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError:
        return b""
