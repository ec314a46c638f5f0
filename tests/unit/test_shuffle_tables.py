"""Batch functions: tables become the rows that pairs of the same values would become, and lines those of text."""

import os
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner import Collect, Count, Distinct, First, Job, Max, Mean, Min, Sum, TopK, batch
from jobrunner.planner.plan import InputFile, Piece
from jobrunner.shuffle.batch import is_batch
from jobrunner.shuffle.buffer import BadPair
from jobrunner.shuffle.keys import encode_keys
from jobrunner.shuffle.reducers import Ready
from jobrunner.shuffle.tables import encode_column
from jobrunner.storage.batches import BatchReader
from jobrunner.storage.readers import BadInput, LineReader
from jobrunner.testing import run_inline
from tests.unit.test_shuffle_pipeline import run, small, write

columns = st.sampled_from(
    [
        (pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)),
        (pa.large_string(), st.text("ab\x00", max_size=2)),
        (pa.binary(), st.binary(max_size=2)),
        (pa.binary(2), st.binary(min_size=2, max_size=2)),
        (pa.int64(), st.integers(-(1 << 63), (1 << 63) - 1)),
        (pa.int8(), st.integers(-4, 4)),
        (pa.uint64(), st.integers(0, (1 << 64) - 1)),
        (pa.float64(), st.floats(allow_nan=False, width=16)),
        (pa.float32(), st.floats(-4, 4, width=16)),
        (pa.bool_(), st.booleans()),
        (pa.dictionary(pa.int32(), pa.string()), st.text("ab", max_size=1)),
        (pa.date32(), st.dates(date(1970, 1, 1), date(1970, 1, 4))),
        (pa.string(), st.none() | st.text("ab", max_size=1)),
    ]
)
numeric = st.sampled_from(
    [
        (pa.int64(), st.integers(-(1 << 63), (1 << 63) - 1)),
        (pa.int32(), st.integers(-9, 9)),
        (pa.uint64(), st.integers(0, (1 << 64) - 1)),
        (pa.float64(), st.integers(-99, 99).map(lambda number: number / 2)),
        (pa.bool_(), st.booleans()),
    ]
)


@st.composite
def tables(draw: Any, values: Any) -> list[pa.Table]:
    (key_type, some_keys), (value_type, some_values) = draw(columns), draw(values)
    made = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 20))
        keys = draw(st.lists(some_keys, min_size=count, max_size=count))
        column = draw(st.lists(some_values, min_size=count, max_size=count))
        made.append(pa.table({"key": pa.array(keys, key_type), "value": pa.array(column, value_type)}))
    return made


def pairs_of(table: pa.Table) -> list[tuple[Any, Any]]:
    return list(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))


def both(made: list[pa.Table], reduce: Any, **how: Any) -> None:
    """The same table as table and as pairs gives the same output."""
    combine = reduce if isinstance(reduce, Ready) else None
    slow, _ = run([pairs_of(table) for table in made], 2, reduce, combine, **how)
    fast, _ = run(made, 2, reduce, combine, table=True, **how)
    assert repr(fast) == repr(slow)


@settings(max_examples=150, deadline=None)
@given(made=tables(numeric), reducer=st.sampled_from([Sum(), Count(), Min(), Max(), Mean(), First(), TopK(2)]))
def check_numbers(made: list[pa.Table], reducer: Ready) -> None:
    both(made, reducer)


@settings(max_examples=80, deadline=None)
@given(made=tables(columns), sort_values=st.booleans())
def check_anything(made: list[pa.Table], sort_values: bool) -> None:
    both(made, Collect(), sort_values=sort_values)
    both(made, Distinct())


@small
def test_the_fast_path_gives_what_the_slow_one_gives() -> None:
    """Wrapped sums, keys that Arrow takes for equal, or nulls lost would be silently wrong."""
    check_numbers()
    check_anything()


@settings(max_examples=80, deadline=None)
@given(made=tables(numeric))
def test_a_column_is_encoded_as_its_values_are(made: list[pa.Table]) -> None:
    for piece in made[0].select(["key"]).to_batches():
        keys = piece.column(0)
        if not pa.types.is_dictionary(keys.type) and not pa.types.is_large_string(keys.type):
            assert encode_column(keys).to_pylist() == encode_keys(keys.to_pylist()).to_pylist()


def test_several_tables_are_one_map_output(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "value": [1]})
    _, summary = write(tmp_path, [table, table], tables=True, combine=Sum())
    assert summary.rows == 1


@pytest.mark.parametrize(
    ("given_", "line"),
    [
        ([("a", 1)], "expected a pa.RecordBatch or pa.Table"),
        (pa.table({"key": ["a"]}), "columns key and value, got columns key"),
        (pa.table({"word": ["a"], "value": [1]}), "got columns word, value"),
        (pa.table({}), "got columns none"),
    ],
)
def test_what_is_no_table_of_pairs_is_refused(given_: Any, line: str) -> None:
    with pytest.raises(BadPair, match=line):
        run([given_], 1, Sum(), Sum(), table=True)


# --- lines -----------------------------------------------------------------------------------------------------------


def readers(path: Path, pieces: list[Piece], errors: str = "replace") -> tuple[LineReader, BatchReader]:
    found = os.stat(path)
    files = [InputFile(path.as_uri(), found.st_size, found.st_mtime_ns)]
    return tuple(  # type: ignore[return-value]
        kind(files, pieces, errors=errors, line_bytes_max=1_024, counters={}) for kind in (LineReader, BatchReader)
    )


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60) | st.text("ab\n\r é", max_size=60).map(str.encode), cut=st.integers(0, 60))
def test_batches_hold_the_lines_of_text(data: bytes, cut: int) -> None:
    """A batch function must see the input that a function of one line sees."""
    with TemporaryDirectory() as name:
        path = Path(name, "in.txt")
        path.write_bytes(data)
        cut = min(cut, len(data))
        lines, batches = readers(path, [Piece(0, 0, cut), Piece(0, cut, len(data) - cut)])
        got = [line for some in batches.batches() for line in some.column("line").to_pylist()]
        assert got == [line for some in lines for line in some]


def test_bytes_that_are_not_text_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"good\nb\xffd\n")
    for errors, line in (("strict", "byte 0xff at 6"), ("surrogateescape", "batch functions take nothing else")):
        with pytest.raises(BadInput, match=line):
            list(readers(path, [Piece(0, 0, 9)], errors)[1].batches())


# --- jobs ------------------------------------------------------------------------------------------------------------


@batch
def words(lines: pa.RecordBatch) -> pa.RecordBatch:
    found = pc.list_flatten(pc.utf8_split_whitespace(lines.column("line")))
    return pa.record_batch({"key": found.filter(pc.not_equal(found, ""))})


@batch
class Lengths:
    def __call__(self, lines: pa.RecordBatch) -> pa.Table | None:
        column = lines.column("line")
        return pa.table({"key": pc.utf8_slice_codeunits(column, 0, 1), "value": pc.utf8_length(column)})

    def close(self) -> pa.Table:
        return pa.table({"key": ["end"], "value": [1.5]})


def test_inline_jobs_run_batch_functions() -> None:
    lines = ["a b", "b  c ", "", "b"]
    assert run_inline(Job(map=words, reduce=Count()), lines) == [("a", 1), ("b", 3), ("c", 1)]
    assert run_inline(Job(map=Lengths, reduce=Mean()), ["ab", "abc", "b"]) == [("a", 2.5), ("b", 1.0), ("end", 1.5)]
    assert run_inline(Job(map=Lengths), ["ab"]) == [("a", 2), ("end", 1.5), ("end", 1.5)]
    assert is_batch(words) and is_batch(Lengths()) and not is_batch(len)


def test_a_batch_function_without_values_is_for_count() -> None:
    with pytest.raises(BadPair, match="columns key and value, got columns key"):
        run_inline(Job(map=words, reduce=Sum()), ["a"])
