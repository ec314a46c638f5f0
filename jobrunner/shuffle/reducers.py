"""Ready-made reducers: Sum, Count, Min, Max, Mean, Distinct, TopK, First; and Collect, which does not combine.

Values are folded in steps, so that a fold may stop and go on anywhere: `first(value)` makes a partial result of what
map yielded, `merge(a, b)` joins two of them, the one from earlier rows first, `finish(partial)` gives the result.
Column kernels in fold.py give the same results; what they cannot do (integers beyond 64 bits, Decimals, mixed types)
is done here. Imports neither pyarrow nor numpy: a client names these before anything heavy is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jobrunner.errors import SpecError, TaskError


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

    def finish(self, partial: Any) -> Any:
        """The result of a partial result."""
        return partial

    def __call__(self, key: Any, values: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (key, result of mapped values); nothing if there are none. Raises BadValue."""
        total, seen = None, False
        for value in values:
            total = self.take(key, total, value) if seen else self.start(key, value)
            seen = True
        if seen:
            yield key, self.finish(total)

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


@dataclass(frozen=True, slots=True)
class Mean(Ready):
    """The arithmetic mean: the sum, added as `Sum` does, divided by how many there are with Python's `/`.

    So ints are added exactly at any size and the mean is a float; of Decimals it is a Decimal, of Fractions a Fraction.
    """

    def first(self, value: Any) -> tuple[Any, int]:
        return 0 + value, 1

    def merge(self, left: Any, right: Any) -> tuple[Any, int]:
        return left[0] + right[0], left[1] + right[1]

    def finish(self, partial: Any) -> Any:
        total, count = partial
        return total / count


@dataclass(frozen=True, slots=True)
class Distinct(Ready):
    """How many different values each key has: an exact count, in bounded memory however many there are.

    Values must be of the types of keys, and differ as keys do: True, 1, 1.0 and "1" are four; 0.0 and -0.0 are one.
    (For the values themselves, emit (key, value) as the key.)
    """

    def first(self, value: Any) -> frozenset[bytes]:
        from jobrunner.shuffle.keys import UnsupportedKey, encode_key  # Loads pyarrow: only where a job runs.

        try:
            return frozenset((encode_key(value),))
        except UnsupportedKey as error:
            raise TypeError(str(error)) from error

    def merge(self, left: Any, right: Any) -> Any:
        return left | right

    def finish(self, partial: Any) -> int:
        return len(partial)


@dataclass(frozen=True, slots=True)
class First(Ready):
    """The value that was emitted first: input files in listing order, records in file order."""

    def merge(self, left: Any, right: Any) -> Any:
        return left


@dataclass(frozen=True, slots=True)
class TopK(Ready):
    """The `count` largest values by `>`, as a list, the largest first; of equal ones the earlier first.

    Float NaNs come after everything else, in their order.
    """

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise SpecError(f"TopK: found {self.count!r}, allowed: a whole number of values, at least 1")

    def first(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, values: list[Any]) -> list[Any]:
        """The partial result of values in order of emission. Raises TypeError."""
        ordered = sorted([value for value in values if value == value], reverse=True)  # Stable, also in reverse.
        if len(ordered) < min(self.count, len(values)):
            ordered += [value for value in values if value != value]
        return ordered[: self.count]

    def merge(self, left: Any, right: Any) -> list[Any]:
        return self.gather(left + right)


@dataclass(frozen=True, slots=True)
class Collect:
    """All values of a key as one list, in order of emission; with `sort_values`, in canonical order.

    The list is held in memory. It has no partial results: a list of lists is no smaller than its values.
    """

    def __call__(self, key: Any, values: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
        yield key, list(values)
