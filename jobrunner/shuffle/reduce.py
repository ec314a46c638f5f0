"""The reduce side: runs of one reducer in, output pairs out, in canonical key order."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobrunner.shuffle.columns import values_list
from jobrunner.shuffle.keys import decode_keys
from jobrunner.shuffle.limits import ShuffleLimits
from jobrunner.shuffle.merge import grouped, merge_all
from jobrunner.shuffle.reducers import Ready
from jobrunner.shuffle.runs import Run


def reduce_partition(
    runs: Sequence[Run], reducer: "Ready | Callable[[Any, Iterator[Any]], Any]", limits: ShuffleLimits, scratch: Path
) -> Iterator[Any]:
    """Output pairs of one reducer, lazily. `runs` are in map order; `scratch` exists and is only used beyond
    merge_runs_max runs.

    A ready-made reducer folds partial results, so map must have written them with it as its combiner. Any other is
    called as f(key, values), with `values` streaming; what it gives is passed on unchecked, None stands for nothing.
    Raises CorruptData, BadValue, and what user code raises.
    """
    if isinstance(reducer, Ready):
        for rows in merge_all(runs, limits, scratch, reducer):
            yield from zip(decode_keys(rows.column("key")), values_list(rows.column("value")), strict=True)
        return
    for key, values in grouped(merge_all(runs, limits, scratch)):
        pairs = reducer(key, values)
        if pairs is not None:
            yield from pairs
