"""The settings as a flat list of keys, walked from `settings.py`: what files, flags, docs and checks are made from."""

import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jobrunner.spec.settings import About, Settings


@dataclass(frozen=True, slots=True)
class Key:
    """One setting; `kind` is its bare type: int, str or a Literal."""

    section: str
    name: str
    kind: Any
    default: int | str
    about: About

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return f"JOBRUNNER_{self.section}__{self.name}".upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if it is one of a few words."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def allowed(self) -> str:
        """What is allowed, in words: `an integer from 1 to 7 (ms)`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind is str:
            return "text"
        bounds = {
            (False, False): "an integer",
            (True, False): f"an integer, at least {self.about.ge}",
            (False, True): f"an integer, at most {self.about.le}",
            (True, True): f"an integer from {self.about.ge} to {self.about.le}",
        }[self.about.ge is not None, self.about.le is not None]
        return f"{bounds} ({self.about.unit})" if self.about.unit else bounds

    def allows(self, value: int | str) -> bool:
        """Whether a value of the right type is within bounds."""
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return True
        low, high = self.about.ge, self.about.le
        return (low is None or value >= low) and (high is None or value <= high)


@functools.cache
def sections() -> dict[str, tuple[Key, ...]]:
    """Every section's keys, in the order of `settings.py`."""
    defaults = Settings()
    result = {}
    for section, kind in typing.get_type_hints(Settings).items():
        values = getattr(defaults, section)
        hints = typing.get_type_hints(kind, include_extras=True)
        result[section] = tuple(_key(section, name, hint, getattr(values, name)) for name, hint in hints.items())
    return result


def keys() -> dict[str, Key]:
    """Every key by its path, `section.name`."""
    return {key.path: key for section in sections().values() for key in section}


def _key(section: str, name: str, hint: Any, default: int | str) -> Key:
    assert typing.get_origin(hint) is Annotated, f"{section}.{name} has no about(...)"
    kind, about = typing.get_args(hint)
    assert isinstance(about, About)
    return Key(section, name, kind, default, about)
