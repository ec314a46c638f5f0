"""Which cluster a command means, and its token: --cluster, else --dir, else JOBRUNNER_CLUSTER, else ./.jobrunner."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from jobrunner.errors import SpecError
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.api.client import Client

HOME = Path(".jobrunner")


@dataclass(frozen=True, slots=True)
class Where:
    """The options that say where."""

    cluster: str | None = None
    directory: Path | None = None
    token_file: Path | None = None
    reach_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A cluster that can be spoken to. `directory` is None when only addresses are known."""

    addresses: tuple[str, ...]
    cluster_id: str  # "" if only the token is known, which proves membership.
    token: str
    directory: Path | None


def locate(where: Where, environ: Mapping[str, str] | None = None, home: Path = HOME) -> Located:
    """The cluster. Raises SpecError if none is named or found, or there is no token."""
    from jobrunner.api.client import parse_addresses

    environ = os.environ if environ is None else environ
    directory = where.directory
    addresses = where.cluster or (environ.get("JOBRUNNER_CLUSTER") if directory is None else None)
    named = parse_addresses(addresses) if addresses else None
    token_file = where.token_file or (Path(text) if (text := environ.get("JOBRUNNER_TOKEN_FILE")) else None)
    if directory is None and (not addresses or token_file is None) and home.is_dir():
        directory = home
    if not addresses and directory is None:
        raise SpecError(
            "no cluster: give --cluster host:port,... or --dir DIR, set JOBRUNNER_CLUSTER, "
            f"or start one here with `jobrunner cluster up` (there is no {home})"
        )
    if addresses and directory is None and token_file is None:
        raise SpecError("no token: give --token-file FILE or --dir DIR, or set JOBRUNNER_TOKEN_FILE")
    found = _read_directory(directory) if directory else None
    if token_file is not None:
        token = _read_token(token_file)
        cluster_id = found.cluster_id if found else _cluster_id_beside(token_file)
    else:
        assert found is not None
        token, cluster_id = found.token, found.cluster_id
    if named:
        return Located(named, cluster_id, token, directory)
    assert found is not None
    return Located(found.addresses, cluster_id, token, directory)


def open_client(where: Where, *, config: Path | None = None, sets: Sequence[str] = ()) -> "Client":
    """A client of the located cluster; settings of `sets`, environment, `config` or else the directory's file."""
    from jobrunner.api.client import Client

    located = locate(where)
    file = config
    if file is None and located.directory and (located.directory / "cluster.toml").is_file():
        file = located.directory / "cluster.toml"
    settings = settings_of(where, config=file, sets=sets)
    return Client(located.addresses, token=located.token, cluster_id=located.cluster_id, settings=settings)


def settings_of(where: Where, *, config: Path | None, sets: Sequence[str]) -> Settings:
    """Settings of flags, environment and file. Raises SpecError."""
    from jobrunner.spec.load import load_settings

    settings = load_settings(config, sets)
    if where.reach_timeout_s is None:
        return settings
    if not 0.1 <= where.reach_timeout_s <= 86_400:
        raise SpecError(f"--reach-timeout: found {where.reach_timeout_s:g}, allowed: seconds from 0.1 to 86400")
    limits = msgspec.structs.replace(settings.limits, reach_timeout_ms=round(where.reach_timeout_s * 1000))
    return msgspec.structs.replace(settings, limits=limits)


def _read_directory(directory: Path) -> Located:
    from jobrunner.cluster.directory import ClusterDir

    found = ClusterDir.read(directory)
    return Located(tuple(found.addresses), found.cluster_id, found.token, directory)


def _cluster_id_beside(token_file: Path) -> str:
    """The id of the cluster whose directory the token lies in, if it does."""
    try:
        return _read_directory(token_file.absolute().parent).cluster_id
    except SpecError:
        return ""


def _read_token(path: Path) -> str:
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"token file {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not token:
        raise SpecError(f"token file {path}: it is empty")
    return token
