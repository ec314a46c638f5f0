"""The average length of a line, by the suffix of the file it is in.

jobrunner run examples/line_length.py src/ --output lengths

Map and combine yield (lines, characters), which can be added in any order and grouping; only reduce divides.
"""

import os
from collections.abc import Iterable, Iterator

from jobrunner import Job, task

Totals = tuple[int, int]


def measure(line: str) -> Iterator[tuple[str, Totals]]:
    split = task().split
    assert split is not None, "a map reads a split"
    yield os.path.splitext(split.path)[1] or "none", (1, len(line))


def add(suffix: str, totals: Iterable[Totals]) -> Iterator[tuple[str, Totals]]:
    lines = characters = 0
    for some_lines, some_characters in totals:
        lines += some_lines
        characters += some_characters
    yield suffix, (lines, characters)


def average(suffix: str, totals: Iterable[Totals]) -> Iterator[tuple[str, float]]:
    for _, (lines, characters) in add(suffix, totals):
        yield suffix, characters / lines


job = Job(map=measure, combine=add, reduce=average)
