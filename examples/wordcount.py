"""Count words.

jobrunner run examples/wordcount.py books/ --output counts
"""

from collections.abc import Iterator

from jobrunner import Job, Sum


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


job = Job(map=words, reduce=Sum())
