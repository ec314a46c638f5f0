"""COMMIT.json, _SUCCESS, and the proof that is made of it."""

import json
from pathlib import Path

import pytest
from commit_fixtures import make_commit, run_job

from jobrunner.commit.manifest import (
    CommitRecord,
    InputEntry,
    decode_manifest,
    decode_record,
    encode_manifest,
    encode_record,
    make_manifest,
    make_record,
)
from jobrunner.commit.verify import verify_output
from jobrunner.control.messages import OutputFile, Winner
from jobrunner.errors import CorruptData
from jobrunner.ids import Token, job_id_from_number

JOB = job_id_from_number(7)


def winner(partition: int, *files: str) -> Winner:
    names = files or (f"part-{partition:05d}.txt",)
    return Winner(partition, 1, Token(40 + partition), [OutputFile("main", name, 2, 9, "crc32:0a") for name in names])


def record(winners: list[Winner], counters: dict[str, int] | None = None) -> CommitRecord:
    inputs = [InputEntry("/a", 1, 2, "e")]
    return make_record(JOB, output="/out", if_exists="error", winners=winners, counters=counters or {}, inputs=inputs)


def test_every_leader_writes_the_same_bytes() -> None:
    """Two publishers replace each other's COMMIT.json and _SUCCESS at any time."""
    one = record([winner(0), winner(1)], {"a": 1, "b": 2})
    other = record([winner(1), winner(0)], {"b": 2, "a": 1})
    assert encode_record(one) == encode_record(other)
    assert encode_manifest(make_manifest(one)) == encode_manifest(make_manifest(other))
    assert decode_record(encode_record(one), where="") == one


def test_success_has_the_keys_that_readers_rely_on() -> None:
    """Scripts of users parse it."""
    manifest = json.loads(encode_manifest(make_manifest(record([winner(0)], {"lines": 3}))))
    assert manifest == {
        "job": JOB,
        "parts": [
            {"name": "part-00000.txt", "output": "main", "partition": 0, "attempt": 1, "token": 40, "records": 2,
             "bytes": 9, "checksum": "crc32:0a"}
        ],
        "counters": {"lines": 3},
        "inputs": [{"url": "/a", "bytes": 1, "mtime_ns": 2, "etag": "e"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{}", b"[]", b'{"job":"x","parts":[],"counters":{},"inputs":[]}', b"\xff"]
)
def test_a_success_that_is_not_ours_is_told_by_its_path(data: bytes) -> None:
    """Spark and Hadoop write an empty file of that name: their output must never be replaced."""
    with pytest.raises(CorruptData, match="/out/_SUCCESS"):
        decode_manifest(data, where="/out/_SUCCESS")


def test_a_manifest_of_a_later_version_is_still_ours() -> None:
    """The manifest grows only by new keys."""
    manifest = json.loads(encode_manifest(make_manifest(record([winner(0)]))))
    assert decode_manifest(json.dumps({**manifest, "later": 1}).encode(), where="").job == JOB


@pytest.mark.parametrize(
    "winners",
    [[winner(0), winner(0, "b")], [winner(0, "a"), winner(1, "a")], [winner(0, "../a")], [winner(0, "_SUCCESS")],
     [winner(0, ".a")], [winner(0, "")]],
)  # fmt: skip
def test_winners_that_cannot_be_one_output_are_damage(winners: list[Winner]) -> None:
    """A name from a broken worker must not lead a publisher out of the output."""
    with pytest.raises(CorruptData):
        record(winners)
    with pytest.raises(CorruptData):
        decode_record(encode_record(CommitRecord(JOB, "/out", "error", winners, {}, [])), where="COMMIT.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"null"])
def test_a_damaged_record_is_named(data: bytes) -> None:
    """`recover` must stop at it, not publish half of it."""
    with pytest.raises(CorruptData, match=r"COMMIT\.json is damaged"):
        decode_record(data, where="COMMIT.json")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    run_job(make_commit(tmp_path / "out"), 3)
    return tmp_path / "out"


def test_a_committed_output_is_proven(output: Path) -> None:
    """What verify says of a good output is what people check against."""
    (output / "_notes").write_text("")
    (output / ".hidden").write_text("")
    report = verify_output(f"file://{output}")
    assert report.ok and report.problems == []
    assert (report.job, report.parts, report.records) == (job_id_from_number(1), 3, 3)
    assert report.bytes == sum(path.stat().st_size for path in output.glob("part-*"))


def test_every_damage_is_named(output: Path) -> None:
    """A proof that stops at the first problem, or misses one, proves nothing."""
    first, second, third = sorted(output.glob("part-*"))
    text = first.read_text()
    first.write_text(text.replace("\t", " "))
    second.write_text(second.read_text() + "more\n")
    third.unlink()
    (output / "part-00099.txt").write_text("")
    problems = verify_output(str(output)).problems
    assert len(problems) == 6
    for number, words in enumerate(
        ["has checksum", "bytes, not", "has checksum", "has 2 records, not 1", "is missing"]
    ):
        assert words in problems[number]
    assert problems[-1] == "part-00099.txt is not in the manifest"


def test_a_manifest_that_contradicts_itself_is_named(output: Path) -> None:
    """Two winners of one partition, or a partition left out, is what commit exists to prevent."""
    manifest = json.loads((output / "_SUCCESS").read_text())
    parts = manifest["parts"]
    parts[1] = {**parts[0], "attempt": 5, "name": "part-00001.txt", "checksum": "md5:00"}
    parts.append({**parts[2], "name": "../x"})
    parts.append(parts[2])
    (output / "_SUCCESS").write_text(json.dumps(manifest))
    problems = "\n".join(verify_output(str(output)).problems)
    for words in ("partition 0 has parts of 2 attempts", "partition 1 has no part", "is listed 2 times",
                  "checksum 'md5:00' is of a kind", "'../x' is not the name of a part"):  # fmt: skip
        assert words in problems


@pytest.mark.parametrize("what", ["nothing", "no success", "foreign success", "part is a directory"])
def test_what_is_no_output_has_a_problem_and_not_a_traceback(output: Path, what: str) -> None:
    """`verify` is what a worried person runs first."""
    if what == "nothing":
        assert "is missing" in verify_output(str(output / "nowhere")).problems[0]
        return
    if what == "no success":
        (output / "_SUCCESS").unlink()
    elif what == "foreign success":
        (output / "_SUCCESS").write_text("")
    else:
        (output / "part-00000.txt").unlink()
        (output / "part-00000.txt").mkdir()
    assert len(verify_output(str(output)).problems) == 1
