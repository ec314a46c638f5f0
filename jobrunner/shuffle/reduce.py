"""The reduce side: runs of one reducer in, output pairs out, in canonical key order."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobrunner.shuffle.columns import values_list
from jobrunner.shuffle.composite import split_batches
from jobrunner.shuffle.fold import count_groups
from jobrunner.shuffle.keys import decode_keys
from jobrunner.shuffle.limits import ShuffleLimits
from jobrunner.shuffle.merge import fold_batches, grouped, merge_all
from jobrunner.shuffle.reducers import Count, Distinct, Ready
from jobrunner.shuffle.runs import Run


def reduce_partition(
    runs: Sequence[Run],
    reducer: "Ready | Callable[[Any, Iterator[Any]], Any]",
    limits: ShuffleLimits,
    scratch: Path,
    *,
    sort_values: bool = False,
) -> Iterator[Any]:
    """Output pairs of one reducer, lazily. `runs` are in map order; `scratch` exists and is only used beyond
    merge_runs_max runs. With `sort_values` map must have written composite keys.

    A ready-made reducer folds partial results, so map must have written them with it as its combiner. Any other is
    called as f(key, values), with `values` streaming; what it gives is passed on unchecked, None stands for nothing.
    Raises CorruptData, BadValue, and what user code raises.
    """
    if isinstance(reducer, Ready):
        yield from _fold(merge_all(runs, limits, scratch, reducer), reducer)
        return
    batches = merge_all(runs, limits, scratch)
    for key, values in grouped(split_batches(batches) if sort_values else batches):
        pairs = reducer(key, values)
        if pairs is not None:
            yield from pairs


def _fold(batches: Iterator[Any], reducer: Ready) -> Iterator[Any]:
    """Pairs of folded batches, whose keys are distinct."""
    if isinstance(reducer, Distinct):
        batches = fold_batches(map(count_groups, split_batches(batches)), Count())
        reducer = Count()
    plain = type(reducer).finish is Ready.finish
    for rows in batches:
        values = values_list(rows.column("value"))
        yield from zip(decode_keys(rows.column("key")), values if plain else map(reducer.finish, values), strict=True)
