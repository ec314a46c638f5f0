"""One line for a person from a pydantic error: which key, what was found, what is allowed; the nearest right key."""

import difflib
from collections.abc import Callable, Iterable

from pydantic import ValidationError


def nearest(path: str, right: Iterable[str]) -> str:
    """`; did you mean x?` if something is near, else all that is allowed. A key is compared within its own section."""
    section, dot, name = path.rpartition(".")
    beside = [key[len(section) + len(dot) :] for key in right if key.startswith(section + dot)]
    close = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {section}{dot}{close[0]}?"
    words = sorted({key.partition(".")[0] for key in beside})
    return f", allowed: {', '.join(words)}" if words else ""


def explain(error: ValidationError, *, known: dict[str, str], origin: Callable[[str], str] = lambda _: "") -> str:
    """One line for all of `error`. `known`: each right key -> what it allows; `origin` says where a key was written."""
    lines = []
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines.append(f"{path}{origin(path)}: no such key{nearest(path, known)}")
        elif detail["type"] == "missing":
            lines.append(f"{path}: not given, allowed: {known.get(path, 'a value')}")
        elif detail["type"] == "value_error":
            prefix = f"{path}{origin(path)}: " if path else ""
            lines.append(f"{prefix}{detail['ctx']['error']}")
        else:
            key = path if path in known else next((key for key in known if path.startswith(key + ".")), "")
            allowed = known.get(key) or detail["msg"]
            lines.append(f"{path}{origin(path)}: found {_short(detail['input'])}, allowed: {allowed}")
    return "; ".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
