"""What the user names as input, and what is wrong with it."""

import os
from pathlib import Path

import pytest

from jobrunner.errors import SpecError
from jobrunner.storage.filesystem import canonical_url, open_input, stat_input
from jobrunner.storage.listing import list_inputs


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(root: Path, *inputs: str) -> list[str]:
    return [os.path.relpath(file.url, root.resolve()) for file in list_inputs(inputs).files]


def test_a_directory_is_all_files_below_it_by_path(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "_SUCCESS", ".hidden", "_logs/x", "a/.y/z")
    assert names(tmp_path, str(tmp_path)) == ["a.txt", "a/b/c.txt", "a/z.txt", "b.txt"]


def test_a_named_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    make(tmp_path, "_x", ".d/y")
    assert names(tmp_path, str(tmp_path / "_x"), str(tmp_path / ".d")) == ["_x", ".d/y"]


def test_a_glob_is_what_matches_it(tmp_path: Path) -> None:
    make(tmp_path, "a1.txt", "a0.txt", "_a.txt", "b.csv", "d/e.txt", "d/_f.txt", "_g/h.txt")
    assert names(tmp_path, f"{tmp_path}/*.txt") == ["a0.txt", "a1.txt"]
    assert names(tmp_path, f"{tmp_path}/**/*.txt") == ["a0.txt", "a1.txt", "d/e.txt"]
    assert names(tmp_path, f"{tmp_path}/_*.txt") == ["_a.txt"]
    assert names(tmp_path, f"{tmp_path}/[d]") == ["d/e.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt")
    assert names(tmp_path, str(tmp_path / "a[1].txt")) == ["a[1].txt"]


def test_a_file_named_twice_comes_once_in_the_order_of_inputs(tmp_path: Path) -> None:
    """Its records would count twice."""
    make(tmp_path, "d/a", "d/b")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "c").symlink_to(tmp_path / "d" / "a")
    os.symlink(tmp_path / "d", tmp_path / "d" / "loop")
    inputs = [str(tmp_path / "d/b"), f"file://{tmp_path}/d", str(tmp_path / "link"), f"{tmp_path}/d/../d/b"]
    assert names(tmp_path, *inputs) == ["d/b", "d/a"]


def test_everything_that_is_missing_is_reported_at_once(tmp_path: Path) -> None:
    """The user would mend one path after another."""
    make(tmp_path, "fine")
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    bad = ["gone", "none*", "pipe", "dangling"]
    with pytest.raises(SpecError) as caught:
        list_inputs([str(tmp_path / name) for name in ["fine", *bad]])
    assert len(caught.value.fields["problems"]) == 4
    assert all(name in str(caught.value) for name in bad)
    with pytest.raises(SpecError, match="dangling"):
        list_inputs([str(tmp_path)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_reported(tmp_path: Path) -> None:
    make(tmp_path, "d/secret", "closed/x")
    (tmp_path / "d/secret").chmod(0)
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(SpecError) as caught:
            list_inputs([str(tmp_path)])
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert len(caught.value.fields["problems"]) == 2


def test_sizes_and_versions_are_listed(tmp_path: Path) -> None:
    make(tmp_path, "a")
    (file,) = list_inputs([str(tmp_path / "a")]).files
    assert (file.bytes, file.mtime_ns) == (1, (tmp_path / "a").stat().st_mtime_ns)
    assert stat_input(file.url).mtime_ns == file.mtime_ns


def test_other_stores_are_listed_through_fsspec() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/listing/d/a.txt": b"1", "/listing/d/_b": b"2", "/listing/c.txt": b"33"})
    try:
        found = list_inputs(["memory://listing/d", "memory://listing/*.txt"]).files
        assert [(file.url, file.bytes) for file in found] == [
            ("memory:///listing/d/a.txt", 1),
            ("memory:///listing/c.txt", 2),
        ]
        with open_input(found[1].url) as file:
            assert file.read() == b"33"
        with pytest.raises(SpecError, match=r"gone.*nosuch"):
            list_inputs(["memory://listing/gone", "nosuch://x"])
    finally:
        store.rm("/listing", recursive=True)


def test_one_place_has_one_name(tmp_path: Path) -> None:
    """Two live jobs could write to one output under two names."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    want = str((tmp_path / "real" / "out").resolve())
    for text in ("link/out", "real/out/", "link/../real/./out"):
        assert canonical_url(f"{tmp_path}/{text}") == want
        assert canonical_url(f"file://{tmp_path}/{text}") == want
    assert canonical_url("S3://bucket/x/") == "s3://bucket/x"
