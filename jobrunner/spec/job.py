"""JobSpec: what a job is asked to do, validated once; the functions themselves are not in it.

Job + options (CLI or API) ──► JobSpec ──► planner.build
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from jobrunner.errors import SpecError
from jobrunner.ids import JobId, parse_job_id
from jobrunner.spec.explain import explain

PARAMS_MAX = 1_000
REDUCERS_MAX = 1_000_000

_ALLOWED = {
    "job": "j- and 26 characters, or a uuid",
    "name": "text of 1 to 200 characters without control characters",
    "inputs": "at least one file, glob, directory or URL",
    "output": "a path or URL of a directory",
    "reducers": "an integer, at least 1 (with a reduce; a map-only job has none)",
    "if_exists": "error or replace",
    "params": f"at most {PARAMS_MAX} pairs NAME=VALUE, a name being letters, digits, _ and -",
    "input_format": "text",
    "input_errors": "replace, strict or surrogateescape",
    "output_format": "text",
    "has_reduce": "true or false",
    "sort_values": "true or false",
}


def _job_id(value: Any) -> JobId:
    return parse_job_id(value) if isinstance(value, str) else value


class JobSpec(BaseModel):
    """One map/reduce step on named input, to one output directory. Made by `job_spec`, which words the errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    job: Annotated[str, BeforeValidator(_job_id)]
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
    inputs: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    output: Annotated[str, Field(min_length=1)]
    reducers: Annotated[int, Field(ge=0, le=REDUCERS_MAX)]  # 0 exactly for a map-only job.
    if_exists: Literal["error", "replace"] = "error"
    params: Annotated[dict[Annotated[str, Field(pattern=r"^[\w-]+$")], str], Field(max_length=PARAMS_MAX)] = {}
    has_reduce: bool
    sort_values: bool = False
    input_format: Literal["text"] = "text"
    input_errors: Literal["replace", "strict", "surrogateescape"] = "replace"
    output_format: Literal["text"] = "text"

    @model_validator(mode="after")
    def _reducers_fit(self) -> Self:
        if self.has_reduce and self.reducers == 0:
            raise ValueError("reducers: found 0, allowed: at least 1, because the job has a reduce function")
        if not self.has_reduce and self.reducers:
            raise ValueError(f"reducers: found {self.reducers}, allowed: none, because the job has no reduce function")
        return self


def job_spec(values: dict[str, object]) -> JobSpec:
    """A valid JobSpec. Raises SpecError: which key, what was found, what is allowed."""
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(explain(error, known=_ALLOWED)) from error
