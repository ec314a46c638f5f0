"""Listed files -> input splits: what each map task reads, in listing order.

A large file is cut at multiples of `split_bytes`; a rest below a tenth of that stays with the piece before it (the
slop of Hadoop's FileInputFormat: a tiny last task costs more than a slightly longer one). Small files, and rests of
large ones, share a split. Cuts fall anywhere in a line: a record belongs to the piece in which it begins.
"""

from collections.abc import Iterator, Sequence

from jobrunner.planner.plan import Piece

SLOP_TENTHS = 11  # A last piece may be 1.1 times split_bytes.


def plan_splits(sizes: Sequence[int], *, split_bytes: int, files_max: int) -> list[list[Piece]]:
    """Splits over files of these sizes (bytes): each byte in exactly one piece, pieces in file order.

    An empty file gives no piece. With no byte at all there is one split without pieces, so that a job with empty
    input runs, and succeeds, like any other.
    """
    assert split_bytes >= 1 and files_max >= 1
    splits: list[list[Piece]] = [[]]
    filled = 0
    for piece in _pieces(sizes, split_bytes):
        if splits[-1] and (filled + piece.length > split_bytes or len(splits[-1]) >= files_max):
            splits.append([])
            filled = 0
        splits[-1].append(piece)
        filled += piece.length
    return splits


def _pieces(sizes: Sequence[int], split_bytes: int) -> Iterator[Piece]:
    for file, size in enumerate(sizes):
        start = 0
        while (size - start) * 10 > split_bytes * SLOP_TENTHS:
            yield Piece(file, start, split_bytes)
            start += split_bytes
        if size > start:
            yield Piece(file, start, size - start)
