"""From JobSpec and listing to plan and SubmitJob."""

from dataclasses import dataclass

import msgspec
import pytest

from jobrunner.control.messages import StageSpec, TaskKind
from jobrunner.errors import SpecError
from jobrunner.ids import job_id_from_number
from jobrunner.planner.build import BuiltJob, build_job
from jobrunner.planner.plan import blob_hash, decode_plan
from jobrunner.spec.job import job_spec
from jobrunner.spec.settings import InputSection, LimitsSection, Settings


@dataclass
class File:
    url: str
    bytes: int
    mtime_ns: int = 1
    etag: str = ""


@dataclass
class FakeListing:
    files: tuple[File, ...]


def built(
    *, reducers: int = 2, code: bytes = b"code", sizes: tuple[int, ...] = (250, 0), settings: Settings | None = None
) -> BuiltJob:
    spec = job_spec(
        {
            "job": job_id_from_number(9),
            "name": "n",
            "inputs": ("in",),
            "output": "out",
            "reducers": reducers,
            "has_reduce": reducers > 0,
            "params": {"b": "2", "a": "1"},
        }
    )
    listing = FakeListing(tuple(File(f"file:///in/{index}", size) for index, size in enumerate(sizes)))
    return build_job(
        spec,
        listing,  # type: ignore[arg-type]
        settings or Settings(input=InputSection(split_bytes=100)),
        code=code,
        output_url="/data/out",
        hash_version=1,
        submitted_ms=5,
        user="u",
    )


def test_the_stages_are_map_and_reduce() -> None:
    """Task ids in logs, stories and paths are made of these names."""
    assert built().submit.stages == [
        StageSpec("map", TaskKind.MAP, 3, final=False),
        StageSpec("reduce", TaskKind.REDUCE, 2, final=True, reads="map"),
    ]


def test_a_map_only_job_seals_one_part_a_map_task() -> None:
    """Its output is the maps' own; a reduce stage of zero tasks would never be done."""
    job = built(reducers=0)
    assert job.submit.stages == [StageSpec("map", TaskKind.MAP, 3, final=True)]
    assert job.plan.shuffle.reducers == 0


def test_the_blobs_are_what_submit_names() -> None:
    """Workers fetch plan and code by these hashes."""
    job = built()
    assert decode_plan(job.blobs[job.submit.plan]) == job.plan
    assert job.blobs[job.submit.code] == b"code"
    assert all(blob_hash(data) == name for name, data in job.blobs.items())
    assert (job.submit.output, job.plan.output.url, job.plan.output.extension) == ("/data/out", "/data/out", ".txt")


def test_the_same_words_give_the_same_plan() -> None:
    """A plan that differed would be another blob, and a repeated submission another job."""
    assert built() == built()
    assert list(built().plan.params) == ["a", "b"]


def test_empty_input_is_one_map_task_without_pieces() -> None:
    """The job must succeed with empty parts."""
    job = built(sizes=())
    assert job.plan.splits == [[]] and job.submit.stages[0].tasks == 1


def test_a_job_above_its_byte_limit_is_refused_by_part() -> None:
    """Masters keep plan and code in memory and in the log: the limit is theirs."""
    with pytest.raises(SpecError, match=r"limits.job_bytes_max: found .* the code is the larger part"):
        built(code=b"x" * 5_000_000)
    small = msgspec.structs.replace(Settings(), limits=LimitsSection(job_bytes_max=65_536))
    with pytest.raises(SpecError, match=r"the plan is the larger part.*--set limits.job_bytes_max=N"):
        built(sizes=(1,) * 20_000, settings=small)


def test_too_many_tasks_are_refused_by_key() -> None:
    """A split_bytes of 1 on a large file would fill the masters."""
    settings = Settings(input=InputSection(split_bytes=1), limits=LimitsSection(tasks_max=10))
    with pytest.raises(SpecError, match=r"input.split_bytes: found 1, which makes 250 map tasks"):
        built(settings=settings)
    with pytest.raises(SpecError, match=r"reducers: found 11, allowed: at most 10"):
        built(reducers=11, sizes=(), settings=settings)
