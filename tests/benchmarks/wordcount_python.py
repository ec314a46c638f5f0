"""Word count by Python functions: a generator, a list, bare keys."""

from collections.abc import Iterator

from jobrunner import Count, Job, Sum


def generated(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


def listed(line: str) -> list[tuple[str, int]]:
    return [(word, 1) for word in line.split()]


def bare(line: str) -> list[str]:
    return line.split()


gen = Job(map=generated, reduce=Sum())
list_ = Job(map=listed, reduce=Sum())
list_count = Job(map=listed, reduce=Count())
count = Job(map=bare, reduce=Count())
