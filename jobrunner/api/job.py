"""Job and Step: what is to be computed, as a plain value. Making one starts nothing and opens nothing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from jobrunner.errors import SpecError
from jobrunner.shuffle.reducers import Count, First, Max, Min, Ready, Sum

if TYPE_CHECKING:
    from jobrunner.api.handle import JobResult
    from jobrunner.spec.settings import Settings

Urls = str | PathLike[str] | Iterable[str | PathLike[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One map and, unless `reduce` is None, one reduce.

    `map(record)` gives (key, value) pairs; `reduce(key, values)` gives output pairs, `values` being an iterator;
    `combine` has the signature of `reduce` and may run any number of times; `partition(key, reducers)` gives the
    reducer's index. Each may be a function, an object with `__call__`, or a class with setup(), `__call__`, close();
    `reduce` may be a ready-made reducer: Sum(), Count(), Min(), Max(), Mean(), Distinct(), TopK(n), First(), Collect().
    With `sort_values` the values of a key arrive in the canonical order of keys, and must be of the types of keys; any
    number of them, sorted on disk.
    """

    map: Callable[..., Any]
    reduce: Any = None
    combine: Any = None
    partition: Callable[..., int] | None = None
    sort_values: bool = False

    def __post_init__(self) -> None:
        if not callable(self.map):
            raise _wrong("map", self.map, "a function of one record")
        if self.reduce is not None and not _can_reduce(self.reduce):
            raise _wrong("reduce", self.reduce, "a function of key and values, a ready-made reducer, or None")
        if self.combine is not None and not _can_reduce(self.combine):
            raise _wrong("combine", self.combine, "a function of key and values, a ready-made reducer, or None")
        if self.partition is not None and not callable(self.partition):
            raise _wrong("partition", self.partition, "a function of key and number of reducers, or None")
        self._check_ready_made()
        if self.reduce is None:
            for word, value in (("combine", self.combine), ("partition", self.partition)):
                if value is not None:
                    raise SpecError(f"{word}: given without reduce, allowed: only together with a reduce function")
            if self.sort_values:
                raise SpecError("sort_values: found True without reduce, allowed: only together with a reduce function")

    def _check_ready_made(self) -> None:
        """Partial results of some reducers are no values: only the same reducer can go on with them."""
        if self.sort_values and isinstance(self.reduce, Ready):
            reason = "allowed: only with a reduce function, or Collect()"
            raise SpecError(f"sort_values: found True with {self.reduce}, whose values have no order; {reason}")
        if isinstance(self.combine, Ready) and self.combine != self.reduce:
            if not isinstance(self.combine, Sum | Count | Min | Max | First):
                allowed = "a function, Sum(), Count(), Min(), Max() or First()"
                raise SpecError(f"combine: found {self.combine} with another reduce, allowed: {allowed}")
            if self.sort_values:
                raise SpecError(f"combine: found {self.combine} with sort_values, allowed: a function")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A named map/reduce step, or `steps=[Step(...)]`. The words are those of Step. Raises SpecError for a bad one."""

    map: Callable[..., Any] | None = None
    reduce: Any = None
    combine: Any = None
    name: str = ""  # "" means: after the file or the map function.
    partition: Callable[..., int] | None = None
    sort_values: bool = False
    input_format: Literal["text"] = "text"
    output_format: Literal["text"] = "text"
    steps: Sequence[Step] = ()

    def __post_init__(self) -> None:
        for word, found in (("input_format", self.input_format), ("output_format", self.output_format)):
            if found != "text":
                raise SpecError(f"{word}: found {found!r}, allowed: 'text' (other formats are not built yet)")
        if not self.steps:
            self.step  # noqa: B018 - checks the words of the one step
            return
        if any(value is not None for value in (self.map, self.reduce, self.combine, self.partition)):
            raise SpecError("steps: given together with map, reduce, combine or partition, allowed: one or the other")
        if not all(isinstance(step, Step) for step in self.steps):
            raise _wrong("steps", self.steps, "a list of Step(...)")
        if len(self.steps) > 1:
            raise SpecError(f"steps: found {len(self.steps)} steps, allowed: one (several steps are not built yet)")

    @property
    def step(self) -> Step:
        """The one step of the job."""
        if self.steps:
            return self.steps[0]
        if self.map is None:
            raise SpecError("map: not given, allowed: a function of one record")
        return Step(
            map=self.map,
            reduce=self.reduce,
            combine=self.combine,
            partition=self.partition,
            sort_values=self.sort_values,
        )

    def run(
        self,
        *,
        input: Urls,
        output: str | PathLike[str],
        reducers: int | None = None,
        params: Mapping[str, object] | None = None,
        if_exists: Literal["error", "replace"] = "error",
        job_id: str | None = None,
        cluster: str | PathLike[str] | None = None,
        masters: int = 3,
        workers: int = 1,
        slots: int | None = None,
        settings: "Settings | Mapping[str, object] | None" = None,
    ) -> "JobResult":
        """Run the job to its end: with masters and a worker of its own on this machine, or on a running `cluster`.

        `cluster` is a cluster directory. `reducers` None means one a slot; `slots` None means the processors of this
        machine divided by `workers`. `settings` may be {"section.key": value}.
        Raises SpecError before anything starts; TaskError if the job failed; JobKilled; Unavailable, Unknown.
        """
        from jobrunner.api.run import RunOptions, run_job

        options = RunOptions(masters=masters, workers=workers, slots=slots, cluster=cluster, settings=settings)
        return run_job(
            self,
            options,
            input=input,
            output=output,
            reducers=reducers,
            params=params,
            if_exists=if_exists,
            job_id=job_id,
        )


def _can_reduce(value: Any) -> bool:
    return callable(value) or type(value).__module__ == "jobrunner.shuffle.reducers"


def _wrong(word: str, found: object, allowed: str) -> SpecError:
    return SpecError(f"{word}: found {found!r}, allowed: {allowed}")
