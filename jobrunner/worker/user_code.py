"""The border to user code: made ready for one attempt, metered, and what it raised shown without our frames."""

import copy
import inspect
import os
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import length_hint
from types import TracebackType
from typing import Any

import fsspec
import numpy
import pyarrow

import jobrunner
from jobrunner.control.messages import EndCause, InputPlace
from jobrunner.errors import CorruptData, Fatal, Refused, StorageFailed, TaskError
from jobrunner.shuffle.batch import is_batch
from jobrunner.shuffle.reducers import Ready
from jobrunner.storage.readers import BadInput, InputChanged

_OURS = os.path.dirname(os.path.abspath(jobrunner.__file__)) + os.sep
_LIBRARIES = (
    "<frozen ",
    *("fsspec/", "numpy/", "pyarrow/"),  # Frames of compiled code: pyarrow/ipc.pxi.
    *(os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep for module in (fsspec, numpy, pyarrow)),
)
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_MESSAGE_CHARS_MAX = 2_000
_TRACEBACK_CHARS_MAX = 16_000
_QUICK_S = 0.001  # A step of the meter shorter than this is doubled,
_SLOW_S = 0.05  # one longer than this starts again from one record.
_STEP_MAX = 4_096


class PlacedError(Exception):
    """`error`, which ended an attempt while it worked on the record at `place`."""

    def __init__(self, error: BaseException, place: InputPlace) -> None:
        super().__init__(str(error))
        self.error = error
        self.place = place


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is reported."""

    cause: EndCause
    message: str
    traceback: str
    place: InputPlace | None = None


# --- before ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A user's map, reduce or combine, made ready for one attempt: nothing an earlier attempt left is in it."""

    name: str
    call: Callable[..., Any]
    setup: Callable[[], Any] | None = None
    close: Callable[[], Any] | None = None
    always_iterable: bool = False  # A generator function never returns None.
    batch: bool = False  # Takes and gives Arrow.

    def opening(self) -> Iterable[Any]:
        """Pairs of setup(); runs it."""
        return () if self.setup is None else self.setup() or ()

    def closing(self) -> Iterable[Any]:
        """Pairs of close(); runs it."""
        return () if self.close is None else self.close() or ()


def ready_function(given: Any) -> UserFunction:
    """A class is instantiated, an object with state is copied, a function is itself. Runs user code."""
    name = function_name(given)
    if inspect.isroutine(given):
        generator = inspect.isgeneratorfunction(given)
        return UserFunction(name, given, always_iterable=generator, batch=is_batch(given))
    made = given() if isinstance(given, type) else copy.deepcopy(given)
    return UserFunction(
        name,
        made,
        getattr(made, "setup", None),
        getattr(made, "close", None),
        inspect.isgeneratorfunction(getattr(type(made), "__call__", None)),  # noqa: B004 - to look at, not to call
        is_batch(made),
    )


def ready_combiner(given: Any) -> Any:
    """A combiner for the shuffle: a ready-made one as it is. Its setup() and close() may not give pairs."""
    if given is None or isinstance(given, Ready):
        return given
    made = ready_function(given)
    made.opening()
    return made.call


def function_name(function: Any) -> str:
    """How a user knows it: `words (wordcount.py:4)`."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(function, "__code__", None)
    return f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else str(name)


# --- meanwhile -------------------------------------------------------------------------------------------------------


class Meter:
    """Counts what passes and calls `progress` now and then, at C speed: no byte code runs for each item.

    Step by step: after each step the time is looked at, and steps grow while they are quick.
    """

    def __init__(self, progress: Callable[[], None]) -> None:
        self._progress = progress
        self._passed = 0  # In whole steps.
        self._step: repeat[bool] = repeat(True, 0)
        self._size = 0

    @property
    def count(self) -> int:
        return self._passed + self._size - length_hint(self._step)

    def watch(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, as they are asked for. One stream after another; the count goes on."""
        self._passed, self._size, self._step = self.count, 0, repeat(True, 0)
        return compress(items, chain.from_iterable(self._steps()))

    def _steps(self) -> Iterator[Iterable[bool]]:
        size = 1
        while True:
            began = time.monotonic()
            self._size, self._step = size, repeat(True, size)
            yield self._step
            self._passed, self._size, self._step = self._passed + size, 0, repeat(True, 0)
            self._progress()
            size = next_step(size, time.monotonic() - began)


def next_step(size: int, seconds: float) -> int:
    """How many records to take before the time is looked at again."""
    if seconds < _QUICK_S:
        return min(size * 2, _STEP_MAX)
    return 1 if seconds > _SLOW_S else size


# --- after -----------------------------------------------------------------------------------------------------------


@contextmanager
def blame(name: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Put the function's name before the words of errors about what it gave."""
    try:
        yield
    except kinds as error:
        fields = getattr(error, "fields", {})
        raise type(error)(f"{name}: {error}", **fields) from error.__cause__


def explain(error: BaseException) -> Failure:
    """The cause, words and traceback of whatever ended an attempt."""
    place = None
    if isinstance(error, PlacedError):
        place, error = error.place, error.error
    elif isinstance(error, BadInput):
        place = InputPlace(error.fields["url"], error.fields["offset"])
    return Failure(_cause(error), summary(error), user_traceback(error), place)


def summary(error: BaseException) -> str:
    """The error on one line, as Python prints it last."""
    try:
        text = "".join(traceback.format_exception_only(error)).strip()
        if type(error).__module__.startswith("jobrunner."):
            text = text.removeprefix(f"{type(error).__module__}.")
    except Exception:  # Its __str__ is user code too.
        text = type(error).__name__
    return text[:_MESSAGE_CHARS_MAX]


def user_traceback(error: BaseException) -> str:
    """The traceback from the first frame that is not ours; what we refuse in the user's name has none."""
    foreign = _first_foreign(error)
    if isinstance(error, TaskError) and not _raised_by_user(error):
        return ""
    try:
        lines = traceback.format_exception(type(error), error, foreign or error.__traceback__)
    except Exception:
        return summary(error)
    text = "".join(lines)
    if len(text) > _TRACEBACK_CHARS_MAX:
        half = _TRACEBACK_CHARS_MAX // 2
        text = text[:half] + "\n... (shortened)\n" + text[-half:]
    return text


def _cause(error: BaseException) -> EndCause:
    if isinstance(error, MemoryError):
        return EndCause.MEMORY
    if isinstance(error, Fatal):
        return EndCause.FATAL
    if isinstance(error, InputChanged):
        return EndCause.INPUT_CHANGED
    if isinstance(error, (OSError, StorageFailed, CorruptData, Refused)) and not _raised_by_user(error):
        return EndCause.STORAGE
    return EndCause.EXCEPTION


def _first_foreign(error: BaseException) -> TracebackType | None:
    """The first frame that is neither ours nor of the import system."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith((_OURS, "<frozen ")):
        trace = trace.tb_next
    return trace


def _raised_by_user(error: BaseException) -> bool:
    """Whether we called into user code, rather than into a library of ours, when it was raised."""
    trace = _first_foreign(error)
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    standard = file.startswith(_STANDARD) and "-packages" not in file
    return not standard and not file.startswith(_LIBRARIES)
