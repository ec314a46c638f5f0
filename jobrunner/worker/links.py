"""The agent's ends of sockets and pipes to its children, driven by its loop; none ever makes the loop wait."""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jobrunner.worker import wire
from jobrunner.worker.logs import StreamLog

_READ_BYTES = 262_144
_DRAIN_BYTES_MAX = 16 * 1_048_576  # After a death: more than the kernel holds for one socket or pipe.
_T = TypeVar("_T")


class Link(Generic[_T]):
    """A socket to a template or a slot. Callbacks come from the loop, or from `drain`."""

    def __init__(
        self, sock: socket.socket, kind: Any, on_message: Callable[[_T], None], on_closed: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._frames: wire.Frames[_T] = wire.Frames(kind)
        self._on_message = on_message
        self._on_closed = on_closed
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)
        self.open = True

    def send(self, message: wire.Said, fds: Sequence[int] = ()) -> None:
        """Send, or queue until the other end reads. `fds` are the other end's: they are closed here once sent."""
        if not self.open:
            _close(fds)
            return
        self._unsent.append((wire.frame(message), fds))
        if len(self._unsent) == 1:
            self._write()

    def drain(self) -> None:
        """Hear all that was said: after this the other end, if dead, has nothing left to say."""
        while self.open and self._read():
            pass

    def finish(self) -> None:
        """Say no more: the other end reads what was sent, then the end. It may still answer."""
        if self.open:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for _, fds in self._unsent:
            _close(fds)
        self._unsent.clear()

    def _read(self) -> bool:
        """Returns whether there may be more."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        for message in self._frames.feed(data):
            self._on_message(message)
        if not data and self.open:
            self.close()
            self._on_closed()
        return bool(data)

    def _write(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._socket.fileno(), self._write)
                return
            except OSError:  # The other end is gone; reading says so.
                _close(fds)
                self._unsent.popleft()
                continue
            _close(fds)
            if sent < len(data):
                self._unsent[0] = (data[sent:], ())
            else:
                self._unsent.popleft()
        self._loop.remove_writer(self._socket.fileno())


class LogPipe:
    """The read end of a child's stdout or stderr, read as it comes into the log of what runs at the moment."""

    def __init__(self, fd: int, log: StreamLog | None = None) -> None:
        os.set_blocking(fd, False)
        self.log = log
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)
        self._open = True

    def drain(self) -> None:
        """Take what is in the pipe, so that what follows belongs to the next attempt."""
        taken = 0
        while self._open and taken < _DRAIN_BYTES_MAX:
            count = self._read()
            if not count:
                return
            taken += count

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _read(self) -> int:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            data = b""
        if not data:
            self.close()
        elif self.log is not None:
            with contextlib.suppress(OSError):  # A full disk costs the log, not the attempt.
                self.log.write(data)
        return len(data)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
