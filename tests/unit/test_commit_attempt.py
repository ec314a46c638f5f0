"""Names, and what one attempt writes."""

import os
import zlib
from pathlib import Path

import pytest
from commit_fixtures import make_commit, run_attempt

from jobrunner.commit.names import StageNames, parse_stage, part_name, stage_names
from jobrunner.control.messages import OutputFile
from jobrunner.errors import Refused, SpecError, StageGone
from jobrunner.ids import job_id_from_number

JOB = job_id_from_number(7)


def test_job_and_token_are_in_every_name_an_attempt_writes() -> None:
    """Two attempts that share a name could write into each other's files."""
    names = stage_names("/data/out", JOB)
    path = names.attempt(partition=3, attempt=1, token=99)
    assert path == f"/data/.out.jr-{JOB}/attempts/3-1-99"
    assert names.trash == f"/data/.out.jr-{JOB}-trash"
    assert stage_names("file:///data/out/", JOB) == names
    assert part_name(7, ".txt") == "part-00007.txt"


@pytest.mark.parametrize("url", ["s3://bucket/out", "out", "/", "", "/" + "x" * 230])
def test_an_output_that_cannot_be_is_refused_in_one_line(url: str) -> None:
    """A relative path means another directory on each worker."""
    with pytest.raises(SpecError, match="output:") as caught:
        stage_names(url, JOB)
    assert "\n" not in str(caught.value)


def test_a_stage_is_told_from_other_hidden_names() -> None:
    """`recover` acts on what it finds by name."""
    names = StageNames("/data/a.jr-b", JOB)
    assert parse_stage(names.stage) == (names, False)
    assert parse_stage(names.trash) == (names, True)
    for name in (".a.jr-", f"a.jr-{JOB}", f".a.jr-{JOB}x", ".a.jr-j-" + "z" * 26, f".jr-{JOB}"):
        assert parse_stage(f"/data/{name}") is None


def test_what_is_sealed_is_described_by_size_records_and_checksum(tmp_path: Path) -> None:
    """The manifest is made of these alone; nobody reads the files again."""
    commit = make_commit(tmp_path / "out")
    commit.set_up()
    pieces = [b"a\n", b"", b"x" * (1 << 20) + b"\n", bytearray(b"b\nc\n"), memoryview(b"d\n"), b"y" * 999_999 + b"\n"]
    with commit.open_attempt(0, 2, 5) as attempt:
        writer = attempt.create("part-00000.txt")
        for piece in pieces:
            writer.write(piece, records=bytes(piece).count(b"\n"))
        side = attempt.create("bad-00000.txt", output="bad")
        assert writer.tell() == sum(map(len, pieces)) and writer.writable() and not writer.closed
        files = attempt.seal()
    data = b"".join(map(bytes, pieces))
    assert files == [
        OutputFile("bad", "bad-00000.txt", 0, 0, "crc32:00000000"),
        OutputFile("main", "part-00000.txt", 6, len(data), f"crc32:{zlib.crc32(data):08x}"),
    ]
    assert (Path(attempt.path) / "part-00000.txt").read_bytes() == data
    assert writer.closed and side.closed


def test_an_attempt_never_runs_twice_in_one_directory(tmp_path: Path) -> None:
    """Its first run may be asleep with the files open."""
    commit = make_commit(tmp_path / "out")
    commit.set_up()
    run_attempt(commit, 0, token=5)
    with pytest.raises(Refused, match="has run before"):
        commit.open_attempt(0, 0, 5)


def test_a_file_is_made_once(tmp_path: Path) -> None:
    """Opening an existing name for writing would empty what may be sealed."""
    commit = make_commit(tmp_path / "out")
    commit.set_up()
    with commit.open_attempt(0, 0, 5) as attempt:
        attempt.create("part-00000.txt")
        with pytest.raises(FileExistsError):
            attempt.create("part-00000.txt")


def test_an_attempt_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A thousand failed attempts must not fill the disk until the job ends."""
    commit = make_commit(tmp_path / "out")
    commit.set_up()

    def fail() -> None:
        with commit.open_attempt(0, 0, 5) as attempt:
            attempt.create("part-00000.txt").write(b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    run_attempt(commit, 0, attempt=1, token=6)
    commit.discard_attempt(0, 1, 6)
    commit.discard_attempt(0, 1, 6)
    assert os.listdir(commit.names.attempts) == []


@pytest.mark.parametrize("moment", ["create", "seal"])
def test_an_attempt_whose_job_ended_meanwhile_is_told_so(tmp_path: Path, moment: str) -> None:
    """Not an error of its own: nobody must count it as the task's failure."""
    commit = make_commit(tmp_path / "out")
    commit.set_up()
    attempt = commit.open_attempt(0, 0, 5)
    if moment == "create":
        commit.clean_up()
        with pytest.raises(StageGone):
            attempt.create("part-00000.txt")
    else:
        attempt.create("part-00000.txt").write(b"x")
        commit.clean_up()
        with pytest.raises(StageGone):
            attempt.seal()
    attempt.discard()
    assert os.listdir(tmp_path) == []
