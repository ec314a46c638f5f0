"""Writer, block file, merge and reduce together, against a plain Python model."""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner.errors import TaskError
from jobrunner.ids import AttemptId, JobId, StageName, Token
from jobrunner.planner.plan import ShufflePlan
from jobrunner.shuffle.blocks import block_path, read_index, read_partition_bytes
from jobrunner.shuffle.buffer import BadPair
from jobrunner.shuffle.keys import UnsupportedKey, encode_key, encode_keys
from jobrunner.shuffle.partition import hash_column, partition_of
from jobrunner.shuffle.reduce import reduce_partition
from jobrunner.shuffle.reducers import BadValue, Count, Max, Min, Ready, Sum
from jobrunner.shuffle.runs import BytesRun
from jobrunner.shuffle.writer import BlockSummary, MapOutputWriter

PLAN = ShufflePlan(
    reducers=1, hash_version=1, buffer_bytes_max=65_536, merge_runs_max=2, batch_rows_max=16,
    fetch_bytes_max=65_536, fetch_retries_max=2, fetch_timeout_ms=1_000, compression="lz4",
)  # fmt: skip

Pairs = list[tuple[Any, Any]]


def write(directory: Path, pairs: Any, *, number: int = 0, reducers: int = 1, combine: Any = None, **how: Any) -> Any:
    """One map attempt; its path and summary."""
    attempt = AttemptId(JobId("j-x"), StageName("map"), number, 0)
    path = block_path(directory / "blocks", attempt, Token(7 + number))
    scratch = directory / f"scratch-{number}"
    scratch.mkdir(exist_ok=True)
    writer = MapOutputWriter(
        scratch, path, attempt, Token(7 + number), reducers, PLAN, combine, how.get("partition"),
        sort_values=how.get("sort_values", False),
    )  # fmt: skip
    add = writer.add_table if how.get("table") else writer.add_keys if how.get("bare") else writer.add
    for some in pairs if how.get("tables") else [pairs]:
        (writer.add_table if how.get("tables") else add)(some)
    return path, writer.finish()


def run(maps: list[Any], reducers: int, reduce: Any, combine: Any = None, **how: Any) -> tuple[list[Pairs], int]:
    """Output pairs of each reducer, and how many spills there were."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        written = [
            write(directory, pairs, number=number, reducers=reducers, combine=combine, **how)
            for number, pairs in enumerate(maps)
        ]
        outputs = []
        for reducer in range(reducers):
            runs = [BytesRun(read_partition_bytes(path, reducer), str(path)) for path, _ in written]
            sort_values = how.get("sort_values", False)
            outputs.append(list(reduce_partition(runs, reduce, PLAN, directory, sort_values=sort_values)))
        left = [path.name for path in directory.rglob("*.run")] + [path.name for path in directory.rglob("*.tmp")]
        assert left == []
        return outputs, sum(summary.spills for _, summary in written)


def collect(key: Any, values: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    yield key, list(values)


def model(maps: list[Pairs]) -> dict[bytes, list[Any]]:
    groups: dict[bytes, list[Any]] = {}
    for key, value in itertools.chain.from_iterable(maps):
        groups.setdefault(encode_key(key), []).append(value)
    return groups


def check_order(outputs: list[Pairs]) -> None:
    for pairs in outputs:
        encoded = [encode_key(key) for key, _ in pairs]
        assert encoded == sorted(set(encoded))


keys = (
    st.sampled_from(["a", "b", "", "\x06", "é", "\udc80", 1, True, 1.0, None, 1 << 80, ("a", 1), b"a"])
    | st.text(max_size=3) | st.integers(-20, 20) | st.floats(allow_nan=False, width=16)
)  # fmt: skip
ints = st.integers(-5, 5) | st.integers() | st.booleans() | st.sampled_from([(1 << 63) - 1, -(1 << 63), 1 << 62])
some_ints = st.lists(st.lists(st.tuples(keys, ints), max_size=40), max_size=4)
anything = ints | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=2) | st.floats(allow_nan=False)


def small(test: Callable[..., None]) -> Callable[..., None]:
    """Flush after every few rows and spill after every few flushes, so that short inputs take every path."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        with (
            patch("jobrunner.shuffle.writer.ROWS_MAX", 6),
            patch("jobrunner.shuffle.writer.CHUNK", 3),
            patch("jobrunner.shuffle.buffer.CHUNK", 3),
            patch("jobrunner.shuffle.writer.buffer_bytes", lambda limits: 300),
        ):
            test(*args, **kwargs)

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@settings(max_examples=60, deadline=None)
@given(maps=st.lists(st.lists(st.tuples(keys, anything), max_size=40), max_size=4), reducers=st.integers(1, 5))
def check_collect(maps: list[Pairs], reducers: int) -> None:
    outputs, _ = run(maps, reducers, collect)
    check_order(outputs)
    got = {encode_key(key): values for pairs in outputs for key, values in pairs}
    assert repr(sorted(got.items())) == repr(sorted(model(maps).items()))
    for reducer, pairs in enumerate(outputs):
        hashes = hash_column(encode_keys([key for key, _ in pairs]))
        assert set(partition_of(hashes, reducers).tolist()) <= {reducer}


@small
def test_every_value_reaches_its_reducer_in_the_order_of_emission() -> None:
    """Lost, doubled or reordered rows; also through several spills and several passes of merging."""
    check_collect()


@settings(max_examples=60, deadline=None)
@given(maps=some_ints, reducers=st.integers(1, 5), reducer=st.sampled_from([Sum(), Min(), Max(), Count()]))
def check_ready(maps: list[Pairs], reducers: int, reducer: Ready) -> None:
    outputs, _ = run(maps, reducers, reducer, reducer)
    check_order(outputs)
    got = {encode_key(key): value for pairs in outputs for key, value in pairs}
    plain: dict[type, Callable[[list[Any]], Any]] = {Sum: sum, Min: min, Max: max, Count: len}
    want = {key: plain[type(reducer)](values) for key, values in model(maps).items()}
    assert got == want
    if not isinstance(reducer, Min | Max):
        assert all(type(value) is int for value in got.values())


@small
def test_ready_made_reducers_give_what_python_gives() -> None:
    """An int64 sum that wraps, or True that becomes 1 in Min, would be silently wrong."""
    check_ready()


@settings(max_examples=40, deadline=None)
@given(maps=some_ints, reducers=st.integers(1, 3))
def check_user_combine(maps: list[Pairs], reducers: int) -> None:
    def total(key: Any, values: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        yield key, sum(values)

    outputs, _ = run(maps, reducers, total, total)
    got = {encode_key(key): value for pairs in outputs for key, value in pairs}
    assert got == {key: sum(values) for key, values in model(maps).items()}


@small
def test_a_combiner_changes_nothing_but_the_number_of_rows() -> None:
    check_user_combine()


@settings(max_examples=40, deadline=None)
@given(maps=st.lists(st.lists(keys, max_size=40), max_size=3))
def check_bare(maps: list[list[Any]]) -> None:
    outputs, _ = run(maps, 2, Count(), Count(), bare=True)
    got = {encode_key(key): value for pairs in outputs for key, value in pairs}
    assert got == {key: len(ones) for key, ones in model([[(key, 1) for key in some] for some in maps]).items()}


@small
def test_bare_keys_are_counted() -> None:
    check_bare()


@small
def test_a_map_that_runs_again_writes_the_same_file() -> None:
    """The digest of a re-run must be the recorded one, or the job fails as not deterministic."""
    pairs = [(f"k{i % 37}", i * 0.1 if i % 5 else i) for i in range(400)]
    for combine in (None, Sum()):
        with TemporaryDirectory() as one, TemporaryDirectory() as two:
            (first, summary), (second, again) = (
                write(Path(one), pairs, combine=combine),
                write(Path(two), iter(pairs), combine=combine),
            )
            assert summary == again
            assert summary.spills > 2
            assert first.read_bytes() == second.read_bytes()


def test_the_summary_is_what_the_file_says(tmp_path: Path) -> None:
    path, summary = write(tmp_path, [("a", 1), ("b", 2), ("a", 3)], reducers=3)
    index = read_index(path)
    assert summary == BlockSummary(index.digest, 3, path.stat().st_size, 0)
    assert sum(index.rows) == 3


def test_an_empty_map_output_has_no_rows(tmp_path: Path) -> None:
    path, summary = write(tmp_path, [], reducers=3)
    assert (summary.rows, summary.digest) == (0, 0)
    assert read_index(path).lengths == [0, 0, 0]


def test_sums_stay_exact_beyond_64_bits_and_keep_their_type() -> None:
    maps: list[Pairs] = [[("a", 1 << 62), ("b", 1), ("c", 0.5), ("d", Fraction(1, 3))]] * 4
    (pairs,), _ = run(maps, 1, Sum(), Sum())
    assert pairs == [("a", 1 << 64), ("b", 4), ("c", 2.0), ("d", Fraction(4, 3))]
    assert list(map(type, dict(pairs).values())) == [int, int, float, Fraction]


def test_nan_counts_in_min_only_where_there_is_nothing_else() -> None:
    nan = math.nan
    (pairs,), _ = run([[("a", nan), ("a", 2.0), ("b", nan)], [("a", 1.0), ("b", nan)]], 1, Min(), Min())
    assert pairs[0] == ("a", 1.0)
    assert math.isnan(pairs[1][1])


@pytest.mark.parametrize("value", ["x", None, [1]])
def test_a_value_that_cannot_be_summed_is_named_with_its_key(value: Any) -> None:
    with pytest.raises(BadValue, match=r"Sum\(\) cannot take value .* of key 'k'"):
        run([[("a", 1), ("k", value)]], 1, Sum(), Sum())


@pytest.mark.parametrize("pairs", [["ab"], [("a", 1), ("a",)], [("a", 1, 2)], [1], [None]])
def test_what_is_no_pair_is_refused(pairs: list[Any]) -> None:
    """A bare word of two letters would pass as a key and a value."""
    for combine in (None, Sum()):
        with pytest.raises(BadPair, match="pairs, got"):
            run([pairs], 1, collect, combine)


def test_a_bad_key_is_refused_on_every_path() -> None:
    for combine in (None, Sum(), Count()):
        with pytest.raises(UnsupportedKey, match="list"):
            run([[("a", 1), ([1], 1)]], 1, collect, combine)


def test_a_value_that_changes_after_it_was_yielded_is_kept_as_it_was() -> None:
    """A generator that yields one list again and again would give its last state everywhere."""

    def again() -> Iterator[tuple[str, list[int]]]:
        held: list[int] = []
        for i in range(5_000):
            held[:] = [i]
            yield "k", held

    (pairs,), _ = run([again()], 1, collect)
    assert pairs == [("k", [[i] for i in range(5_000)])]


def test_few_large_values_are_held_at_a_time(tmp_path: Path) -> None:
    """A chunk of 2,000 values of a megabyte each would not fit in memory, whatever the buffer's limit."""
    held: list[int] = []
    with patch(
        "jobrunner.shuffle.writer.islice", lambda source, count: held.append(count) or itertools.islice(source, count)
    ):
        write(tmp_path, ((i, b"x" * 10_000) for i in range(200)))
        write(tmp_path, ((i, [b"x" * 10_000]) for i in range(20)), number=1)
    assert held[0] == 1
    assert max(held[:-25]) == 1


def test_a_key_that_spans_many_batches_keeps_the_order_of_maps() -> None:
    """Float sums and `sort by emission` would change from run to run."""
    maps = [[("a", (number, i)) for i in range(100)] + [("b", number)] for number in range(5)]
    (pairs,), _ = run(maps, 1, collect)
    assert pairs == [("a", [(number, i) for number in range(5) for i in range(100)]), ("b", [0, 1, 2, 3, 4])]


def test_values_that_were_not_read_are_skipped() -> None:
    """The next group would begin with the rest of this one."""

    def first(key: Any, values: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        yield key, next(values)

    maps = [[(i // 50, number * 1000 + i) for i in range(200)] for number in range(3)]
    (pairs,), _ = run(maps, 1, first)
    assert pairs == [(0, 0), (1, 50), (2, 100), (3, 150)]
    (nothing,), _ = run(maps, 1, lambda key, values: None)
    assert nothing == []


def test_a_custom_partitioner_decides() -> None:
    pairs = [(i, 1) for i in range(50)]
    outputs, _ = run([pairs], 3, Sum(), Sum(), partition=lambda key, reducers: key % reducers)
    assert [[key % 3 for key, _ in out] for out in outputs] == [[n] * len(out) for n, out in enumerate(outputs)]
    with pytest.raises(TaskError, match="partition"):
        run([pairs], 3, Sum(), Sum(), partition=lambda key, reducers: key)


@small
def test_large_values_are_cut_into_small_batches() -> None:
    big = [(i % 3, b"x" * 40_000) for i in range(12)]
    (pairs,), spills = run([big, big], 1, collect)
    assert [(key, len(values)) for key, values in pairs] == [(0, 8), (1, 8), (2, 8)]
    assert spills


def test_ready_made_reducers_are_ordinary_functions_too() -> None:
    assert list(Sum()("k", iter([1, True, 2.5]))) == [("k", 4.5)]
    assert list(Count()("k", iter("abc"))) == [("k", 3)]
    assert list(Max()("k", iter([1, 3, 2]))) == [("k", 3)]
    assert list(Min()("k", iter([]))) == []
    assert pickle.loads(pickle.dumps(Sum())) == Sum()


@pytest.mark.parametrize("pairs", [[1], [({}, 1)]])
def test_what_a_combiner_may_not_give_is_called_the_combiners(tmp_path: Path, pairs: list[Any]) -> None:
    """The map function was blamed, or nobody: its user looks in the wrong place."""

    def half(key: Any, values: Any) -> Any:
        return pairs

    with pytest.raises(TaskError, match=r"combine function .*half: "):
        write(tmp_path, [("a", 1)], combine=half)
