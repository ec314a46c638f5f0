"""The border to user code: what it raised, told apart from what we raised, and shown without our frames."""

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import jobrunner
from jobrunner.control.messages import EndCause, InputPlace
from jobrunner.errors import CorruptData, Fatal, StorageFailed
from jobrunner.storage.filesystem import InputChanged

_OURS = (os.path.dirname(os.path.abspath(jobrunner.__file__)) + os.sep, "<frozen importlib")
_MESSAGE_CHARS_MAX = 2_000
_TRACEBACK_CHARS_MAX = 16_000
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})


class UserError(Exception):
    """User code raised `error`. `place` is where in the input, if known."""

    def __init__(self, error: BaseException, place: InputPlace | None = None) -> None:
        super().__init__(repr(error))
        self.error = error
        self.place = place


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is reported."""

    cause: EndCause
    message: str
    traceback: str
    place: InputPlace | None = None


@contextmanager
def user_code() -> Iterator[None]:
    """What is raised inside becomes a UserError; what already is one stays it."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        raise UserError(error) from error


def explain(error: BaseException) -> Failure:
    """The cause, words and traceback of whatever ended an attempt."""
    place = None
    ours = True
    if isinstance(error, UserError):
        error, place, ours = error.error, error.place, False
    return Failure(_cause(error, ours=ours), summary(error), user_traceback(error), place)


def summary(error: BaseException) -> str:
    """The error on one line, as Python prints it last."""
    try:
        text = "".join(traceback.format_exception_only(error)).strip()
    except Exception:  # Its __str__ is user code too.
        text = type(error).__name__
    return text[:_MESSAGE_CHARS_MAX]


def user_traceback(error: BaseException) -> str:
    """The traceback from the first frame that is not ours; whole, if all are."""
    first: TracebackType | None = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    try:
        lines = traceback.format_exception(type(error), error, first or error.__traceback__)
    except Exception:
        return summary(error)
    text = "".join(lines)
    if len(text) > _TRACEBACK_CHARS_MAX:
        half = _TRACEBACK_CHARS_MAX // 2
        text = text[:half] + "\n... (shortened)\n" + text[-half:]
    return text


def _cause(error: BaseException, *, ours: bool) -> EndCause:
    if isinstance(error, MemoryError):
        return EndCause.MEMORY
    if not ours:
        return EndCause.FATAL if isinstance(error, Fatal) else EndCause.EXCEPTION
    if isinstance(error, InputChanged):
        return EndCause.INPUT_CHANGED
    if isinstance(error, (StorageFailed, CorruptData, OSError)):
        return EndCause.STORAGE
    return EndCause.EXCEPTION
