r"""Text out: `key<TAB>value` in UTF-8, one line a pair.

str as it is, but tab, newline, CR and backslash as \t \n \r \\; None empty; float by repr; int in decimal; bytes as
ASCII with \xNN; anything else as JSON (a Decimal as the number it is, dates as ISO 8601 strings).
What `surrogateescape` read is written back as the bytes it was; other lone surrogates, which UTF-8 has no bytes for,
are written as \udNNN.
"""

import json
import re
import sys
from collections.abc import Iterable
from datetime import date, time
from decimal import Decimal
from itertools import chain, islice
from typing import Any, BinaryIO

from jobrunner.errors import TaskError

_CHUNK = 4_096
_SPECIAL = re.compile(r"[\t\n\r\\]")
_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_BYTES = [chr(i) if 32 <= i < 127 and i != 92 else "\\\\" if i == 92 else f"\\x{i:02x}" for i in range(256)]
_PLAIN = {str, int}


class BadOutput(TaskError):
    """A pair that cannot be written as text. Field `value` (its repr, shortened)."""


class TextWriter:
    """Writes pairs to a binary file it does not own; `records` and `bytes` count what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.records = 0
        self.bytes = 0
        self._file = file

    def write_pairs(self, pairs: Iterable[Any]) -> None:
        """Write (key, value) pairs (tuples or lists) in order. Raises BadOutput, OSError."""
        source = iter(pairs)
        while chunk := list(islice(source, _CHUNK)):
            data = _encode(_fast(chunk) or _slow(chunk))
            self._file.write(data)
            self.records += len(chunk)
            self.bytes += len(data)


def _fast(pairs: list[Any]) -> str | None:
    """Lines of pairs of str and int without anything to escape; else None."""
    try:
        if not set(map(type, pairs)) <= {tuple, list} or set(map(len, pairs)) != {2}:
            return None
        if not set(map(type, chain.from_iterable(pairs))) <= _PLAIN:
            return None
        text = "".join([f"{key}\t{value}\n" for key, value in pairs])
    except (TypeError, ValueError):
        return None
    count = len(pairs)
    if text.count("\t") != count or text.count("\n") != count or "\r" in text or "\\" in text:
        return None
    return text


def _slow(pairs: list[Any]) -> str:
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            shown = f"{pair!r:.200}"
            raise BadOutput(f"expected (key, value) pairs, got {shown} of type {type(pair).__name__}", value=shown)
    return "".join([f"{format_text(key)}\t{format_text(value)}\n" for key, value in pairs])


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b"".join(_encode_character(character) for character in text)


def _encode_character(character: str) -> bytes:
    try:
        return character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return character.encode("ascii", "backslashreplace")


def format_text(value: Any) -> str:
    """One key or value as text. Raises BadOutput."""
    if isinstance(value, str):
        return _SPECIAL.sub(_escape, value) if _SPECIAL.search(value) else str.__str__(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _decimal_text(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, bytes):
        return "".join([_BYTES[byte] for byte in value])
    if isinstance(value, Decimal) and value.is_finite():
        return str(value)
    return _json(value)


def _escape(match: "re.Match[str]") -> str:
    return _ESCAPES[match[0]]


def _decimal_text(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError:  # Python refuses thousands of digits; a result is written whatever its size.
        limit = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        try:
            return int.__repr__(value)
        finally:
            sys.set_int_max_str_digits(limit)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_json_default)
    except (TypeError, ValueError, RecursionError) as error:
        shown = f"{value!r:.200}"
        raise BadOutput(f"{shown} of type {type(value).__name__} has no text: {error}", value=shown) from error


def _json_default(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return "".join([_BYTES[byte] for byte in value])
    item = getattr(value, "item", None)  # A scalar of numpy.
    if callable(item):
        return item()
    raise TypeError(f"{type(value).__name__} is not JSON")
