"""What user code may ask about the attempt it runs in: `task()`, `counter()`, `param()`.

One current task a process, set by the slot around an attempt, and by `jobrunner.testing.run_inline`. Outside of one,
each of the three raises and says why.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jobrunner.errors import JobrunnerError, SpecError
from jobrunner.ids import AttemptId, JobId

PROGRESS_S = 0.2  # Least time between two signs of life to the agent.
COUNTERS_MAX = 500  # They travel in one message.
NAME_CHARS_MAX = 200
_MISSING: Any = object()


class OutsideTask(JobrunnerError):
    """`task()`, `counter()` or `param()` was called where no map or reduce function runs."""


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """The input that is read just now: a map's file, and the bytes of it that are this task's."""

    path: str
    start: int
    length: int


@dataclass(slots=True)
class Counter:
    """A number that the whole job adds up; only attempts whose output counts are added."""

    name: str
    value: int = 0

    def add(self, amount: int = 1) -> None:
        self.value += int(amount)


@dataclass(slots=True)
class Task:
    """The attempt that runs in this process."""

    attempt_id: AttemptId
    params: dict[str, str]
    scratch: str  # Directory; made at the first look, deleted with the attempt.
    split: SplitInfo | None = None  # None in a reduce.
    on_progress: Callable[[], None] = lambda: None
    counters: dict[str, Counter] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _progress_at: float = 0.0

    @property
    def job(self) -> JobId:
        return self.attempt_id.job

    @property
    def stage(self) -> str:
        return self.attempt_id.stage

    @property
    def partition(self) -> int:
        return self.attempt_id.partition

    @property
    def attempt(self) -> int:
        """0 for the first try."""
        return self.attempt_id.attempt

    @property
    def scratch_directory(self) -> str:
        """A directory of this attempt alone, on the worker's disk."""
        os.makedirs(self.scratch, mode=0o700, exist_ok=True)
        return self.scratch

    def progress(self) -> None:
        """Say that work goes on, so that a record that takes long is not taken for a hang. Cheap to call often."""
        now = self.clock()
        if now - self._progress_at >= PROGRESS_S:
            self._progress_at = now
            self.on_progress()

    def counter(self, name: str) -> Counter:
        found = self.counters.get(name)
        if found is None:
            if len(self.counters) >= COUNTERS_MAX or len(name) > NAME_CHARS_MAX:
                raise SpecError(
                    f"counter {name!r:.100}: at most {COUNTERS_MAX} counters, with names of {NAME_CHARS_MAX} characters"
                )
            found = self.counters[name] = Counter(name)
        return found

    def counted(self) -> dict[str, int]:
        """Every counter that is not 0, by name."""
        return {name: counter.value for name, counter in sorted(self.counters.items()) if counter.value}


_current: Task | None = None


def task() -> Task:
    """The attempt that runs here. Raises OutsideTask where none does."""
    if _current is None:
        raise OutsideTask("no task runs in this process: call task(), counter() and param() inside a map or reduce")
    return _current


def counter(name: str) -> Counter:
    """The counter `name` of the running attempt, 0 at first."""
    return task().counter(name)


def param(name: str, default: Any = _MISSING) -> Any:
    """The job's parameter `name`, converted to the type of `default` if there is one.

    Raises SpecError for a parameter that is not set and has no default, or does not convert.
    """
    params = task().params
    if name not in params:
        if default is _MISSING:
            known = ", ".join(sorted(params)) or "none"
            raise SpecError(f"param {name!r} is not set and has no default (set: {known})", key=f"params.{name}")
        return default
    text = params[name]
    if default is _MISSING or default is None or isinstance(default, str):
        return text
    return _convert(name, text, type(default))


def _convert(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise SpecError(f"param {name!r} is {text!r}, not true or false", key=f"params.{name}")
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        raise SpecError(f"param {name!r} is {text!r}, not a {kind.__name__}", key=f"params.{name}") from error


@contextmanager
def running(current: Task) -> Iterator[Task]:
    """`current` is the process's task inside the block."""
    global _current
    assert _current is None, "one attempt a process"
    _current = current
    try:
        yield current
    finally:
        _current = None
