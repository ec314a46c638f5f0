"""JobSpec: what is refused, and in which words."""

import pytest

from jobrunner.errors import SpecError
from jobrunner.ids import job_id_from_number
from jobrunner.spec.job import job_spec

GOOD: dict[str, object] = {
    "job": job_id_from_number(7),
    "name": "wordcount",
    "inputs": ("a.txt",),
    "output": "out",
    "reducers": 2,
    "has_reduce": True,
}


def test_a_good_spec_keeps_its_words() -> None:
    """The plan is made from these and nothing else."""
    spec = job_spec({**GOOD, "params": {"min-length": "3"}})
    assert (spec.inputs, spec.reducers, spec.if_exists, spec.params) == (("a.txt",), 2, "error", {"min-length": "3"})


def test_a_uuid_becomes_a_job_id() -> None:
    """Other systems' schedulers name runs by uuid; the same run must be the same job."""
    assert job_spec({**GOOD, "job": "00000000-0000-0000-0000-000000000007"}).job == job_id_from_number(7)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("reducers", 0, "reducers: found 0, allowed: at least 1, because the job has a reduce"),
        ("reducers", -1, "reducers: found -1, allowed: an integer"),
        ("reducers", "4", "reducers: found '4', allowed: an integer"),
        ("inputs", (), "inputs: found (), allowed: at least one file"),
        ("inputs", ("",), "inputs.0: found '', allowed: at least one file"),
        ("output", "", "output: found '', allowed: a path or URL"),
        ("if_exists", "append", "if_exists: found 'append', allowed: error or replace"),
        ("job", "j-7", "not a job id: 'j-7'"),
        ("params", {"a b": "1"}, "allowed: at most 1000 pairs NAME=VALUE"),
        ("name", "a\nb", "name: found 'a\\nb', allowed: text of 1 to 200"),
        ("input_format", "csv", "input_format: found 'csv', allowed: text"),
        ("if_exist", "replace", "if_exist: no such key; did you mean if_exists?"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_allowed(key: str, value: object, line: str) -> None:
    """Exit status 2 promises one line that says how to mend it."""
    with pytest.raises(SpecError) as caught:
        job_spec({**GOOD, key: value})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_map_only_job_has_no_reducers() -> None:
    """`--reducers 4` on a map-only job would be ignored without a word."""
    assert job_spec({**GOOD, "has_reduce": False, "reducers": 0}).reducers == 0
    with pytest.raises(SpecError, match="reducers: found 4, allowed: none"):
        job_spec({**GOOD, "has_reduce": False, "reducers": 4})
