"""The canonical key encoding: order, round trip, and lists against single keys."""

import enum
import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.shuffle.keys import UnsupportedKey, decode_key, decode_keys, encode_key, encode_keys

texts = st.text(st.characters(codec=None), max_size=8)
decimals = st.decimals(allow_nan=False) | st.builds(
    lambda sign, digits, exponent: Decimal((sign, tuple(digits), exponent)),
    st.integers(0, 1), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(-8, 8),
)  # fmt: skip
integers = (
    st.integers() | st.integers(-(1 << 200), 1 << 200) | st.sampled_from([(1 << 63) - 1, 1 << 63, -(1 << 63) - 1])
)
scalars = (
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | decimals | texts | st.binary(max_size=8)
    | st.dates() | st.datetimes() | st.datetimes(timezones=st.just(UTC))
)  # fmt: skip
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)

KINDS = [type(None), bool, int, float, Decimal, str, bytes, date, datetime, tuple]


def order(key: Any) -> tuple[Any, ...]:
    """What the encoding's order is meant to be, in Python's terms."""
    kind = KINDS.index(type(key))
    if isinstance(key, tuple):
        return (kind, tuple(map(order, key)))
    if isinstance(key, Decimal):
        exponent = key.as_tuple().exponent
        return (kind, key, not key.is_signed(), exponent if isinstance(exponent, int) else 0)
    if isinstance(key, datetime):
        aware = key.tzinfo is not None
        return (kind, aware, key)
    return (kind,) if key is None else (kind, key)


@given(keys, keys)
def test_bytes_order_as_keys_do(left: Any, right: Any) -> None:
    """Merging compares bytes: another order than the documented one would split groups."""
    assert (encode_key(left) < encode_key(right)) == (order(left) < order(right))
    assert (encode_key(left) == encode_key(right)) == (order(left) == order(right))


@given(keys)
def test_a_key_comes_back_as_it_was(key: Any) -> None:
    """The reducer would see another key than the mapper gave."""
    back = decode_key(encode_key(key))
    assert order(back) == order(key)
    assert encode_key(back) == encode_key(key)


@given(st.lists(keys, max_size=5) | st.lists(texts) | st.lists(integers) | st.lists(st.floats()))
def test_a_list_is_encoded_as_its_keys_are(some: list[Any]) -> None:
    """The fast path would put a key elsewhere than the slow one."""
    column = encode_keys(some)
    assert column.to_pylist() == [encode_key(key) for key in some]
    assert repr(decode_keys(column)) == repr([decode_key(encode_key(key)) for key in some])


def test_equal_in_python_is_not_the_same_key() -> None:
    """A dict merges 1, 1.0 and True; a group-by must not."""
    assert len({encode_key(key) for key in (True, 1, 1.0, "1", b"1", Decimal(1), (1,))}) == 7


def test_zeros_are_one_float_and_nans_are_one_float() -> None:
    assert encode_key(-0.0) == encode_key(0.0)
    assert encode_key(float("nan")) == encode_key(-float("nan")) > encode_key(math.inf)
    assert math.isnan(decode_key(encode_key(float("nan"))))
    assert decode_key(encode_key(Decimal("NaN"))).is_nan()


def test_aware_datetimes_order_by_instant_then_offset() -> None:
    east = datetime(2020, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert encode_key(east) > encode_key(east.astimezone(UTC))  # The same instant.
    assert encode_key(east) < encode_key(east.astimezone(UTC) + timedelta(microseconds=1))
    assert decode_key(encode_key(east)).utcoffset() == timedelta(hours=2)


def test_subclasses_of_str_int_and_float_are_their_values() -> None:
    colour = enum.IntEnum("Colour", ["RED"])
    word = enum.StrEnum("Word", {"A": "a"})
    assert encode_key(colour.RED) == encode_key(1)
    assert encode_key(word.A) == encode_key("a") == encode_keys([word.A, "b"])[0].as_py()
    assert encode_key(np.float64(1.5)) == encode_key(1.5)


@pytest.mark.parametrize("key", [[1], {1}, {}, 1j, np.int64(1), object(), (1, [2]), Decimal("sNaN"), bytearray(b"")])
def test_another_type_is_refused_by_name(key: Any) -> None:
    """What came back would not be what was given, or could not be ordered."""
    with pytest.raises(UnsupportedKey, match="of type"):
        encode_key(key)
    with pytest.raises(UnsupportedKey):
        encode_keys(["a", key])
