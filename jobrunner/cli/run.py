"""run, submit, wait: a job from TARGET and words to its end."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jobrunner.cli.locate import Where, open_client, settings_of
from jobrunner.cli.options import (
    ClusterOpt,
    ConfigOpt,
    DirOpt,
    IfExistsOpt,
    InputOpt,
    InputsArg,
    JobArg,
    JobIdOpt,
    JsonOpt,
    OutputOpt,
    ParamOpt,
    ReachOpt,
    ReducersOpt,
    SetOpt,
    SlotsOpt,
    TargetArg,
    TokenFileOpt,
)
from jobrunner.errors import SpecError, Unavailable

if TYPE_CHECKING:
    from jobrunner.api.handle import JobHandle
    from jobrunner.api.job import Job
    from jobrunner.api.prepare import Request
    from jobrunner.control.messages import JobStatus
    from jobrunner.planner.build import BuiltJob


@dataclass(frozen=True, slots=True)
class Words:
    """What `run` and `submit` say of a job."""

    target: str
    inputs: list[str]
    output: str
    reducers: int | None
    params: list[str]
    if_exists: str
    job_id: str | None


def run(
    target: TargetArg,
    output: OutputOpt,
    inputs: InputsArg = None,
    more_inputs: InputOpt = None,
    reducers: ReducersOpt = None,
    params: ParamOpt = None,
    if_exists: IfExistsOpt = "error",
    job_id: JobIdOpt = None,
    masters: Annotated[
        int | None, typer.Option("--masters", metavar="N", help="Embedded masters.  [default: 3]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Embedded workers.  [default: 1]")
    ] = None,
    slots: SlotsOpt = None,
    cluster: ClusterOpt = None,
    token_file: TokenFileOpt = None,
    config: ConfigOpt = None,
    sets: SetOpt = None,
    reach_timeout: ReachOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Run a job to its end, here or on a running cluster.

    Without --cluster (or JOBRUNNER_CLUSTER) it brings its own masters and worker, in a temporary directory that is
    removed when the job has committed, and kept and named when not.

    \b
    Examples:
      jobrunner run wordcount.py books/ --output counts
      jobrunner run wordcount.py:job 'logs/*.txt' --output counts --reducers 4 --if-exists replace
      jobrunner run grep.py --input logs/ --output hits --param pattern=ERROR --json
    """
    words = Words(target, [*(inputs or ()), *(more_inputs or ())], output, reducers, params or [], if_exists, job_id)
    where = Where(cluster=cluster, token_file=token_file, reach_timeout_s=reach_timeout)
    if cluster or os.environ.get("JOBRUNNER_CLUSTER"):
        if masters is not None or workers is not None or slots is not None:
            raise SpecError("--masters, --workers, --slots: given with a running cluster, allowed: only without one")
        _run_there(words, where, config=config, sets=sets or [], as_json=as_json)
    else:
        own = _Own(masters=3 if masters is None else masters, workers=1 if workers is None else workers, slots=slots)
        _run_here(words, where, own, config=config, sets=sets or [], as_json=as_json)


def submit(
    target: TargetArg,
    output: OutputOpt,
    inputs: InputsArg = None,
    more_inputs: InputOpt = None,
    reducers: ReducersOpt = None,
    params: ParamOpt = None,
    if_exists: IfExistsOpt = "error",
    job_id: JobIdOpt = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    config: ConfigOpt = None,
    sets: SetOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Submit a job to a running cluster; print its id.

    The id is alone on stdout. When it is not known whether the masters took the job (exit 3), the same command with
    the same --job-id is safe.

    \b
    Examples:
      JOB=$(jobrunner submit wordcount.py books/ --output counts)
      jobrunner submit wordcount.py books/ --output counts --job-id $(uuidgen)
    """
    words = Words(target, [*(inputs or ()), *(more_inputs or ())], output, reducers, params or [], if_exists, job_id)
    where = Where(cluster, directory, token_file, reach_timeout)
    with open_client(where, config=config, sets=sets or []) as client:
        job, request = _load(words)
        print(client.submit_request(job, request).id)


def wait(
    job: JobArg,
    timeout: Annotated[float | None, typer.Option("--timeout", metavar="S", help="Stop waiting (exit 3).")] = None,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Wait for the end of a job; the exit status says how it ended.

    \b
    Example:
      jobrunner wait j-06f0... --timeout 600 && jobrunner verify counts
    """
    if timeout is not None and timeout < 0:
        raise SpecError(f"--timeout: found {timeout:g}, allowed: seconds, at least 0")
    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        _follow(client.job(job), timeout=timeout, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Own:
    """An embedded cluster's size."""

    masters: int
    workers: int
    slots: int | None


def _run_here(words: Words, where: Where, own: _Own, *, config: Path | None, sets: list[str], as_json: bool) -> None:
    from jobrunner.cluster.embedded import prefork_embedded

    preforked = prefork_embedded()  # First of all: user code, loops and threads come after.
    try:
        from jobrunner.api.prepare import prepare
        from jobrunner.api.run import check_counts, run_embedded
        from jobrunner.cli.display import make_display

        settings = settings_of(where, config=config, sets=sets)
        slots = check_counts(settings, masters=own.masters, workers=own.workers, slots=own.slots)
        job, request = _load(words)
        built: BuiltJob = prepare(job, request, settings, slots=lambda: slots * own.workers)
    except BaseException:
        preforked.discard()
        raise
    with _terminated_is_interrupted():
        with make_display() as display:
            end = run_embedded(
                preforked,
                built,
                settings,
                masters=own.masters,
                workers=own.workers,
                slots=slots,
                on_status=display.show,
            )
    _conclude(
        end.status, as_json=as_json, note=f"what masters and worker wrote is kept in {end.kept}" if end.kept else ""
    )


def _run_there(words: Words, where: Where, *, config: Path | None, sets: list[str], as_json: bool) -> None:
    with open_client(where, config=config, sets=sets) as client:
        job, request = _load(words)
        _follow(client.submit_request(job, request), timeout=None, as_json=as_json)


def _load(words: Words) -> "tuple[Job, Request]":
    from jobrunner.api.prepare import make_request
    from jobrunner.cli.target import load_target

    params = _params(words.params)
    if not words.inputs:
        raise SpecError("input: found none, allowed: at least one file, glob, directory or URL")
    target = load_target(words.target)
    request = make_request(
        target.job,
        input=words.inputs,
        output=words.output,
        reducers=words.reducers,
        params=params,
        if_exists=words.if_exists,
        job_id=words.job_id,
        name=target.name,
    )
    return target.job, request


def _params(texts: list[str]) -> dict[str, str]:
    params = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError(f"--param: found {text!r}, allowed: NAME=VALUE")
        params[key] = value
    return params


def _follow(handle: "JobHandle", *, timeout: float | None, as_json: bool) -> None:
    from jobrunner.cli.display import make_display

    try:
        with make_display() as display:
            for status in handle.watch(timeout):
                display.show(status)
    except TimeoutError as error:
        raise Unavailable(f"{error}; it goes on: wait again, or `jobrunner kill {handle.id}`") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the job goes on: `jobrunner wait {handle.id}` or `jobrunner kill {handle.id}`"
        ) from None
    _conclude(status, as_json=as_json)


def _conclude(status: "JobStatus", *, as_json: bool, note: str = "") -> None:
    """Print how the job ended. Raises TaskError or JobKilled, which give the exit status."""
    from jobrunner.api.handle import result_of
    from jobrunner.cli.present import end_line, status_object, to_json
    from jobrunner.errors import JobrunnerError

    if as_json:
        print(to_json(status_object(status)), flush=True)
    try:
        result_of(status)
    except JobrunnerError as error:
        if status.error and status.error.input:
            error.add_note(f"it read {status.error.input.url} at byte {status.error.input.offset}")
        if note:
            error.add_note(note)
        raise
    if not as_json:
        print(end_line(status), flush=True)


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end an embedded run as Ctrl-C does: its cluster must not outlive it. What was ignored when we
    were started (nohup) stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}")

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
