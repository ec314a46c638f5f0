"""The code bundle: a job's functions as one blob, made by the client and opened only in a worker's template process.

Masters carry it as bytes and never open it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import msgspec


@dataclass(frozen=True, slots=True)
class StepCode:
    """The functions of one map/reduce step; a ready-made reducer stands for itself."""

    map: Any
    reduce: Any = None
    combine: Any = None
    partition: Callable[..., int] | None = None


class _Bundle(msgspec.Struct, frozen=True):
    pickled: bytes
    sys_path: list[str]
    python: str


@dataclass(frozen=True, slots=True)
class OpenBundle:
    """An opened bundle; `python` is the version (major.minor) it was pickled with."""

    sys_path: list[str]
    python: str
    pickled: bytes = field(repr=False)

    def load(self) -> list[StepCode]:
        """Run the user's imports and return the steps. Call after `sys_path` is in sys.path. Raises what they raise."""
        steps: list[StepCode] = cloudpickle.loads(self.pickled)
        return steps


def pack_code(steps: list[StepCode], *, sys_path: list[str], python: str) -> bytes:
    """A bundle as bytes. Raises what pickling raises."""
    return msgspec.msgpack.encode(_Bundle(cloudpickle.dumps(steps), sys_path, python))


def open_code(data: bytes) -> OpenBundle:
    bundle = msgspec.msgpack.decode(data, type=_Bundle)
    return OpenBundle(bundle.sys_path, bundle.python, bundle.pickled)
