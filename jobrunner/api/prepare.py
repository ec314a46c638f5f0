"""Everything a client checks and makes before it submits: output, input, functions, plan. Nothing is started here.

Job + Request ──► check() ──► prepare() ──► BuiltJob (two blobs and a SubmitJob)
"""

import getpass
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal

from jobrunner.api.job import Job, Urls
from jobrunner.api.pack import pack_job
from jobrunner.errors import SpecError
from jobrunner.hosts import processors
from jobrunner.ids import JobId, new_job_id, parse_job_id
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.planner.build import BuiltJob
    from jobrunner.spec.job import JobSpec

HASH_VERSION = 1  # That of shuffle.partition, which is not imported here: it loads numpy. A test compares the two.


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a job this time. `reducers` None means one a slot of the cluster."""

    input: tuple[str, ...]
    output: str
    reducers: int | None
    params: dict[str, str]
    if_exists: str
    job_id: JobId
    name: str
    again: bool  # The caller named the job id: the job may already be there.


def make_request(
    job: Job,
    *,
    input: Urls,
    output: str | PathLike[str],
    reducers: int | None = None,
    params: Mapping[str, object] | None = None,
    if_exists: Literal["error", "replace"] | str = "error",
    job_id: str | None = None,
    name: str = "",
) -> Request:
    """The request in plain values, with an id if it had none. Raises SpecError."""
    return Request(
        input=_urls(input),
        output=os.fspath(output),
        reducers=reducers,
        params={str(key): str(value) for key, value in (params or {}).items()},
        if_exists=if_exists,
        job_id=_job_id(job_id),
        name=job.name or name or _function_name(job.step.map),
        again=job_id is not None,
    )


def check(job: Job, request: Request, settings: Settings) -> "JobSpec":
    """The validated spec, quick: no file is opened. The number of reducers is still 1 where it follows the slots."""
    from jobrunner.spec.job import job_spec

    has_reduce = job.step.reduce is not None
    reducers = request.reducers if request.reducers is not None else int(has_reduce)
    return job_spec(
        {
            "job": request.job_id,
            "name": request.name,
            "inputs": request.input,
            "output": request.output,
            "reducers": reducers,
            "if_exists": request.if_exists,
            "params": request.params,
            "has_reduce": has_reduce,
            "sort_values": job.step.sort_values,
            "input_format": job.input_format,
            "input_errors": settings.input.errors,
            "output_format": job.output_format,
        }
    )


def prepare(job: Job, request: Request, settings: Settings, *, slots: Callable[[], int]) -> "BuiltJob":
    """Check the output, list the input, pack the functions, plan. `slots` is asked only if reducers follow it.

    Raises SpecError: every missing input at once, an output that exists, a function that cannot be sent.
    """
    from jobrunner.commit.checks import check_output
    from jobrunner.planner.build import build_job
    from jobrunner.storage.listing import list_inputs

    spec = check(job, request, settings)
    output_url = check_output(spec.output, spec.if_exists, spec.inputs)
    listing = list_inputs(spec.inputs)
    code = pack_job(job)
    if spec.has_reduce and request.reducers is None:
        spec = spec.model_copy(update={"reducers": max(1, slots())})
    return build_job(
        spec,
        listing,
        settings,
        code=code,
        output_url=output_url,
        hash_version=HASH_VERSION,
        submitted_ms=time.time_ns() // 1_000_000,
        user=_user(),
    )


def default_slots(settings: Settings, *, workers: int, slots: int | None = None) -> int:
    """Slots of each worker on this machine: as asked, else the processors divided by the workers, at least 1."""
    if slots:
        return slots
    if settings.worker.slots:
        return settings.worker.slots
    return max(1, processors() // max(1, workers))


def resolve_settings(settings: "Settings | Mapping[str, object] | None") -> Settings:
    """Settings as they are, or those of {"section.key": value} over environment and defaults. Raises SpecError."""
    if isinstance(settings, Settings):
        return settings
    from jobrunner.spec.load import load_settings

    return load_settings(None, [f"{key}={value}" for key, value in (settings or {}).items()])


def _urls(input: Urls) -> tuple[str, ...]:
    if isinstance(input, (str, PathLike)):
        return (os.fspath(input),)
    if not isinstance(input, Iterable):
        raise SpecError(f"input: found {input!r}, allowed: a path or URL, or several")
    return tuple(os.fspath(url) for url in input)


def _job_id(text: str | None) -> JobId:
    if text is None:
        return new_job_id(time.time_ns() // 1_000_000, secrets.randbits(80))
    try:
        return parse_job_id(text)
    except ValueError as error:
        raise SpecError(f"job id: {error}") from error


def _function_name(function: object) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    return str(name).strip("<>")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # A container's user may have no name.
        return ""
