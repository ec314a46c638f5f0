"""Ready-made reducers: `Sum()`, `Count()`, `Min()`, `Max()`. Each is also a combiner, and runs vectorised.

Values are folded in two steps, so that a fold may stop and go on anywhere: `first(value)` makes a partial result of
what map yielded, `merge(a, b)` joins two of them, the one from earlier rows first. Column kernels in fold.py give the
same results; what they cannot do (integers beyond 64 bits, Decimals, mixed types) is done here.
Imports neither pyarrow nor numpy: a client names these before anything heavy is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jobrunner.errors import TaskError


class BadValue(TaskError):
    """A ready-made reducer met a value it cannot take. Fields `reducer`, `key` (repr)."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A reducer the shuffle knows. Called as a function it is an ordinary reducer of mapped values."""

    def first(self, value: Any) -> Any:
        """The partial result of one mapped value. Raises TypeError if it cannot take it."""
        return value

    def merge(self, left: Any, right: Any) -> Any:
        """The partial result of two; `left` is of earlier rows. Raises TypeError."""
        raise NotImplementedError

    def __call__(self, key: Any, values: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (key, result of mapped values); nothing if there are none. Raises BadValue."""
        for _, total in self.fold_pairs((key, value) for value in values):
            yield key, total

    def fold_pairs(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Pairs of one key, folded to at most one pair."""
        total, seen = None, False
        for key, value in pairs:
            total = self.take(key, total, value) if seen else self.start(key, value)
            seen = True
        if seen:
            yield key, total

    def start(self, key: Any, value: Any) -> Any:
        """`first`, or BadValue naming key and value."""
        try:
            return self.first(value)
        except TypeError as error:
            raise self.refuse(key, value, error) from error

    def take(self, key: Any, total: Any, value: Any) -> Any:
        """`total` with one more mapped value, or BadValue naming key and value."""
        try:
            return self.merge(total, self.first(value))
        except TypeError as error:
            raise self.refuse(key, value, error) from error

    def join(self, key: Any, left: Any, right: Any) -> Any:
        """`merge`, or BadValue naming key and value."""
        try:
            return self.merge(left, right)
        except TypeError as error:
            raise self.refuse(key, right, error) from error

    def refuse(self, key: Any, value: Any, error: Exception) -> BadValue:
        name = type(self).__name__
        shown = f"{value!r:.200} of type {type(value).__name__}"
        return BadValue(f"{name}() cannot take value {shown} of key {key!r:.200}: {error}", reducer=name, key=repr(key))


@dataclass(frozen=True, slots=True)
class Sum(Ready):
    """The sum, as Python's `+` gives it: ints exact at any size, True is 1, floats stay floats, Decimals Decimals.

    Floats are added in the order of emission within parts fixed by the data: the same again in a re-run, but not the
    last digit of `sum()` over all of them.
    """

    def first(self, value: Any) -> Any:
        return 0 + value

    def merge(self, left: Any, right: Any) -> Any:
        return left + right


@dataclass(frozen=True, slots=True)
class Count(Ready):
    """How many times each key was yielded. Map yields bare keys, or pairs whose values are ignored."""

    def first(self, value: Any) -> Any:
        return 1

    def merge(self, left: Any, right: Any) -> Any:
        return left + right


@dataclass(frozen=True, slots=True)
class Min(Ready):
    """The smallest value by `<`; of equal ones the first. A float NaN counts only where there is nothing else."""

    def merge(self, left: Any, right: Any) -> Any:
        return right if right < left or (left != left and right == right) else left


@dataclass(frozen=True, slots=True)
class Max(Ready):
    """The largest value by `>`; of equal ones the first. A float NaN counts only where there is nothing else."""

    def merge(self, left: Any, right: Any) -> Any:
        return right if right > left or (left != left and right == right) else left
