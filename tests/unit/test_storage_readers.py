"""Lines of pieces: each once, exactly as they are."""

import itertools
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner.planner.plan import InputFile, Piece
from jobrunner.storage.readers import UNDECODABLE, BadInput, InputChanged, LineReader, read_lines


def planned(path: Path) -> InputFile:
    found = path.stat()
    return InputFile(str(path), found.st_size, found.st_mtime_ns)


def reader(
    path: Path,
    *pieces: tuple[int, int],
    errors: str = "replace",
    limit: int = 1 << 20,
    counters: dict[str, int] | None = None,
) -> LineReader:
    file = planned(path)
    cut = [Piece(0, start, length) for start, length in pieces or [(0, file.bytes)]]
    return read_lines([file], cut, errors=errors, line_bytes_max=limit, counters={} if counters is None else counters)


def lines(path: Path, *pieces: tuple[int, int], **how: str) -> list[str]:
    return [line for chunk in reader(path, *pieces, **how) for line in chunk]  # type: ignore[arg-type]


def expected(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    ended = [part[:-1] if part.endswith(b"\r") else part for part in parts[:-1]]
    return ended + ([parts[-1]] if parts[-1] else [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"bcd", b"\n", b"\r\n", b"\r", b"\xff", "é\u2028\x0b\x85".encode()]), max_size=30),
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 12),
)
def test_pieces_that_cover_a_file_give_each_line_once(parts: list[bytes], cuts: list[int], block: int) -> None:
    """A line across a border would be lost, doubled or cut in two."""
    data = b"".join(parts)
    with TemporaryDirectory() as directory, patch("jobrunner.storage.readers.BLOCK_BYTES", block):
        path = Path(directory, "x")
        path.write_bytes(data)
        borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        pieces = [(start, end - start) for start, end in itertools.pairwise(borders)]
        source = reader(path, *(pieces or [(0, 0)]), errors="surrogateescape")
        got = []
        for chunk in source:
            for number, line in enumerate(chunk):
                raw = line.encode("utf-8", "surrogateescape")
                place = source.place(number)
                assert data[place.offset : place.offset + len(raw)] == raw
                assert place.offset == 0 or data[place.offset - 1] == 10
                got.append(raw)
        assert got == expected(data)


def test_undecodable_lines_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"good\nb\xffd\xfe\n\xc3\nfine\xc3\xa9")
    counters = {UNDECODABLE: 1}
    got = [line for chunk in reader(path, counters=counters) for line in chunk]
    assert got == ["good", "b\ufffdd\ufffd", "\ufffd", "fineé"]
    assert counters == {UNDECODABLE: 3}


def test_strict_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"good\nb\xffd\n")
    with pytest.raises(BadInput, match="byte 0xff at 6 ") as caught:
        lines(path, errors="strict")
    assert caught.value.fields == {"url": str(path), "offset": 5}


def test_a_byte_order_mark_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa\n")
    assert lines(path) == ["\ufeffa"]


@pytest.mark.parametrize("block", [16, 100, 1 << 20])
@pytest.mark.parametrize("before", [b"", b"short\nshort\n"])
def test_a_line_that_is_too_long_is_named(tmp_path: Path, block: int, before: bytes) -> None:
    """It would fill the memory of the slot."""
    path = tmp_path / "x"
    path.write_bytes(before + b"a" * 64 + b"\nshort\n")
    with patch("jobrunner.storage.readers.BLOCK_BYTES", block):
        assert len([line for chunk in reader(path, limit=64) for line in chunk][-2]) == 64
        with pytest.raises(BadInput, match=r"line_bytes_max = 63") as caught:
            list(reader(path, limit=63))
    assert caught.value.fields == {"url": str(path), "offset": len(before)}


def test_a_file_that_changed_is_told_by_name(tmp_path: Path) -> None:
    """Half of the job would have read another file."""
    path = tmp_path / "x"
    path.write_bytes(b"a\nb\n")
    file = planned(path)
    piece = [Piece(0, 0, 4)]

    def read() -> list[list[str]]:
        return list(read_lines([file], piece, errors="replace", line_bytes_max=1024, counters={}))

    os.utime(path, ns=(0, 1))
    with pytest.raises(InputChanged, match="written again"):
        read()
    path.write_bytes(b"a\n")
    with pytest.raises(InputChanged, match="had 4 bytes and has 2"):
        read()
    path.unlink()
    with pytest.raises(InputChanged, match="is gone"):
        read()


def test_a_file_that_changes_while_it_is_read_is_noticed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a\nb\n")
    source = iter(reader(path))
    assert next(source) == ["a", "b"]
    os.utime(path, ns=(0, 1))
    with pytest.raises(InputChanged):
        next(source)
