"""run_inline: a job in this process, through the real shuffle, for quick tests of map and reduce functions.

Two mappers and two reducers on purpose: what only works in one process with one of each is found here.
"""

import tempfile
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobrunner.api.job import Job
from jobrunner.ids import AttemptId, JobId, StageName, Token, job_id_from_number
from jobrunner.shuffle.batch import is_batch
from jobrunner.shuffle.blocks import read_partition_bytes
from jobrunner.shuffle.keys import UnsupportedKey, encode_key
from jobrunner.shuffle.reduce import reduce_partition
from jobrunner.shuffle.reducers import Count, Ready
from jobrunner.shuffle.runs import BytesRun
from jobrunner.shuffle.tables import table_pairs
from jobrunner.shuffle.writer import MapOutputWriter
from jobrunner.spec.settings import ShuffleSection
from jobrunner.worker.context import Task, running
from jobrunner.worker.user_code import ready_combiner, ready_function

_JOB: JobId = job_id_from_number(0)
_MAP, _REDUCE = StageName("map"), StageName("reduce")


def run_inline(
    job: Job,
    records: Iterable[Any],
    *,
    params: Mapping[str, object] | None = None,
    mappers: int = 2,
    reducers: int = 2,
    counters: dict[str, int] | None = None,
) -> list[tuple[Any, Any]]:
    """Output pairs of `job` over `records`, in canonical key order (a map-only job: in the order of its records).

    `counters` is filled with what the functions counted. Raises what the functions raise.
    """
    texts = {name: str(value) for name, value in (params or {}).items()}
    shares = [list(share) for share in _shares(list(records), max(1, mappers))]
    counted: dict[str, int] = counters if counters is not None else {}
    with tempfile.TemporaryDirectory(prefix="jobrunner-inline-") as scratch:
        if job.step.reduce is None:
            return list(
                chain.from_iterable(
                    _map_only(job, share, Task(_attempt(_MAP, n), texts, f"{scratch}/m{n}"), counted)
                    for n, share in enumerate(shares)
                )
            )
        blocks = [
            _map_share(job, share, Task(_attempt(_MAP, n), texts, f"{scratch}/m{n}"), Path(scratch), reducers, counted)
            for n, share in enumerate(shares)
        ]
        pairs: list[tuple[Any, Any]] = []
        for partition in range(reducers):
            task = Task(_attempt(_REDUCE, partition), texts, f"{scratch}/r{partition}")
            pairs += _reduce_share(job, blocks, partition, task, Path(scratch), counted)
    return sorted(pairs, key=lambda pair: encode_key(pair[0])) if _sortable(pairs) else pairs


def _shares(records: list[Any], mappers: int) -> list[list[Any]]:
    size = -(-len(records) // mappers) or 1
    return [records[start : start + size] for start in range(0, size * mappers, size)]


def _attempt(stage: StageName, partition: int) -> AttemptId:
    return AttemptId(_JOB, stage, partition, 0)


def _mapped(job: Job, share: list[Any]) -> Iterable[Any]:
    """What map gives: pairs, or tables of a batch function."""
    function = ready_function(job.step.map)
    if function.batch:
        lines = pa.RecordBatch.from_arrays([pa.array(share, pa.string())], names=["line"])
        given = [function.opening(), function.call(lines) if share else None, function.closing()]
        yield from (table for table in given if table is not None and not isinstance(table, tuple))
        return
    yield from function.opening()
    for record in share:
        yield from function.call(record) or ()
    yield from function.closing()


def _map_only(job: Job, share: list[Any], task: Task, counters: dict[str, int]) -> list[tuple[Any, Any]]:
    with running(task):
        items = _mapped(job, share)
        if is_batch(job.step.map):
            items = chain.from_iterable(map(table_pairs, items))
        pairs = [(key, value) for key, value in items]
    _add(counters, task)
    return pairs


def _map_share(job: Job, share: list[Any], task: Task, scratch: Path, reducers: int, counters: dict[str, int]) -> Path:
    attempt = task.attempt_id
    path = scratch / f"{attempt.partition}.jrb"
    spills = scratch / f"spill-{attempt.partition}"
    spills.mkdir()
    with running(task):
        reduce = job.step.reduce
        combine = reduce if isinstance(reduce, Ready) else ready_combiner(job.step.combine)
        writer = MapOutputWriter(
            spills,
            path,
            attempt,
            Token(attempt.partition + 1),
            reducers,
            ShuffleSection(),
            combine,
            job.step.partition,
            sort_values=job.step.sort_values,
        )
        items = list(_mapped(job, share))
        if is_batch(job.step.map):
            for table in items:
                writer.add_table(table)
        elif isinstance(combine, Count):
            writer.add_keys(item[0] if isinstance(item, tuple | list) and len(item) == 2 else item for item in items)
        else:
            writer.add(items)
        writer.finish()
    _add(counters, task)
    return path


def _reduce_share(
    job: Job, blocks: list[Path], partition: int, task: Task, scratch: Path, counters: dict[str, int]
) -> list[tuple[Any, Any]]:
    merges = scratch / f"merge-{partition}"
    merges.mkdir()
    runs = [BytesRun(read_partition_bytes(block, partition), str(block)) for block in blocks]
    with running(task):
        reduce = job.step.reduce
        if isinstance(reduce, Ready):
            pairs = list(reduce_partition(runs, reduce, ShuffleSection(), merges))
        else:
            function = ready_function(reduce)
            body = reduce_partition(runs, function.call, ShuffleSection(), merges, sort_values=job.step.sort_values)
            pairs = [*function.opening(), *body, *function.closing()]
    _add(counters, task)
    return pairs


def _add(counters: dict[str, int], task: Task) -> None:
    for name, amount in task.counted().items():
        counters[name] = counters.get(name, 0) + amount


def _sortable(pairs: list[tuple[Any, Any]]) -> bool:
    try:
        for key, _ in pairs:
            encode_key(key)
    except UnsupportedKey:
        return False
    return True
