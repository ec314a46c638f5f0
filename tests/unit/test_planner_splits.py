"""Input splits: every byte once, in order, sizes as promised."""

from hypothesis import given
from hypothesis import strategies as st

from jobrunner.planner.plan import Piece
from jobrunner.planner.splits import plan_splits


def test_a_large_file_is_cut_at_split_bytes_with_a_slop_of_a_tenth() -> None:
    """Without the slop a file of 32 MiB and a line would cost a second task for one line."""
    assert plan_splits([310], split_bytes=100, files_max=10) == [
        [Piece(0, 0, 100)],
        [Piece(0, 100, 100)],
        [Piece(0, 200, 110)],
    ]
    assert len(plan_splits([311], split_bytes=100, files_max=10)) == 4


def test_small_files_share_a_split_in_listing_order() -> None:
    """A task a tiny file is the small-files problem of Hadoop."""
    assert plan_splits([40, 40, 40], split_bytes=100, files_max=10) == [
        [Piece(0, 0, 40), Piece(1, 0, 40)],
        [Piece(2, 0, 40)],
    ]
    assert [len(split) for split in plan_splits([1] * 5, split_bytes=100, files_max=2)] == [2, 2, 1]


def test_empty_files_give_no_piece_and_empty_input_gives_one_empty_split() -> None:
    """A job with nothing to read must end with empty parts and _SUCCESS, not hang without tasks."""
    assert plan_splits([0, 5, 0], split_bytes=100, files_max=10) == [[Piece(1, 0, 5)]]
    assert plan_splits([0, 0], split_bytes=100, files_max=10) == [[]]
    assert plan_splits([], split_bytes=100, files_max=10) == [[]]


@given(st.lists(st.integers(0, 500), max_size=30), st.integers(1, 200), st.integers(1, 5))
def test_every_byte_is_in_exactly_one_piece_and_order_is_kept(sizes: list[int], split: int, files: int) -> None:
    """A byte in no piece is lost input; in two, counted twice."""
    splits = plan_splits(sizes, split_bytes=split, files_max=files)
    pieces = [piece for part in splits for piece in part]
    place = 0, 0
    for piece in pieces:
        while place[0] < piece.file:
            assert place[1] == sizes[place[0]]
            place = place[0] + 1, 0
        assert piece.start == place[1] and piece.length >= 1
        place = piece.file, piece.start + piece.length
    assert sum(piece.length for piece in pieces) == sum(sizes)
    assert all(len(part) <= files and sum(p.length for p in part) <= max(split * 1.1, 1) for part in splits)
    assert splits == [[]] or all(splits)
