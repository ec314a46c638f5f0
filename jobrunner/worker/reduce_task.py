"""A reduce attempt: its share of every map output through the user's function, into a staged partition.

    MapOutputs ─► fetch ─► runs in map order ─► merge ─► reduce() ─► TextWriter ─► staged partition ─► Sealable

Everything is fetched before user code runs, so that lost input costs no user time and shows at once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from jobrunner.commit.backends import PosixCommit
from jobrunner.commit.names import part_name
from jobrunner.control.messages import MapOutputs, Sealable
from jobrunner.failpoints import failpoint
from jobrunner.planner.code import StepCode
from jobrunner.planner.plan import JobPlan
from jobrunner.shuffle.fetch import Fetched, fetch_runs
from jobrunner.shuffle.reduce import reduce_partition
from jobrunner.shuffle.reducers import Ready
from jobrunner.shuffle.runs import Run
from jobrunner.storage.writers import BadOutput, TextWriter
from jobrunner.worker import wire
from jobrunner.worker.context import Task, running
from jobrunner.worker.files import empty_directory
from jobrunner.worker.user_code import Meter, UserFunction, blame, function_name, ready_function


def run_reduce(
    run: wire.Run, plan: JobPlan, code: StepCode, progress: Callable[[], None], on_fetched: Callable[[], None]
) -> Sealable:
    """Run one attempt to its end; `on_fetched` is called once, when all its input is here.

    Raises LostOutput, what user code raises, and what reading and writing raise.
    """
    failpoint("reduce.start")
    scratch = Path(run.scratch)
    task = Task(run.start.attempt, plan.params, str(scratch / "user"), on_progress=progress)
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    try:
        fetched = _fetch(run, plan, scratch, task)
        failpoint("reduce.fetched")
        on_fetched()
        with running(task):
            return _reduce(run, plan, code, task, fetched, scratch)
    finally:
        empty_directory(run.scratch)


def _fetch(run: wire.Run, plan: JobPlan, scratch: Path, task: Task) -> Fetched:
    outputs = msgspec.msgpack.decode(Path(run.answer).read_bytes(), type=MapOutputs)
    return fetch_runs(
        outputs,
        run.start.attempt.partition,
        own_directory=run.directory_id,
        blocks_root=Path(run.directory, "blocks"),
        job=run.start.attempt.job,
        stage=run.start.map_stage,
        cluster_token=run.cluster_token,
        plan=plan.shuffle,
        scratch=scratch,
        progress=task.progress,
    )


def _reduce(run: wire.Run, plan: JobPlan, code: StepCode, task: Task, fetched: Fetched, scratch: Path) -> Sealable:
    attempt, token = run.start.attempt, run.start.token
    written = Meter(task.progress)
    pairs = written.watch(_pairs(plan, code, task, fetched.runs, scratch))
    with PosixCommit(plan).open_attempt(attempt.partition, attempt.attempt, token) as output:
        file = output.create(part_name(attempt.partition, plan.output.extension))
        writer = TextWriter(cast("BinaryIO", file))
        with blame(f"reduce function {function_name(code.reduce)}", BadOutput):
            writer.write_pairs(pairs)
        file.records = writer.records
        task.progress()
        files = output.seal()
    counters = {**task.counted(), **({"reduce.output_records": written.count} if written.count else {})}
    return Sealable(attempt, token, files, fetched.consumed, counters)


def _pairs(plan: JobPlan, code: StepCode, task: Task, runs: Sequence[Run], scratch: Path) -> Iterator[Any]:
    """Output pairs in order of their keys, between what the reducer's setup() and close() give."""
    watched = [WatchedRun(run, task.progress) for run in runs]
    if isinstance(code.reduce, Ready):
        return reduce_partition(watched, code.reduce, plan.shuffle, scratch)
    function = ready_function(code.reduce)
    reduce = _metered(function, Meter(task.progress))
    return chain(
        function.opening(),
        reduce_partition(watched, reduce, plan.shuffle, scratch, sort_values=plan.shuffle.sort_values),
        chain.from_iterable(map(_closing, (function,))),  # Only when all keys are done.
    )


def _closing(function: UserFunction) -> Any:
    return function.closing()


def _metered(function: UserFunction, meter: Meter) -> Callable[[Any, Iterator[Any]], Any]:
    """The user's reducer; each value it takes is a sign of life."""
    call = function.call
    return lambda key, values: call(key, meter.watch(values))


class WatchedRun:
    """A run; each batch that is read from it is a sign of life."""

    def __init__(self, run: Run, progress: Callable[[], None]) -> None:
        self._run = run
        self._progress = progress

    def batches(self) -> Iterator[Any]:
        for batch in self._run.batches():
            self._progress()
            yield batch
