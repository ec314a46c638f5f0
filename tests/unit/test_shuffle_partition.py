"""The key hash: fixed for ever, the same in every process, and spread evenly."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa

from jobrunner.shuffle.keys import encode_keys
from jobrunner.shuffle.partition import HASH_VERSION, hash_column, partition_of, rows_digest

KEYS = ["", "a", "hello world", "x" * 300, None, True, -1, 1 << 70, 1.5, b"\x00", ("a", 1)]
GOLDEN = [
    "0xf25a20620b72c4e2",
    "0xf74efd80afd2d126",
    "0xb4224f941cebd5dc",
    "0xae1ed476271fce55",
    "0x6b473cf5f3372322",
    "0xabe1dc6180760ace",
    "0xe9d6ef65fa3d1b42",
    "0xc8bb39790d781ff9",
    "0xbb022b49c73780e8",
    "0x731eaf90356021d2",
    "0x99832a99b5fbb2ee",
]

PROGRAM = f"""
from jobrunner.shuffle.keys import encode_keys
from jobrunner.shuffle.partition import hash_column
print(hash_column(encode_keys({KEYS!r})).tolist())
"""


def test_the_hash_never_changes() -> None:
    """Maps run by one version and re-run by another would send a key to two reducers."""
    assert HASH_VERSION == 1
    assert [hex(value) for value in hash_column(encode_keys(KEYS)).tolist()] == GOLDEN


def test_two_processes_agree_whatever_their_hash_seed() -> None:
    """Python's hash() differs from process to process: a key would reach two reducers."""
    answers = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def test_the_place_of_a_row_in_its_column_does_not_matter() -> None:
    column = encode_keys(KEYS * 3)
    assert hash_column(column.slice(11, 11)).tolist() == hash_column(encode_keys(KEYS)).tolist()
    assert hash_column(column.cast(pa.large_binary())).tolist() == hash_column(column).tolist()


def test_keys_spread_over_reducers() -> None:
    counts = np.bincount(partition_of(hash_column(encode_keys([f"user-{i}" for i in range(10_000)])), 7))
    assert len(counts) == 7
    assert counts.min() > 1200


def test_a_digest_is_free_of_order_but_not_of_content() -> None:
    """A map that ran again may write rows in another order, but not other rows."""
    keys, values = encode_keys(["a", "b"]), pa.array([1, 2])
    swapped = rows_digest(encode_keys(["b", "a"]), pa.array([2, 1]))
    assert rows_digest(keys, values) == swapped
    others = [(["a", "b"], [2, 1]), (["a", "c"], [1, 2]), (["a", "b"], [1.0, 2.0])]
    assert swapped not in [rows_digest(encode_keys(ks), pa.array(vs)) for ks, vs in others]
