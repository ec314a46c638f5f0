"""URLs to files: the one place that opens inputs.

A local path, also as file:// URL, is an absolute path with links resolved; anything else with `://` belongs to fsspec.
"""

import os
import stat
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, cast

from jobrunner.errors import SpecError


@dataclass(frozen=True, slots=True)
class InputStat:
    """What tells one content of an input from another. `mtime_ns` is -1, `etag` "" where the store has none."""

    bytes: int
    mtime_ns: int
    etag: str = ""


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """The path of a local URL, as it is written."""
    for scheme in ("file://", "local://"):
        if url.startswith(scheme):
            return url.removeprefix(scheme)
    return url


def canonical_url(text: str) -> str:
    """One name for one place: a local one is an absolute path with links resolved, others lose a trailing slash.

    Nothing need exist there.
    """
    if is_local(text):
        return os.path.realpath(local_path(text))
    scheme, _, rest = text.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def remote(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it. Its listings are not cached. Raises SpecError, OSError."""
    from fsspec.core import url_to_fs  # 0.15 s, and only for remote inputs.

    try:
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise SpecError(f"{url}: {error}", url=url) from error
    return filesystem, path


def open_input(url: str) -> BinaryIO:
    """Open for reading, at the start. Raises OSError, SpecError for a URL nobody understands."""
    if is_local(url):
        return open(local_path(url), "rb", buffering=0)
    filesystem, path = remote(url)
    return cast(BinaryIO, filesystem.open(path, "rb"))


def stat_input(url: str) -> InputStat:
    """Size and version of an input as it is now. Raises OSError (FileNotFoundError among them), SpecError."""
    if is_local(url):
        return stat_local(os.stat(local_path(url)), url)
    filesystem, path = remote(url)
    filesystem.invalidate_cache()
    return stat_info(filesystem.info(path))


def stat_local(found: os.stat_result, url: str) -> InputStat:
    if not stat.S_ISREG(found.st_mode):
        raise IsADirectoryError(f"{url}: not a regular file")
    return InputStat(found.st_size, found.st_mtime_ns)


def stat_info(info: dict[str, Any]) -> InputStat:
    """From what fsspec's `info`, `find` or `glob` say of a file; each store has its own names."""
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or ""
    moment = next((info[name] for name in _MTIMES if info.get(name) is not None), None)
    return InputStat(int(info.get("size") or 0), _mtime_ns(moment), str(etag).strip('"'))


_MTIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def _mtime_ns(moment: object) -> int:
    """Nanoseconds from what a store gives as time of the last change; -1 if it cannot be read."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            return -1
    if isinstance(moment, datetime):
        return int(moment.timestamp() * 1_000_000) * 1_000
    return int(moment * 1_000_000_000) if isinstance(moment, int | float) else -1
