"""jobrunner: fault-tolerant batch jobs in Python; the output is complete and written once, whoever dies.

    from jobrunner import Job, Sum

    def words(line: str):
        for word in line.split():
            yield word, 1

    job = Job(map=words, reduce=Sum())

`jobrunner run wordcount.py books/ --output out` runs it here, with masters and a worker of its own;
`job.run(input="books/", output="out")` does the same from Python, and `Client` speaks to a running cluster.

    cli ► api ► planner ► [ masters: one Raft log ] ► workers ► shuffle ► commit ► output

Names are imported when they are first used: `import jobrunner` alone loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobrunner.api.client import Client
    from jobrunner.api.handle import JobHandle, JobResult
    from jobrunner.api.job import Job, Step
    from jobrunner.api.locks import Lock
    from jobrunner.errors import (
        Compacted,
        CorruptData,
        Fatal,
        JobKilled,
        JobrunnerError,
        LockBusy,
        LockInDoubt,
        LockLost,
        OutputBusy,
        Refused,
        SpecError,
        TaskError,
        Unavailable,
        Unknown,
        UnknownJob,
    )
    from jobrunner.shuffle.batch import batch
    from jobrunner.shuffle.reducers import Collect, Count, Distinct, First, Max, Mean, Min, Sum, TopK
    from jobrunner.worker.context import counter, param, task

__all__ = [
    "Client", "Collect", "Compacted", "CorruptData", "Count", "Distinct", "Fatal", "First", "Job", "JobHandle",
    "JobKilled", "JobResult", "JobrunnerError", "Lock", "LockBusy", "LockInDoubt", "LockLost", "Max", "Mean", "Min",
    "OutputBusy", "Refused", "SpecError", "Step", "Sum", "TaskError", "TopK", "Unavailable", "Unknown", "UnknownJob",
    "batch", "counter", "param", "task",
]  # fmt: skip

_HOMES = {
    "jobrunner.api.client": ("Client",),
    "jobrunner.api.handle": ("JobHandle", "JobResult"),
    "jobrunner.api.job": ("Job", "Step"),
    "jobrunner.api.locks": ("Lock",),
    "jobrunner.errors": (
        "Compacted", "CorruptData", "Fatal", "JobKilled", "JobrunnerError", "LockBusy", "LockInDoubt", "LockLost",
        "OutputBusy", "Refused", "SpecError", "TaskError", "Unavailable", "Unknown", "UnknownJob",
    ),
    "jobrunner.shuffle.batch": ("batch",),
    "jobrunner.shuffle.reducers": (
        "Collect", "Count", "Distinct", "First", "Max", "Mean", "Min", "Sum", "TopK",
    ),
    "jobrunner.worker.context": ("counter", "param", "task"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jobrunner")
    if name not in _HOME:
        raise AttributeError(f"module 'jobrunner' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # The next look finds it without this function.
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
