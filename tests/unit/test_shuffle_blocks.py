"""Block files: what is damaged is never taken for whole."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from jobrunner.control.messages import BlockOffer
from jobrunner.errors import CorruptData, StorageFailed
from jobrunner.ids import AttemptId, JobId, StageName, Token
from jobrunner.shuffle.blocks import PartitionFile, block_path, check_partition, read_index, read_partition_bytes
from jobrunner.shuffle.blocks import scan_blocks as scan

ATTEMPT = AttemptId(JobId("j-x"), StageName("map"), 3, 1)
TOKEN = Token(99)


def make(root: Path, attempt: AttemptId = ATTEMPT, token: Token = TOKEN) -> Path:
    path = block_path(root, attempt, token)
    path.parent.mkdir(parents=True, exist_ok=True)
    with PartitionFile(path.with_suffix(".tmp")) as file:
        for data in (b"first", b"", b"third" * 1000):
            file.begin()
            file.write(data)
            file.end(len(data))
        file.publish(path, attempt=attempt, token=token, digest=7, counters={"m": 3})
    return path


def test_partitions_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert path == tmp_path / "j-x" / "map" / "3-1-99.jrb"
    assert [read_partition_bytes(path, r) for r in range(3)] == [b"first", b"", b"third" * 1000]
    index = read_index(path)
    assert (index.attempt, index.token, index.digest, index.rows) == (ATTEMPT, TOKEN, 7, [5, 0, 5000])


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    """The file is not synced: after a power cut any part of it may be zeros."""
    path = make(tmp_path)
    whole = path.read_bytes()
    for at in [*range(8, 40), *range(len(whole) - 120, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptData, match=r"3-1-99\.jrb"):
            [read_partition_bytes(path, partition) for partition in range(3)]
    path.write_bytes(whole[:20] + b"\0" + whole[21:])
    with pytest.raises(CorruptData):
        check_partition(path, read_index(path), 2)


def test_a_torn_file_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path)
    whole = path.read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptData):
            read_index(path)


def test_a_scan_offers_whole_files_and_deletes_the_rest(tmp_path: Path) -> None:
    """An agent that starts again would offer output that nobody can read."""
    good = make(tmp_path)
    other = make(tmp_path, AttemptId(ATTEMPT.job, StageName("2-map"), 0, 0), Token(5))
    torn = make(tmp_path, AttemptId(ATTEMPT.job, ATTEMPT.stage, 4, 0))
    torn.write_bytes(torn.read_bytes()[:-3])
    misnamed = good.with_name("3-2-99.jrb")
    misnamed.write_bytes(good.read_bytes())
    (good.parent / "9-0-1.tmp").write_bytes(b"half")
    assert scan(tmp_path) == [
        BlockOffer(AttemptId(ATTEMPT.job, StageName("2-map"), 0, 0), Token(5), 7, 5005, other.stat().st_size, {"m": 3}),
        BlockOffer(ATTEMPT, TOKEN, 7, 5005, good.stat().st_size, {"m": 3}),
    ]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([good, other])
    assert scan(tmp_path / "nowhere") == []


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    """Failed attempts would fill the disk."""
    with patch("jobrunner.shuffle.blocks.failpoint", side_effect=StorageFailed("full")), pytest.raises(StorageFailed):
        make(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_agent_and_the_client_get_by_without_pyarrow() -> None:
    """Importing it costs a quarter of a second and 58 MiB in every process."""
    program = (
        "import sys, jobrunner.shuffle.server, jobrunner.shuffle.blocks, jobrunner.shuffle.reducers, "
        "jobrunner.storage.listing; assert not {'pyarrow', 'numpy', 'fsspec', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
