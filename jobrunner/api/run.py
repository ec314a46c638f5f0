"""Running a job to its end: on a cluster of its own, started and stopped for it, or on one that runs.

A cluster of its own is forked before this process has a loop or a thread (`prefork_embedded`), checked jobs only are
started, and Ctrl-C kills the job cleanly before the cluster stops.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from jobrunner.api.client import Client
from jobrunner.api.handle import ENDED, JobHandle, JobResult, result_of
from jobrunner.api.job import Job, Urls
from jobrunner.api.prepare import default_slots, make_request, prepare, resolve_settings
from jobrunner.control.messages import JobState, JobStatus
from jobrunner.errors import JobrunnerError, SpecError
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.planner.build import BuiltJob

logger = logging.getLogger(__name__)

_TIDY_S = 10.0  # For cleaning up after the job's end; promised to readers of the output's parent.


class OwnCluster(Protocol):
    """cluster.local.EmbeddedCluster."""

    @property
    def addresses(self) -> "list[str] | tuple[str, ...]": ...
    @property
    def cluster_id(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    def keep(self) -> None: ...
    def stop(self) -> None: ...


class Preforked(Protocol):
    """What cluster.local.prefork_embedded returns: processes that may become a cluster."""

    def start(self, settings: Settings, *, masters: int, workers: int, slots: int) -> OwnCluster: ...
    def discard(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a job runs. `cluster` is a cluster directory, None means a cluster of its own."""

    masters: int = 3
    workers: int = 1
    slots: int | None = None
    cluster: str | PathLike[str] | None = None
    settings: Settings | Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddedEnd:
    """How an embedded run ended; `kept` is its cluster's directory if it did not end well."""

    status: JobStatus
    kept: Path | None


def run_job(
    job: Job,
    options: RunOptions,
    *,
    input: Urls,
    output: str | PathLike[str],
    reducers: int | None,
    params: Mapping[str, object] | None,
    if_exists: Literal["error", "replace"],
    job_id: str | None,
) -> JobResult:
    """What Job.run promises."""
    if options.cluster is not None:
        with Client.from_dir(options.cluster, settings=options.settings) as client:
            return client.submit(
                job, input=input, output=output, reducers=reducers, params=params, if_exists=if_exists, job_id=job_id
            ).wait()
    from jobrunner.cluster.embedded import prefork_embedded

    preforked: Preforked = prefork_embedded()
    try:
        settings = resolve_settings(options.settings)
        slots = check_counts(settings, masters=options.masters, workers=options.workers, slots=options.slots)
        request = make_request(
            job, input=input, output=output, reducers=reducers, params=params, if_exists=if_exists, job_id=job_id
        )
        built = prepare(job, request, settings, slots=lambda: slots * options.workers)
    except BaseException:
        preforked.discard()
        raise
    end = run_embedded(preforked, built, settings, masters=options.masters, workers=options.workers, slots=slots)
    if end.kept:
        logger.warning("what masters and worker wrote is kept in %s", end.kept)
    return result_of(end.status)


def check_counts(settings: Settings, *, masters: int, workers: int, slots: int | None) -> int:
    """Slots of each worker of an embedded cluster. Raises SpecError for a number that cannot be."""
    for word, found, most in (("masters", masters, 7), ("workers", workers, 64)):
        if not 1 <= found <= most:
            raise SpecError(f"{word}: found {found}, allowed: an integer from 1 to {most}")
    if slots is not None and not 1 <= slots <= 1024:
        raise SpecError(f"slots: found {slots}, allowed: an integer from 1 to 1024")
    return default_slots(settings, workers=workers, slots=slots)


def run_embedded(
    preforked: Preforked,
    built: "BuiltJob",
    settings: Settings,
    *,
    masters: int,
    workers: int,
    slots: int,
    on_status: Callable[[JobStatus], None] | None = None,
) -> EmbeddedEnd:
    """Start the cluster, run the job to its end, stop the cluster. Its directory is kept unless the job committed.

    An interrupt (KeyboardInterrupt) kills the job and waits until nothing of it is left, then goes on as an interrupt.
    """
    cluster = preforked.start(settings, masters=masters, workers=workers, slots=slots)
    try:
        with Client(cluster.addresses, token=cluster.token, cluster_id=cluster.cluster_id, settings=settings) as client:
            status = _to_its_end(client.submit_built(built), on_status)
        kept = None if status.state is JobState.COMMITTED else cluster.directory
        if kept:
            cluster.keep()
        return EmbeddedEnd(status, kept)
    except JobrunnerError as error:
        cluster.keep()
        error.add_note(f"what masters and worker wrote is kept in {cluster.directory}")
        raise
    finally:
        cluster.stop()


def _to_its_end(handle: JobHandle, on_status: Callable[[JobStatus], None] | None) -> JobStatus:
    try:
        for status in _statuses(handle, watched=on_status is not None):
            if on_status:
                on_status(status)
    except KeyboardInterrupt:
        handle.kill("interrupted")
        _until_tidy(handle)
        raise
    return _until_tidy(handle) or status


def _statuses(handle: JobHandle, *, watched: bool) -> Iterator[JobStatus]:
    if watched:
        yield from handle.watch()
    else:
        yield handle.ended()


def _until_tidy(handle: JobHandle) -> JobStatus | None:
    try:
        status = handle.ended(_TIDY_S, tidy=True)
    except TimeoutError:
        logger.warning("job %s: its clean-up has not ended within %g s", handle.id, _TIDY_S)
        return None
    assert status.state in ENDED
    return status
