"""Mean, Distinct, TopK, First, Collect and sorted values, through writer, spills and merges, against plain Python."""

from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner import Collect, Count, Distinct, First, Job, Max, Mean, Min, Sum, TopK
from jobrunner.errors import SpecError
from jobrunner.shuffle.composite import compose, split_composite
from jobrunner.shuffle.keys import encode_key, encode_keys
from jobrunner.shuffle.reducers import BadValue, Ready
from jobrunner.testing import run_inline
from tests.unit.test_shuffle_pipeline import Pairs, check_order, collect, keys, model, run, small, write

numbers = st.integers(-5, 5) | st.integers() | st.booleans() | st.sampled_from([(1 << 63) - 1, -(1 << 63)])
halves = st.integers(-1000, 1000).map(lambda number: number / 2)
zeros = st.sampled_from(
    ["\x00", "a\x00", "a\x00\xff", "a", b"\x00\xff", b"\x00", 0, ("\x00", 0), -1, None, 0.0, 1 << 70]
)


def some(values: Any) -> Any:
    """Up to four maps of pairs."""
    return st.lists(st.lists(st.tuples(keys | zeros, values), max_size=40), max_size=4)


def mean(values: list[Any]) -> Any:
    return sum(values) / len(values)


def distinct(values: list[Any]) -> int:
    return len(set(map(encode_key, values)))


def top(values: list[Any]) -> list[Any]:
    return sorted(values, reverse=True)[:3]


def check(maps: list[Pairs], reducers: int, reducer: Any, plain: Callable[[list[Any]], Any]) -> None:
    outputs, _ = run(maps, reducers, reducer, reducer if isinstance(reducer, Ready) else None)
    check_order(outputs)
    got = {encode_key(key): value for pairs in outputs for key, value in pairs}
    want = {key: plain(values) for key, values in model(maps).items()}
    assert repr(sorted(got.items())) == repr(sorted(want.items()))


@settings(max_examples=60, deadline=None)
@given(maps=some(numbers), reducers=st.integers(1, 4))
def check_means(maps: list[Pairs], reducers: int) -> None:
    check(maps, reducers, Mean(), mean)


@settings(max_examples=40, deadline=None)
@given(maps=some(halves | st.integers(-9, 9)))
def check_mixed_means(maps: list[Pairs]) -> None:
    check(maps, 2, Mean(), mean)


@small
def test_a_mean_is_of_the_exact_sum() -> None:
    """A sum that wrapped at 64 bits, or that went through floats, would be wrong without a word."""
    check_means()
    check_mixed_means()


@settings(max_examples=60, deadline=None)
@given(maps=some(zeros | numbers | st.floats(allow_nan=False)), reducers=st.integers(1, 4))
def check_distinct(maps: list[Pairs], reducers: int) -> None:
    check(maps, reducers, Distinct(), distinct)


@small
def test_different_values_are_counted_as_keys_differ() -> None:
    """True, 1 and 1.0 are three values, in one map output and across several."""
    check_distinct()


@settings(max_examples=60, deadline=None)
@given(maps=some(numbers | halves), reducers=st.integers(1, 4))
def check_top(maps: list[Pairs], reducers: int) -> None:
    check(maps, reducers, TopK(3), top)


@small
def test_the_top_is_that_of_a_stable_sort() -> None:
    """Of 1, True and 1.0 the earlier come first, wherever the data was cut."""
    check_top()


@settings(max_examples=40, deadline=None)
@given(maps=some(zeros | numbers | st.lists(st.integers(), max_size=2)), reducers=st.integers(1, 4))
def check_first(maps: list[Pairs], reducers: int) -> None:
    check(maps, reducers, First(), lambda values: values[0])
    check(maps, reducers, Collect(), list)


@small
def test_the_first_is_that_of_the_first_map() -> None:
    """The order of maps, not the order in which they ended, says what is first."""
    check_first()


def check_again(reducer: Ready) -> None:
    pairs = [(f"k{i % 17}", i * 0.1 if i % 5 else i) for i in range(400)]
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        (first, summary) = write(Path(one), pairs, combine=reducer, reducers=2)
        (second, again) = write(Path(two), iter(pairs), combine=reducer, reducers=2)
        assert summary == again
        assert summary.spills
        assert first.read_bytes() == second.read_bytes()


@small
def test_a_re_run_writes_the_same_rows() -> None:
    """The digest of a re-run must be the recorded one, or the job fails as not deterministic."""
    for reducer in (Mean(), Distinct(), TopK(2), First()):
        check_again(reducer)


@pytest.mark.parametrize("reducer", [Sum(), Count(), Min(), Max(), Mean(), Distinct(), TopK(3), First()])
def test_as_a_function_a_reducer_gives_the_same(reducer: Ready) -> None:
    """It is also an ordinary reduce function, for users' own tests and other frameworks."""
    values = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    (pairs,), _ = run(
        [[("k", value) for value in values[:4]], [("k", value) for value in values[4:]]], 1, reducer, reducer
    )
    assert list(reducer("k", values)) == pairs
    assert list(reducer("k", [])) == []


def test_means_of_decimals_and_fractions_stay_what_they_are() -> None:
    (pairs,), _ = run(
        [[("d", Decimal(1)), ("f", Fraction(1))], [("d", Decimal(2)), ("f", Fraction(2))]], 1, Mean(), Mean()
    )
    assert pairs == [("d", Decimal("1.5")), ("f", Fraction(3, 2))]
    assert type(pairs[0][1]) is Decimal and type(pairs[1][1]) is Fraction


def test_nan_is_last_in_the_top() -> None:
    nan = float("nan")
    (pairs,), _ = run([[("a", nan), ("a", 1.0)], [("a", 3.0), ("a", nan), ("b", nan)]], 1, TopK(3), TopK(3))
    assert repr(pairs) == "[('a', [3.0, 1.0, nan]), ('b', [nan])]"


@pytest.mark.parametrize(
    ("reducer", "value"), [(Mean(), "x"), (Distinct(), [1]), (TopK(2), None), (Mean(), None), (Distinct(), {})]
)
def test_a_value_that_cannot_be_taken_is_named_with_its_key(reducer: Ready, value: Any) -> None:
    with pytest.raises(BadValue, match=r"cannot take value .* of key 'k'"):
        run([[("a", 1), ("k", 1), ("k", value)]], 1, reducer, reducer)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_a_top_of_nothing_is_refused(count: Any) -> None:
    with pytest.raises(SpecError, match="TopK: found"):
        TopK(count)


# --- sorted values ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(zeros | keys, zeros | keys), min_size=1, max_size=30), start=st.integers(0, 5))
def test_a_composite_orders_by_key_then_value_and_comes_apart_again(pairs: Pairs, start: int) -> None:
    """A zero byte in a key that was taken for its end would give keys that nobody emitted."""
    first, second = encode_keys([key for key, _ in pairs]), encode_keys([value for _, value in pairs])
    column = compose(first, second)
    both = list(zip(first.to_pylist(), second.to_pylist(), strict=True))
    assert [both[i] for i in sorted(range(len(both)), key=lambda i: column[i].as_py())] == sorted(both)
    parts = split_composite(column.slice(start))
    assert list(zip(parts[0].to_pylist(), parts[1].to_pylist(), strict=True)) == both[start:]


@settings(max_examples=60, deadline=None)
@given(maps=some(zeros | numbers), reducers=st.integers(1, 4), combined=st.booleans())
def check_sorted(maps: list[Pairs], reducers: int, combined: bool) -> None:
    def same(key: Any, values: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        for value in values:
            yield key, value

    outputs, _ = run(maps, reducers, collect, same if combined else None, sort_values=True)
    plain, _ = run(maps, reducers, collect)
    want = [[(key, sorted(map(encode_key, values))) for key, values in pairs] for pairs in plain]
    assert repr([[(key, list(map(encode_key, values))) for key, values in pairs] for pairs in outputs]) == repr(want)


@small
def test_values_arrive_in_canonical_order_in_the_same_partitions() -> None:
    """The partition follows from the key alone: values of one key would come apart otherwise."""
    check_sorted()


def test_a_combiner_sees_sorted_values() -> None:
    def least(key: Any, values: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        yield key, next(values)

    (pairs,), _ = run([[("a", 3), ("a", 1)], [("a", 2)]], 1, collect, least, sort_values=True)
    assert pairs == [("a", [1, 2])]


def test_a_value_without_an_order_is_named_with_its_key() -> None:
    with pytest.raises(BadValue, match=r"sort_values cannot take value \[1\] of type list of key 'k'"):
        run([[("a", 1), ("k", [1])]], 1, collect, sort_values=True)


def last(key: str, values: Iterator[int]) -> Iterator[tuple[str, list[int]]]:
    yield key, list(values)


def length_first(line: str) -> list[tuple[str, Any]]:
    return [(line[:1], (len(line), line))]


def test_inline_jobs_sort_values_too() -> None:
    """What a user's test shows must be what the cluster does."""
    lines = ["bb", "aaa", "a", "b", "aa"]
    got = run_inline(Job(map=length_first, reduce=last, sort_values=True), lines)
    assert got == [("a", [(1, "a"), (2, "aa"), (3, "aaa")]), ("b", [(1, "b"), (2, "bb")])]
    assert run_inline(Job(map=length_first, reduce=Collect(), sort_values=True), lines) == got
    assert run_inline(Job(map=length_first, reduce=TopK(1)), lines) == [("a", [(3, "aaa")]), ("b", [(2, "bb")])]
    assert run_inline(Job(map=length_first, reduce=Distinct()), lines) == [("a", 3), ("b", 2)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"reduce": Sum(), "sort_values": True}, "sort_values: found True with Sum()"),
        ({"reduce": last, "combine": Mean()}, "combine: found Mean() with another reduce"),
        ({"reduce": last, "combine": Sum(), "sort_values": True}, "combine: found Sum() with sort_values"),
    ],
)
def test_what_has_no_meaning_together_is_refused(words: dict[str, Any], line: str) -> None:
    """A reduce function would be given (total, count) pairs of Mean() for values."""
    with pytest.raises(SpecError) as caught:
        Job(map=length_first, **words)
    assert line in str(caught.value)
