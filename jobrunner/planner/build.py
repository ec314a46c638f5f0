"""(JobSpec, Listing, Settings) -> JobPlan and SubmitJob: a pure function, so that the same words give the same plan."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobrunner.control.messages import StageSpec, SubmitJob, TaskKind
from jobrunner.errors import SpecError
from jobrunner.ids import Hash, JobId, StageName
from jobrunner.planner.plan import (
    AttemptPlan,
    InputFile,
    InputPlan,
    JobPlan,
    OutputPlan,
    ShufflePlan,
    blob_hash,
    encode_plan,
)
from jobrunner.planner.splits import plan_splits
from jobrunner.spec.job import JobSpec
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.storage.listing import Listing

MAP = StageName("map")
REDUCE = StageName("reduce")
_EXTENSIONS = {"text": ".txt"}


@dataclass(frozen=True, slots=True)
class BuiltJob:
    """A job ready to be submitted: two blobs, and the command that names them by hash."""

    plan: JobPlan
    blobs: dict[Hash, bytes]
    submit: SubmitJob


def build_job(
    spec: JobSpec,
    listing: "Listing",
    settings: Settings,
    *,
    code: bytes,
    output_url: str,
    hash_version: int,
    submitted_ms: int,
    user: str,
) -> BuiltJob:
    """The job as workers and masters need it. `output_url` is canonical; `code` is the packed bundle.

    Raises SpecError when the job is larger than limits.job_bytes_max or has more than limits.tasks_max tasks.
    """
    plan = build_plan(spec, listing, settings, code=blob_hash(code), output_url=output_url, hash_version=hash_version)
    plan_blob = encode_plan(plan)
    _check_bytes(plan_bytes=len(plan_blob), code_bytes=len(code), bytes_max=settings.limits.job_bytes_max)
    submit = SubmitJob(
        job=plan.job,
        name=plan.name,
        output=output_url,
        plan=blob_hash(plan_blob),
        code=plan.code,
        stages=plan.stages,
        faults_max=settings.attempt.faults_max,
        submitted_ms=submitted_ms,
        user=user,
    )
    return BuiltJob(plan, {plan.code: code, submit.plan: plan_blob}, submit)


def build_plan(
    spec: JobSpec, listing: "Listing", settings: Settings, *, code: Hash, output_url: str, hash_version: int
) -> JobPlan:
    """Splits, stages and every resolved limit. Raises SpecError when a stage would have too many tasks."""
    files = listing.files
    splits = plan_splits(
        [file.bytes for file in files],
        split_bytes=settings.input.split_bytes,
        files_max=settings.input.split_files_max,
    )
    tasks_max = settings.limits.tasks_max
    if len(splits) > tasks_max:
        raise SpecError(
            f"input.split_bytes: found {settings.input.split_bytes}, which makes {len(splits)} map tasks, "
            f"allowed: at most {tasks_max} tasks (limits.tasks_max)"
        )
    if spec.reducers > tasks_max:
        raise SpecError(f"reducers: found {spec.reducers}, allowed: at most {tasks_max} (limits.tasks_max)")
    return JobPlan(
        job=JobId(spec.job),
        name=spec.name,
        code=code,
        params=dict(sorted(spec.params.items())),
        inputs=[InputFile(file.url, file.bytes, file.mtime_ns, file.etag) for file in files],
        splits=splits,
        stages=build_stages(map_tasks=len(splits), reducers=spec.reducers),
        input=InputPlan(spec.input_format, spec.input_errors, settings.input.line_bytes_max),
        output=OutputPlan(output_url, spec.if_exists, spec.output_format, _EXTENSIONS[spec.output_format]),
        shuffle=_shuffle(spec, settings, hash_version),
        attempt=AttemptPlan(
            timeout_ms=settings.attempt.timeout_ms,
            import_timeout_ms=settings.worker.import_timeout_ms,
            log_bytes_max=settings.attempt.log_bytes_max,
            tail_bytes_max=settings.attempt.tail_bytes_max,
        ),
        publish_tries_max=settings.output.publish_tries_max,
        retry_ms=settings.output.retry_ms,
    )


def build_stages(*, map_tasks: int, reducers: int) -> list[StageSpec]:
    """`map` alone, sealing one part a task, or `map` leaving blocks for `reduce`, which seals one part a reducer."""
    if reducers == 0:
        return [StageSpec(MAP, TaskKind.MAP, map_tasks, final=True)]
    return [
        StageSpec(MAP, TaskKind.MAP, map_tasks, final=False),
        StageSpec(REDUCE, TaskKind.REDUCE, reducers, final=True, reads=MAP),
    ]


def _shuffle(spec: JobSpec, settings: Settings, hash_version: int) -> ShufflePlan:
    shuffle = settings.shuffle
    return ShufflePlan(
        reducers=spec.reducers,
        hash_version=hash_version,
        buffer_bytes_max=shuffle.buffer_bytes_max,
        merge_runs_max=shuffle.merge_runs_max,
        batch_rows_max=shuffle.batch_rows_max,
        fetch_bytes_max=shuffle.fetch_bytes_max,
        fetch_retries_max=shuffle.fetch_retries_max,
        fetch_timeout_ms=shuffle.fetch_timeout_ms,
        compression=shuffle.compression,
        sort_values=spec.sort_values,
    )


def _check_bytes(*, plan_bytes: int, code_bytes: int, bytes_max: int) -> None:
    if plan_bytes + code_bytes > bytes_max:
        larger = (
            "the plan is the larger part: fewer input files, or a larger input.split_bytes, make it smaller"
            if plan_bytes > code_bytes
            else "the code is the larger part: do functions carry data along in globals or closures?"
        )
        raise SpecError(
            f"limits.job_bytes_max: found a job of {plan_bytes + code_bytes} bytes (plan {plan_bytes}, "
            f"code {code_bytes}), allowed: at most {bytes_max}; {larger}; or raise the limit (--set "
            "limits.job_bytes_max=N; a running cluster's is in its cluster.toml)"
        )
