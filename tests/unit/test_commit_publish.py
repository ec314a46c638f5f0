"""Publish, retract and clean up, one process at a time: what is there before and after, and each refusal."""

import errno
import os
from pathlib import Path

import pytest
from commit_fixtures import FaultyDisk, beside, contents, make_commit, prepare, run_attempt, run_job

from jobrunner.commit.manifest import decode_manifest
from jobrunner.control.messages import Winners
from jobrunner.errors import CommitRefused, CorruptData, StageGone, StorageFailed


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


def job_of(directory: Path) -> str:
    return decode_manifest((directory / "_SUCCESS").read_bytes(), where="").job


def test_nothing_is_visible_before_and_everything_after_publication(output: Path) -> None:
    """The whole promise: a reader that finds _SUCCESS finds every part it lists, and nothing else of ours stays."""
    commit = make_commit(output)
    winners = prepare(commit, 3)
    assert not output.exists()
    commit.publish(winners)
    commit.clean_up()
    manifest = decode_manifest((output / "_SUCCESS").read_bytes(), where="")
    assert [part.name for part in manifest.parts] == ["part-00000.txt", "part-00001.txt", "part-00002.txt"]
    assert [(output / part.name).stat().st_size for part in manifest.parts] == [part.bytes for part in manifest.parts]
    assert manifest.counters == {"lines": 7} and manifest.inputs[0].url == "/data/a.txt"
    assert set(contents(output)) == {"_SUCCESS", *(part.name for part in manifest.parts)}
    assert beside(output) == []


def test_every_step_may_be_repeated_at_once_and_after_the_end(output: Path) -> None:
    """Steps are assigned again whenever their answer is lost."""
    commit = make_commit(output)
    winners = prepare(commit)
    commit.set_up()
    commit.publish(winners)
    published = contents(output)
    for step in (commit.set_up, lambda: commit.publish(winners), commit.clean_up, commit.clean_up):
        step()
        assert contents(output) == published
    commit.publish(winners)
    assert commit.retract() == "published"
    assert contents(output) == published and beside(output) == []


def test_losers_files_are_not_published(output: Path) -> None:
    """A loser wakes and closes its files at any time; only what the log chose may be read."""
    commit = make_commit(output)
    commit.set_up()
    run_attempt(commit, 0, attempt=0, token=5, text="loser\n")
    winner = run_attempt(commit, 0, attempt=1, token=9, text="winner\n")
    commit.publish(Winners([winner], {}))
    assert contents(output)["part-00000.txt"] == "winner\n"


def test_an_empty_directory_is_replaced_and_needs_no_permission_to_replace(output: Path) -> None:
    """People make the output directory beforehand."""
    output.mkdir(parents=True)
    run_job(make_commit(output))
    assert job_of(output).endswith("1")


def test_replace_swaps_whole_outputs_of_ours(output: Path) -> None:
    """Parts of the old output among the new ones would be read as results."""
    run_job(make_commit(output), 3)
    (output / "notes.txt").write_text("by hand")
    run_job(make_commit(output, 2, if_exists="replace"), 2)
    assert set(contents(output)) == {"_SUCCESS", "part-00000.txt", "part-00001.txt"}
    assert job_of(output).endswith("2") and beside(output) == []


def test_a_job_of_no_partitions_leaves_success_alone(output: Path) -> None:
    """An input without a single file that counts is still a job that ends."""
    run_job(make_commit(output), 0)
    assert set(contents(output)) == {"_SUCCESS"}


@pytest.mark.parametrize("if_exists", ["error", "replace"])
@pytest.mark.parametrize("foreign", ["file", "directory", "spark", "dangling link", "link"])
def test_a_foreign_output_is_refused_and_untouched(output: Path, foreign: str, if_exists: str) -> None:
    """What somebody put there while the job ran is theirs."""
    commit = make_commit(output, if_exists=if_exists)  # type: ignore[arg-type]
    winners = prepare(commit)
    elsewhere = output.parent / "elsewhere"
    if foreign == "file":
        output.write_text("mine")
    elif foreign == "dangling link":
        output.symlink_to(elsewhere)
    elif foreign == "link":
        elsewhere.mkdir()
        output.symlink_to(elsewhere)
    else:
        output.mkdir()
        (output / ("_SUCCESS" if foreign == "spark" else "data")).write_text("")
    before = os.lstat(output)
    with pytest.raises(CommitRefused, match="not an output of jobrunner"):
        commit.publish(winners)
    assert commit.retract() == "withdrawn"
    commit.clean_up()
    assert os.lstat(output) == before
    assert [name for name in beside(output) if name != "elsewhere"] == []


def test_an_output_of_ours_is_refused_unless_replace_was_asked_for(output: Path) -> None:
    """Two groups of masters know nothing of each other's path locks: the loser fails and says whose it is."""
    commit = make_commit(output, 2)
    winners = prepare(commit)
    run_job(make_commit(output, 1))
    with pytest.raises(CommitRefused, match=r"exists \(the output of j-0+1\)"):
        commit.publish(winners)
    assert commit.retract() == "withdrawn"
    assert job_of(output).endswith("1")


def test_a_retraction_puts_the_replaced_output_back(output: Path) -> None:
    """A job that fails must not cost its user the results he had."""
    run_job(make_commit(output, 1))
    before = contents(output)
    full = FaultyDisk(lambda name, path: OSError(errno.EROFS, "") if (name, path) == ("rename", str(output)) else None)
    commit = make_commit(output, 2, if_exists="replace", disk=full)
    winners = prepare(commit)
    with pytest.raises(CommitRefused, match="Read-only file system"):
        commit.publish(winners)
    assert not output.exists()
    commit = make_commit(output, 2, if_exists="replace")
    assert commit.retract() == "withdrawn"
    assert commit.retract() == "withdrawn"
    commit.clean_up()
    assert contents(output) == before and beside(output) == []


def test_a_replaced_output_whose_name_is_taken_is_kept_beside_it(output: Path) -> None:
    """Deleting it with the trash would lose both outputs; putting it back would lose the foreign one."""
    run_job(make_commit(output, 1))
    before = contents(output)
    full = FaultyDisk(lambda name, path: OSError(errno.EROFS, "") if (name, path) == ("rename", str(output)) else None)
    commit = make_commit(output, 2, if_exists="replace", disk=full)
    with pytest.raises(CommitRefused):
        commit.publish(prepare(commit))
    output.mkdir()
    (output / "foreign").write_text("")
    commit = make_commit(output, 2, if_exists="replace")
    assert commit.retract() == "withdrawn"
    commit.clean_up()
    assert contents(output) == {"foreign": ""}
    assert contents(commit.names.kept) == before


def test_a_retraction_after_a_rename_that_did_happen_says_published(output: Path) -> None:
    """The rename worked, its sync failed: FAILED would contradict what readers see."""
    parent = str(output.parent)
    winners = prepare(make_commit(output))
    broken = FaultyDisk(
        lambda name, path: OSError(errno.EIO, "") if (name, path) == ("sync_directory", parent) else None
    )
    with pytest.raises(CommitRefused, match="Input/output error"):
        make_commit(output, disk=broken).publish(winners)
    assert make_commit(output).retract() == "published"
    assert set(contents(output)) == {"_SUCCESS", "part-00000.txt", "part-00001.txt"}


def test_publication_is_impossible_after_a_retraction(output: Path) -> None:
    """FAILED was logged; a publisher that wakes must find nothing to rename."""
    commit = make_commit(output)
    winners = prepare(commit)
    assert commit.retract() == "withdrawn"
    with pytest.raises(CommitRefused, match="has gone, and nothing was published"):
        commit.publish(winners)
    assert not output.exists()


def test_an_output_that_was_removed_before_the_answer_is_refused_at_once(output: Path) -> None:
    """The publisher was killed after its rename, the user deleted the output: COMMITTED would be a lie."""
    commit = make_commit(output)
    winners = prepare(commit)
    commit.publish(winners)
    os.rename(output, output.parent / "mine")
    with pytest.raises(CommitRefused, match="was published, and somebody has removed it since"):
        commit.publish(winners)
    assert commit.retract() == "withdrawn"


def test_a_full_disk_is_tried_again_with_pauses_and_then_refused(output: Path) -> None:
    """Space may come back; a job that waits for ever holds its path for ever."""
    pauses: list[float] = []
    full = FaultyDisk(lambda name, path: OSError(errno.ENOSPC, "", path) if name == "write_new" else None)
    winners = prepare(make_commit(output))
    commit = make_commit(output, disk=full, sleep=pauses.append)
    with pytest.raises(CommitRefused, match=r"No space left on device.*\(tried 3 times\)"):
        commit.publish(winners)
    assert pauses == [0.5, 0.5]
    make_commit(output).publish(winners)
    assert job_of(output).endswith("1")


def test_a_full_disk_that_empties_meanwhile_is_no_refusal(output: Path) -> None:
    """Same; the second try gets through."""
    errors = [OSError(errno.ENOSPC, ""), OSError(errno.ESTALE, "")]
    disk = FaultyDisk(lambda name, path: errors.pop() if errors and name == "write_new" else None)
    commit = make_commit(output, disk=disk)
    commit.publish(prepare(commit))
    assert job_of(output).endswith("1")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission_is_refused_at_once(output: Path, number: int) -> None:
    """Ten tries at half a second would only make the user wait."""
    pauses: list[float] = []
    disk = FaultyDisk(lambda name, path: OSError(number, "", path) if path == str(output) else None)
    commit = make_commit(output, disk=disk, sleep=pauses.append)
    winners = prepare(commit)
    with pytest.raises(CommitRefused, match=os.strerror(number)):
        commit.publish(winners)
    assert pauses == []


def test_a_lost_winner_is_damage_and_not_a_new_run(output: Path) -> None:
    """It was synced and sealed: that it is gone means the disk, or somebody, lost it."""
    commit = make_commit(output)
    winners = prepare(commit)
    os.unlink(os.path.join(commit.names.attempt(partition=1, attempt=0, token=101), "part-00001.txt"))
    with pytest.raises(CorruptData, match="attempt 0 of partition 1"):
        commit.publish(winners)
    assert not output.exists()


def test_a_winner_of_another_size_is_damage(output: Path) -> None:
    """_SUCCESS would promise bytes that are not there."""
    commit = make_commit(output)
    winners = prepare(commit)
    path = os.path.join(commit.names.attempt(partition=0, attempt=0, token=100), "part-00000.txt")
    os.truncate(path, 3)
    with pytest.raises(CorruptData, match="has 3 bytes, not"):
        commit.publish(winners)


def test_set_up_is_refused_where_the_parent_is_a_file(tmp_path: Path) -> None:
    """The job fails before any user code runs."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CommitRefused, match=r"Not a directory|File exists"):
        make_commit(tmp_path / "file" / "out").set_up()


def test_set_up_is_refused_where_renames_replace_full_directories(output: Path) -> None:
    """Publishing rests on it; better to know before the work than after."""

    class ReplacingDisk(FaultyDisk):
        def rename(self, source: str, target: str) -> None:
            if os.path.isdir(target):
                self.remove_tree(target)
            super().rename(source, target)

    with pytest.raises(CommitRefused, match="replaces a directory that is not empty"):
        make_commit(output, disk=ReplacingDisk(lambda name, path: None)).set_up()


def test_an_attempt_after_clean_up_makes_nothing(output: Path) -> None:
    """`makedirs` by a late attempt would litter the user's directory for ever."""
    commit = make_commit(output)
    commit.set_up()
    commit.clean_up()
    with pytest.raises(StageGone, match="the job is over, or this host does not see"):
        commit.open_attempt(0, 0, 1)
    assert beside(output) == []


def test_clean_up_that_cannot_delete_fails_and_may_be_repeated(output: Path) -> None:
    """A clean-up answered too early would release the path with the stage still there."""
    commit = make_commit(output)
    winners = prepare(commit)
    commit.publish(winners)
    fault = FaultyDisk(lambda name, path: OSError(errno.EACCES, "") if name == "rename" else None)
    with pytest.raises(StorageFailed, match="cannot clean up after"):
        make_commit(output, disk=fault).clean_up()
    commit.clean_up()
    assert beside(output) == []


def test_clean_up_finds_a_stage_beside_its_own_trash(output: Path) -> None:
    """A set-up that wakes while the trash is deleted makes the stage once more."""
    commit = make_commit(output)
    prepare(commit)
    os.rename(commit.names.stage, commit.names.trash)
    commit.set_up()
    commit.clean_up()
    assert beside(output) == []


def test_clean_up_of_a_stage_that_never_was_is_fine(output: Path) -> None:
    """A job killed while queued is cleaned like any other."""
    make_commit(output).clean_up()
