"""A job's functions -> the code bundle, by value where workers could not import them; an unpicklable one is named.

A function of a TARGET file or of `__main__` travels by value, so that workers run what was submitted, whatever happens
to the file later. Other modules are imported on the worker, which gets the directories they were imported from here.
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cloudpickle

from jobrunner.api.job import Job, Step
from jobrunner.errors import SpecError
from jobrunner.planner.code import StepCode, pack_code

_WORDS = ("map", "reduce", "combine", "partition")


def by_value(module: ModuleType) -> None:
    """From now on pickle what `module` defines by value. It must be in sys.modules."""
    cloudpickle.register_pickle_by_value(module)


def pack_job(job: Job) -> bytes:
    """The job's functions as one blob. Raises SpecError naming the function that cannot be pickled, and why."""
    step = job.step
    code = StepCode(map=step.map, reduce=step.reduce, combine=step.combine, partition=step.partition)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        return pack_code([code], sys_path=_sys_path(step), python=python)
    except Exception as error:  # Pickling runs __reduce__ and __getstate__ of anybody's classes.
        raise _unpicklable(step, error) from error


def _sys_path(step: Step) -> list[str]:
    """Directories that workers search first: the caller's first, and those the functions' modules came from."""
    found = [os.path.abspath(sys.path[0] or ".")] if sys.path else []
    for word in _WORDS:
        module = sys.modules.get(getattr(getattr(step, word), "__module__", None) or "")
        file = getattr(module, "__file__", None)
        if module is None or file is None or module.__name__ == "__main__":
            continue
        root = os.path.dirname(os.path.abspath(file))
        for _ in range(module.__name__.count(".") + (os.path.basename(file) == "__init__.py")):
            root = os.path.dirname(root)
        found.append(root)
    installed = {os.path.abspath(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return [path for path in dict.fromkeys(found) if path not in installed and os.path.isdir(path)]


def _unpicklable(step: Step, error: Exception) -> SpecError:
    for word in _WORDS:
        function = getattr(step, word)
        reason = _refusal(function)
        if reason is None:
            continue
        blame = next((name for name, value in _carried(function) if _refusal(value) is not None), None)
        carried = f" (it refers to {blame!r})" if blame else ""
        return SpecError(
            f"{word}: function {_name(function)} cannot be sent to workers{carried}: {reason}", function=_name(function)
        )
    return SpecError(f"the job's functions cannot be sent to workers: {type(error).__name__}: {error}")


def _refusal(value: Any) -> str | None:
    """Why `value` cannot be pickled, or None if it can."""
    try:
        cloudpickle.dumps(value)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _carried(function: Any) -> Iterator[tuple[str, Any]]:
    """Globals and closure cells that a function takes along, or an object's attributes, by name."""
    with contextlib.suppress(TypeError, ValueError):
        variables = inspect.getclosurevars(function)
        yield from {**variables.globals, **variables.nonlocals}.items()
        return
    yield from getattr(function, "__dict__", {}).items()


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)
