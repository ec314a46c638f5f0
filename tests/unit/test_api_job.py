"""Job: a plain value, validated when it is made; and its functions as a bundle."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobrunner
from jobrunner import Job, Step, Sum
from jobrunner.api.pack import pack_job
from jobrunner.errors import SpecError
from jobrunner.planner.code import open_code


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


def test_importing_jobrunner_loads_nothing_heavy() -> None:
    """Masters, `--help` and users' modules import it: pyarrow alone would cost a third of a tiny job's second."""
    heavy = "pyarrow", "numpy", "pydantic", "aiohttp", "asyncio", "fsspec", "typer"
    code = (
        "import sys, jobrunner\n"
        "from jobrunner import Job, Sum\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    """A lazy name with a wrong home would fail only in a user's hands."""
    assert all(getattr(jobrunner, name) is not None for name in jobrunner.__all__)
    assert set(jobrunner.__all__) <= set(dir(jobrunner))
    with pytest.raises(AttributeError, match="nosuch"):
        _ = jobrunner.nosuch


def test_a_job_is_a_frozen_value() -> None:
    """A job that changed after it was planned would not be what runs."""
    job = Job(map=words, reduce=Sum())
    assert job == Job(map=words, reduce=Sum()) and job.step == Step(map=words, reduce=Sum())
    with pytest.raises(AttributeError):
        job.name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "map: not given"),
        ({"map": 3}, "map: found 3, allowed: a function"),
        ({"map": words, "reduce": "sum"}, "reduce: found 'sum', allowed: a function"),
        ({"map": words, "combine": Sum()}, "combine: given without reduce"),
        ({"map": words, "partition": hash}, "partition: given without reduce"),
        ({"map": words, "sort_values": True}, "sort_values: found True without reduce"),
        ({"map": words, "input_format": "csv"}, "input_format: found 'csv', allowed: 'text'"),
        ({"map": words, "output_format": "parquet"}, "output_format: found 'parquet', allowed: 'text'"),
        ({"steps": [Step(map=words), Step(map=words)]}, "several steps are not built yet"),
        ({"steps": [Step(map=words)], "map": words}, "steps: given together with map"),
        ({"steps": [words]}, "allowed: a list of Step"),
    ],
)
def test_a_wrong_job_is_refused_where_it_is_written(arguments: dict[str, Any], line: str) -> None:
    """The line of the user's file is in the traceback; later it would be a worker's."""
    with pytest.raises(SpecError) as caught:
        Job(**arguments)
    assert line in str(caught.value)


def test_one_step_is_a_job() -> None:
    """`steps` is in the contract; a list of one means the same as the words themselves."""
    assert Job(steps=[Step(map=words, reduce=Sum())]).step == Step(map=words, reduce=Sum())


def test_functions_come_back_from_their_bundle() -> None:
    """What a worker unpacks must be what was given."""
    bundle = open_code(pack_job(Job(map=words, reduce=Sum())))
    (step,) = bundle.load()
    assert list(step.map("a b")) == [("a", 1), ("b", 1)] and step.reduce == Sum() and step.combine is None
    assert bundle.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert str(Path(__file__).parents[2]) in bundle.sys_path or str(Path(__file__).parent) in bundle.sys_path


def test_lambdas_and_closures_are_fine() -> None:
    """People write them."""
    least = 2
    (step,) = open_code(pack_job(Job(map=lambda line: [(line, least)]))).load()
    assert step.map("x") == [("x", 2)]


def test_an_unpicklable_function_is_named_with_what_it_holds() -> None:
    """`cannot pickle '_thread.lock' object` alone sends people searching."""
    held = threading.Lock()

    def holding(line: str) -> Iterator[tuple[str, int]]:
        with held:
            yield line, 1

    with pytest.raises(SpecError) as caught:
        pack_job(Job(map=words, reduce=Sum(), combine=holding))
    assert "combine: function " in str(caught.value) and "holding" in str(caught.value)
    assert "refers to 'held'" in str(caught.value) and "lock" in str(caught.value)
