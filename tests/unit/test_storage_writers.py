"""The text of output: one pair a line, whatever is in it."""

import io
from datetime import date
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.storage.writers import BadOutput, TextWriter, format_text


def text(*pairs: Any) -> bytes:
    file = io.BytesIO()
    writer = TextWriter(file)
    writer.write_pairs(pairs)
    assert (writer.records, writer.bytes) == (len(pairs), len(file.getvalue()))
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain é", "plain é"), ("a\tb\nc\rd\\e", r"a\tb\nc\rd\\e"), ("", ""), (None, ""), (1.0, "1.0"),
        (float("inf"), "inf"), (0.1, "0.1"), (-5, "-5"), (1 << 70, str(1 << 70)), (True, "true"),
        (b"a\t\x00\xff\\", r"a\x09\x00\xff\\"), (("a\t", 1, None), r'["a\t", 1, null]'), ({"a": [1.5]}, '{"a": [1.5]}'),
        (Decimal("1.50"), "1.50"), (date(2020, 1, 2), '"2020-01-02"'), ((Decimal("1.50"),), '["1.50"]'),
        (np.float64(1.5), "1.5"), (np.int64(3), "3"), (IntEnum("E", ["A"]).A, "1"), (StrEnum("S", ["A"]).A, "a"),
    ],
)  # fmt: skip
def test_values_are_written_as_the_contract_says(value: Any, written: str) -> None:
    """Other people's scripts read these files."""
    assert format_text(value) == written
    assert text((value, "x"), ("y", value)) == f"{written}\tx\ny\t{written}\n".encode()


plain = st.text(st.characters(codec="utf-8"), max_size=5) | st.integers()


@given(st.lists(st.tuples(plain | st.none() | st.booleans(), plain)))
def test_a_whole_list_is_written_as_its_pairs_are(pairs: list[Any]) -> None:
    """The fast path would write something else than the slow one."""
    assert text(*pairs) == "".join(f"{format_text(key)}\t{format_text(value)}\n" for key, value in pairs).encode()


def test_bytes_that_were_not_utf8_are_written_back() -> None:
    line = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    assert text((line, 1)) == b"caf\xe9\xff\t1\n"
    assert text((line + "\ud800", 1)) == b"caf\xe9\xff\\ud800\t1\n"


def test_numbers_of_any_size_are_written_in_decimal() -> None:
    assert text(("a", 10**5000)) == b"a\t1" + b"0" * 5000 + b"\n"


@pytest.mark.parametrize("value", [{1}, object(), 1j])
def test_what_has_no_text_is_named(value: Any) -> None:
    with pytest.raises(BadOutput, match="has no text"):
        text(("a", value))


@pytest.mark.parametrize("pair", ["ab", ("a",), (1, 2, 3), 5])
def test_what_is_no_pair_is_refused(pair: Any) -> None:
    with pytest.raises(BadOutput, match="pairs"):
        text(("a", 1), pair)
