"""`@batch`: marks a map function that takes and gives Arrow. Imports nothing heavy: users' modules load it.

    @batch
    def words(lines: pa.RecordBatch) -> pa.RecordBatch | pa.Table: ...

It is called with some megabytes of lines at a time, as a column `line` (string), and gives a table with columns `key`
and `value`, in any Arrow type whose values are keys, or values; `value` may be left out with reduce=Count(). None
stands for nothing. How lines are cut into batches follows from the input alone.
"""

from typing import Any, TypeVar

_MARK = "__jobrunner_batch__"

Function = TypeVar("Function")


def batch(function: Function) -> Function:
    """Mark a map function, or a class with `__call__`, as one of record batches; it stays what it is."""
    setattr(function, _MARK, True)
    return function


def is_batch(function: Any) -> bool:
    return getattr(function, _MARK, False) is True
