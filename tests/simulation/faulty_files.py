"""A disk in memory that loses what was not synced, tears what it was writing, fails, and flips bits.

Two states are kept for every file and directory: what a running process sees, and what would be there after a crash.
`sync` copies a file's, `sync_dir` a directory's names. `crash` throws a die for everything in between: each pending
name and each pending piece of a file may have become durable, in part and in any order.
"""

import errno
import os
from dataclasses import dataclass, field
from random import Random

SECTOR = 512


class PowerCut(Exception):
    """The operation, and all after it, are not carried out: call `crash`."""


@dataclass
class Inode:
    """`pending` is what a process sees; `durable` survives any crash."""

    pending: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass
class FaultyDisk:
    """One machine's disk: it outlives the process that uses it through `FaultyFiles`."""

    rng: Random
    names: dict[str, Inode] = field(default_factory=dict)  # As a process sees them.
    durable_names: dict[str, Inode] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)
    bytes_free: int | None = None  # None: no limit.
    fail_syncs: bool = False
    operations_left: int | None = None  # Then the power goes; None: it stays.
    lose_all: bool = False  # At a crash, nothing pending survives: the hardest case for early acknowledgements.

    def count(self) -> None:
        """One operation that changes something."""
        if self.operations_left is not None:
            if self.operations_left == 0:
                raise PowerCut
            self.operations_left -= 1

    def crash(self) -> None:
        """Cut the power: decide the fate of all that is pending, drop all locks."""
        for inode in {id(inode): inode for inode in [*self.names.values(), *self.durable_names.values()]}.values():
            inode.durable = self._survivor(inode)
            inode.pending = bytearray(inode.durable)
        names = dict(self.durable_names)
        for name in sorted(self.names.keys() | self.durable_names.keys()):
            if self.names.get(name) is not self.durable_names.get(name) and self._keeps():
                if name in self.names:
                    names[name] = self.names[name]
                else:
                    del names[name]
        self.names, self.durable_names = dict(names), names
        self.locked.clear()

    def kill(self) -> None:
        """Kill the process only: what it wrote stays visible, and is no more durable than before."""
        self.locked.clear()

    def flip_bit(self, path: str, offset: int, bit: int = 0) -> None:
        """Damage a byte at rest."""
        inode = self.names[path]
        inode.pending[offset] ^= 1 << bit
        damaged = bytearray(inode.durable)
        if offset < len(damaged):
            damaged[offset] ^= 1 << bit
        inode.durable = bytes(damaged)

    def _keeps(self) -> bool:
        return not self.lose_all and self.rng.random() < 0.5

    def _survivor(self, inode: Inode) -> bytes:
        """What a crash leaves of a file whose last bytes were not synced."""
        pending, durable = bytes(inode.pending), inode.durable
        if pending == durable or self.lose_all:
            return durable
        if len(pending) < len(durable):  # A cut that was not synced.
            return pending if self.rng.random() < 0.5 else durable
        fate = self.rng.random()
        if fate < 0.3:
            return durable
        if fate < 0.5:
            return pending
        if fate < 0.75:
            return pending[: self.rng.randint(len(durable), len(pending))]
        torn = bytearray(pending)  # The size is there; some sectors are holes.
        first = len(durable)
        for start in range(first // SECTOR * SECTOR, len(torn), SECTOR):
            if self.rng.random() < 0.5:
                begin, end = max(start, first), min(start + SECTOR, len(torn))
                torn[begin:end] = bytes(end - begin)
        return bytes(torn)


class FaultyFile:
    def __init__(self, disk: FaultyDisk, inode: Inode, path: str, *, is_lock: bool = False) -> None:
        self._disk, self._inode, self._path, self._is_lock = disk, inode, path, is_lock

    def append(self, data: bytes) -> None:
        disk = self._disk
        disk.count()
        if disk.bytes_free is not None and disk.bytes_free < len(data):
            self._inode.pending += data[: disk.bytes_free]
            disk.bytes_free = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        if disk.bytes_free is not None:
            disk.bytes_free -= len(data)
        self._inode.pending += data

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._inode.pending[offset : offset + length])

    def size(self) -> int:
        return len(self._inode.pending)

    def cut(self, length: int) -> None:
        del self._inode.pending[length:]

    def sync(self) -> None:
        self._disk.count()
        if self._disk.fail_syncs:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self._path)
        self._inode.durable = bytes(self._inode.pending)

    def close(self) -> None:
        if self._is_lock:
            self._disk.locked.discard(self._path)


class FaultyFiles:
    """The store's `Files` on a `FaultyDisk`."""

    def __init__(self, disk: FaultyDisk) -> None:
        self._disk = disk

    def make_dir(self, directory: str) -> None:
        self._disk.directories.add(directory)

    def lock(self, path: str) -> FaultyFile:
        if path in self._disk.locked:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self._disk.locked.add(path)
        return FaultyFile(self._disk, self._disk.names.setdefault(path, Inode()), path, is_lock=True)

    def list(self, directory: str) -> list[str]:
        return sorted(os.path.basename(path) for path in self._disk.names if os.path.dirname(path) == directory)

    def create(self, path: str) -> FaultyFile:
        self._disk.count()
        inode = self._disk.names.get(path)
        if inode is None:
            inode = self._disk.names[path] = Inode()
        inode.pending.clear()
        return FaultyFile(self._disk, inode, path)

    def open(self, path: str) -> FaultyFile:
        if path not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return FaultyFile(self._disk, self._disk.names[path], path)

    def rename(self, old: str, new: str) -> None:
        self._disk.count()
        self._disk.names[new] = self._disk.names.pop(old)

    def unlink(self, path: str) -> None:
        self._disk.count()
        del self._disk.names[path]

    def sync_dir(self, directory: str) -> None:
        self._disk.count()
        if self._disk.fail_syncs:
            raise OSError(errno.EIO, os.strerror(errno.EIO), directory)
        disk = self._disk
        for path in [path for path in disk.durable_names if os.path.dirname(path) == directory]:
            del disk.durable_names[path]
        disk.durable_names.update(
            {path: inode for path, inode in disk.names.items() if os.path.dirname(path) == directory}
        )
