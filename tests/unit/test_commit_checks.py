"""What the client refuses at submit, and what `recover` does with what it finds."""

import os
from pathlib import Path

import pytest
from commit_fixtures import beside, contents, make_commit, no_sleep, prepare, run_job

from jobrunner.commit import checks
from jobrunner.commit.checks import canonical_output, check_output
from jobrunner.commit.disk import Patience, PosixDisk
from jobrunner.commit.manifest import encode_record, make_record
from jobrunner.commit.recover import Outcome, recover
from jobrunner.control.messages import Winners
from jobrunner.errors import CorruptData, SpecError


def refused(url: Path | str, *inputs: Path | str, if_exists: str = "error") -> str:
    with pytest.raises(SpecError) as caught:
        check_output(str(url), if_exists, [str(path) for path in inputs])  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("output:") and "\n" not in message
    return message


def test_an_output_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two spellings of one directory would be two path locks."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path.resolve() / "real" / "out")
    for url in ("real/out", "link/out/", f"file://{tmp_path}/link/../real/./out", f"{tmp_path}/real/out"):
        assert canonical_output(url) == expected
    assert check_output("link/out", "error") == expected


def test_an_absent_or_empty_output_is_fine(tmp_path: Path) -> None:
    """Directories above are made by set-up."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "a/b/c"):
        assert check_output(str(tmp_path / name), "error", [str(tmp_path / "in")]) == str(tmp_path.resolve() / name)
    assert os.listdir(tmp_path) == ["empty"]


def test_an_output_of_ours_may_be_replaced_when_asked(tmp_path: Path) -> None:
    """The default must never lose results; the message says how to ask."""
    run_job(make_commit(tmp_path / "out"))
    assert "use --if-exists replace" in refused(tmp_path / "out")
    check_output(str(tmp_path / "out"), "replace")


def test_foreign_outputs_are_refused_with_and_without_replace(tmp_path: Path) -> None:
    """`--if-exists replace` on a home directory, mistyped, must be harmless."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "x").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "dir" / "x")
    for if_exists in ("error", "replace"):
        assert "is a file" in refused(tmp_path / "file", if_exists=if_exists)
        assert "is a file" in refused(tmp_path / "dangling", if_exists=if_exists)
        assert "exists and is not empty" in refused(tmp_path / "dir", if_exists=if_exists)
    assert "replaces only outputs of jobrunner" in refused(tmp_path / "dir", if_exists="replace")
    assert "is a file" in refused(tmp_path / "file" / "out")


def test_input_and_output_may_not_lie_in_each_other(tmp_path: Path) -> None:
    """The next run would read this one's results; a replacement would delete the input."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("")
    run_job(make_commit(tmp_path / "out"))
    (tmp_path / "out" / "in").mkdir()
    assert "is inside the input" in refused(data / "out", data)
    assert "is also an input" in refused(data / "new", data / "new")
    assert "is inside" in refused(tmp_path / "out", tmp_path / "out" / "in", if_exists="replace")
    assert "is inside" in refused(tmp_path / "out", f"file://{tmp_path}/out/in/*.txt", if_exists="replace")
    assert "matches the input" in refused(data / "out", data / "*")
    assert "matches the input" in refused(data / "x" / "out", data / "**" / "*.txt")
    check_output(str(data / "out"), "error", [str(data / "a.txt"), str(data / "*.txt"), "s3://bucket/data"])
    check_output(str(tmp_path / "data2"), "error", [str(data)])


def test_a_parent_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts, not after all maps are done."""
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert f"no permission to write in {tmp_path}" in refused(tmp_path / "a" / "out")


def test_what_no_local_directory_can_be_is_refused() -> None:
    """One line says what was found."""
    assert "is not a local path" in refused("s3://bucket/out")
    assert "is not the path of a directory" in refused("")
    assert "too long a name" in refused("/tmp/" + "x" * 240)
    assert "is not the absolute path of a directory below /" in refused("/")


PATIENCE = Patience(2, 1, no_sleep)


def test_recover_leaves_an_undecided_stage_alone(tmp_path: Path) -> None:
    """It may belong to a running job."""
    commit = make_commit(tmp_path / "out")
    prepare(commit)
    found = recover(str(tmp_path / "out"), patience=PATIENCE)
    assert [one.outcome for one in found] == [Outcome.UNDECIDED]
    assert beside(tmp_path / "out") == [os.path.basename(commit.names.stage)]
    assert recover(commit.names.trash, patience=PATIENCE)[0].outcome is Outcome.UNDECIDED


def decided(output: Path, number: int, winners: Winners) -> str:
    """Job `number` with its COMMIT.json written, and no more; returns its stage."""
    commit = make_commit(output, number)
    record = make_record(
        commit.names.job, output=str(output), if_exists="error", winners=winners.winners, counters={}, inputs=[]
    )
    PosixDisk().write_new(commit.names.record, encode_record(record))
    return commit.names.stage


def test_recover_finishes_a_decided_job_by_its_stage_and_refuses_a_foreign_output(tmp_path: Path) -> None:
    """Of two groups of masters at one output, the first wins; the other's stage is kept for its owner."""
    output = tmp_path / "out"
    first = decided(output, 1, prepare(make_commit(output, 1)))
    second = decided(output, 2, prepare(make_commit(output, 2)))
    assert recover(second, patience=PATIENCE)[0].outcome is Outcome.PUBLISHED
    published = contents(output)
    found = recover(str(output), patience=PATIENCE)
    assert [(one.outcome, one.job[-1]) for one in found] == [(Outcome.REFUSED, "1")]
    assert "exists" in found[0].detail and os.path.exists(first)
    assert contents(output) == published


def test_recover_follows_a_file_system_that_is_mounted_elsewhere(tmp_path: Path) -> None:
    """The record names the path it had on the lost cluster's hosts."""
    (tmp_path / "old").mkdir()
    decided(tmp_path / "old" / "out", 1, prepare(make_commit(tmp_path / "old" / "out", 1)))
    os.rename(tmp_path / "old", tmp_path / "new")
    assert recover(str(tmp_path / "new" / "out"), patience=PATIENCE)[0].outcome is Outcome.PUBLISHED
    assert set(contents(tmp_path / "new" / "out")) == {"_SUCCESS", "part-00000.txt", "part-00001.txt"}


def test_recover_finishes_what_a_retraction_or_clean_up_left(tmp_path: Path) -> None:
    """Trash without a master to delete it stays for ever."""
    output = tmp_path / "out"
    commit = make_commit(output)
    prepare(commit)
    os.rename(commit.names.stage, commit.names.trash)
    assert recover(str(output), patience=PATIENCE)[0].outcome is Outcome.WITHDRAWN
    assert beside(output) == [] and not output.exists()


def test_recover_stops_at_a_damaged_record(tmp_path: Path) -> None:
    """Publishing what can be read of it would be half an output."""
    output = tmp_path / "out"
    stage = Path(decided(output, 1, prepare(make_commit(output, 1))))
    record = (stage / "COMMIT.json").read_bytes()
    (stage / "COMMIT.json").write_bytes(record[:-20])
    with pytest.raises(CorruptData, match="is damaged"):
        recover(str(output), patience=PATIENCE)
    (stage / "COMMIT.json").write_bytes(record.replace(b"0000000001", b"0000000002"))
    with pytest.raises(CorruptData, match="is of j-"):
        recover(str(output), patience=PATIENCE)
