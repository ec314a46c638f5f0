"""A cluster directory: who its members are, on which ports, with which token, and which processes were started last.

DIR/cluster.toml   resolved settings              DIR/token         secret of the cluster (0600)
DIR/cluster.json   this file's ClusterFile        DIR/master-N/     a master's member directory and log
DIR/lock           held while it is changed       DIR/worker-N/     a worker's blocks and attempts
"""

import fcntl
import os
import random
import secrets
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jobrunner.errors import SpecError
from jobrunner.hosts import process_alive, process_started
from jobrunner.ids import MemberId
from jobrunner.raft.messages import Member
from jobrunner.raft.store import MEMBER_FILE, init_store
from jobrunner.spec.settings import Settings
from jobrunner.spec.settings_file import dump_toml, read_settings

CLUSTER_FILE, TOKEN_FILE, SETTINGS_FILE = "cluster.json", "token", "cluster.toml"
# Below the ports that systems hand out to outgoing connections, so that a stopped daemon finds its port free again.
_PORTS = range(20_000, 32_000)


class Daemon(msgspec.Struct):
    """One daemon: its number, where it listens, and the process that was started last (pid 0: never)."""

    id: int
    address: str
    argv: list[str]
    member: str = ""  # Uuid of a master's directory; a worker's is in its own directory.
    pid: int = 0
    started: int = 0  # Clock ticks since boot: with the pid it names one process.
    start_time: str = ""  # For people.

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        return bool(self.pid) and process_alive(self.pid) and process_started(self.pid) == self.started


class ClusterFile(msgspec.Struct):
    """The content of cluster.json."""

    cluster_id: str
    hash_seed: int  # PYTHONHASHSEED of every worker, so that a task that runs again is the same run.
    masters: list[Daemon]
    workers: list[Daemon]
    slots: int  # Of each worker.


@dataclass(frozen=True, slots=True)
class ClusterDir:
    """An existing cluster directory, read once."""

    path: Path
    file: ClusterFile
    token: str

    @classmethod
    def read(cls, path: Path) -> "ClusterDir":
        """Raises SpecError if there is no cluster in `path`."""
        try:
            file = msgspec.json.decode((path / CLUSTER_FILE).read_bytes(), type=ClusterFile)
            token = (path / TOKEN_FILE).read_text().strip()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SpecError(f"{path} is not a cluster directory: no {Path(str(error.filename)).name}") from None
        except PermissionError as error:
            raise SpecError(f"{path}: {error.strerror}: {error.filename}") from None
        except msgspec.MsgspecError as error:
            raise SpecError(f"{path / CLUSTER_FILE} is damaged: {error}") from None
        return cls(path, file, token)

    @property
    def cluster_id(self) -> str:
        return self.file.cluster_id

    @property
    def addresses(self) -> list[str]:
        """Of the masters."""
        return [daemon.address for daemon in self.file.masters]

    def settings(self) -> Settings:
        return read_settings(self.path / SETTINGS_FILE)

    def write(self) -> None:
        write_private(self.path / CLUSTER_FILE, msgspec.json.format(msgspec.json.encode(self.file)) + b"\n")

    def members(self) -> dict[MemberId, tuple[int, str]]:
        return {MemberId(daemon.member): (daemon.id, daemon.address) for daemon in self.file.masters}

    def init_master(self, slot: int) -> None:
        """Make the member directory of one master, unless it is there."""
        directory = self.path / f"master-{slot}"
        if (directory / MEMBER_FILE).exists():
            return
        members = tuple(Member(MemberId(m.member), m.id, m.address) for m in self.file.masters)
        member = MemberId(self.file.masters[slot].member)
        init_store(str(directory), cluster_id=self.cluster_id, member=member, slot=slot, members=members)


def create_cluster_dir(path: Path, settings: Settings, *, workers: int, slots: int) -> ClusterDir:
    """Make a new cluster's files in `path` (which may exist, empty). Starts nothing. Raises SpecError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = [entry.name for entry in path.iterdir() if entry.name not in ("lock", SETTINGS_FILE, TOKEN_FILE)]
    except OSError as error:
        raise SpecError(f"cannot use {path} as a cluster directory: {error.strerror or error}") from None
    if foreign:
        raise SpecError(f"{path} is not empty and not a cluster directory (it holds {foreign[0]!r}): choose another")
    host = settings.cluster.host
    if not _is_loopback(host):
        raise SpecError(f"cluster.host: {host} is not loopback, which needs TLS, and TLS is not built yet")
    ports = free_ports(host, settings.cluster.masters + workers)
    masters = [
        Daemon(n, f"{host}:{ports[n]}", _argv("master", path, n), member=uuid.uuid4().hex)
        for n in range(settings.cluster.masters)
    ]
    file = ClusterFile(uuid.uuid4().hex, random.SystemRandom().randrange(1, 1 << 32), masters, [], slots)
    directory = ClusterDir(path, file, secrets.token_hex(32))
    for port in ports[settings.cluster.masters :]:
        add_worker(directory, port=port)
    write_private(path / TOKEN_FILE, directory.token.encode() + b"\n")
    write_private(path / SETTINGS_FILE, dump_toml(settings).encode())
    directory.write()
    return directory


def add_worker(directory: ClusterDir, *, port: int) -> Daemon:
    number = len(directory.file.workers)
    host = directory.file.masters[0].address.rpartition(":")[0]
    daemon = Daemon(number, f"{host}:{port}", _argv("worker", directory.path, number))
    directory.file.workers.append(daemon)
    return daemon


def _argv(role: str, path: Path, number: int) -> list[str]:
    config = str(path.absolute() / SETTINGS_FILE)
    return [sys.executable, "-m", "jobrunner", role, "--config", config, "--id", str(number)]


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by temporary name and rename; only its owner may read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on now. Raises SpecError if there are not enough."""
    chance = random.SystemRandom()
    found: list[int] = []
    for port in chance.sample(_PORTS, min(len(_PORTS), 200 + 20 * count)):
        if len(found) == count:
            break
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            found.append(port)
    if len(found) < count:
        raise SpecError(f"no {count} free ports on {host} between {_PORTS.start} and {_PORTS.stop}")
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory against another command that changes it. Raises SpecError if one does."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(f"{path} is in use: another command is changing this cluster") from None
        yield
