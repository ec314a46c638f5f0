r"""Lines that match a regular expression, with the file they are in. Map only: one part a map task, in input order.

jobrunner run examples/grep.py logs/ --output hits --param 'pattern=ERROR|FATAL'
"""

import functools
import re
from collections.abc import Iterator

from jobrunner import Job, counter, param, task


@functools.cache
def pattern() -> re.Pattern[str]:
    return re.compile(param("pattern"))


def matches(line: str) -> Iterator[tuple[str, str]]:
    if pattern().search(line):
        counter("matching_lines").add()
        split = task().split
        yield (split.path if split else ""), line


job = Job(map=matches)
