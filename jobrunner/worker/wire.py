"""What the agent, its templates and its slots say to each other, and how: frames on Unix sockets of this host.

A frame is its length (4 bytes, little endian) and a msgpack struct; descriptors travel with the first byte of the
frame that declares them, so frames and descriptors pair up in order.

    agent ── Hello, ForkTemplate, ForkSlot, KillChild ──► template      agent ── Run ──► slot
    agent ◄── Ready, ImportFailed, ChildExited ─── template    agent ◄── Progress, Fetched, Finished, LostInput ── slot

Both ends are always of one version: a template is forked from the code that the agent runs.
"""

import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from jobrunner.control.messages import EndCause, Ended, LossKind, Start
from jobrunner.ids import AttemptId, Token

_LENGTH = struct.Struct("<I")
_READ_BYTES = 262_144
FDS_MAX = 4


class Said(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# --- agent to template -----------------------------------------------------------------------------------------------


class Hello(Said, frozen=True):
    """The first frame to the base template: whose death ends it."""

    agent: int


class ForkTemplate(Said, frozen=True):
    """Fork a template that has the job's modules imported. With it come: its socket, stdout, stderr."""

    child: int
    code: str  # File of the code bundle.
    plan: str  # File of the plan.
    import_timeout_ms: int


class ForkSlot(Said, frozen=True):
    """Fork a slot. With it come: its socket, stdout, stderr. From the base, `code` and `plan` say what to import."""

    child: int
    code: str = ""
    plan: str = ""


class KillChild(Said, frozen=True):
    """Kill the process group of a child; ChildExited follows."""

    child: int


# --- template to agent -----------------------------------------------------------------------------------------------


class Ready(Said, frozen=True):
    """The job's modules are imported. Above 1 `threads`, no slot may be forked from this process."""

    threads: int


class ImportFailed(Said, frozen=True):
    """The user's modules raised."""

    cause: EndCause
    message: str
    traceback: str


class ChildExited(Said, frozen=True):
    """A child and its process group are gone. `signal` is 0 unless one killed it."""

    child: int
    status: int
    signal: int


# --- agent to slot ---------------------------------------------------------------------------------------------------


class Run(Said, frozen=True):
    """Run one attempt. Files named here hold what the masters would be asked for: a slot never talks to them."""

    start: Start
    plan: str  # File of the JobPlan.
    directory: str  # The worker's; block files are below it.
    scratch: str  # The slot's own directory, perhaps not there yet; the agent deletes it after the slot's end.
    directory_id: str
    cluster_token: str
    answer: str = ""  # File: MapOutputs for a reduce, Winners for a publication.


# --- slot to agent ---------------------------------------------------------------------------------------------------


class Progress(Said, frozen=True):
    token: Token


class Fetched(Said, frozen=True):
    """A reduce has read all its input: no loss of map output matters to it any more."""

    token: Token


class Finished(Said, frozen=True):
    """The attempt ended by its own word."""

    report: Ended


class LostInput(Said, frozen=True):
    """Map outputs could not be read; the attempt ends."""

    token: Token
    lost: list[AttemptId]
    kind: LossKind
    message: str


ToTemplate = Hello | ForkTemplate | ForkSlot | KillChild
FromTemplate = Ready | ImportFailed | ChildExited
FromSlot = Progress | Fetched | Finished | LostInput

_encode = msgspec.msgpack.Encoder().encode
_T = TypeVar("_T")


def frame(message: Said) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[_T]):
    """Bytes in, messages out."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._data = bytearray()

    def feed(self, data: bytes) -> list[_T]:
        self._data += data
        messages: list[_T] = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            end = start + _LENGTH.size + length
            if end > len(self._data):
                break
            messages.append(self._decode(bytes(self._data[start + _LENGTH.size : end])))
            start = end
        del self._data[:start]
        return messages


class Pipe(Generic[_T]):
    """A blocking end of such a socket, for templates and slots."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self.socket = sock
        self.fds: list[int] = []  # Received, in order, not yet taken.
        self.waiting: list[_T] = []  # Received, not yet taken.
        self._frames = Frames[_T](kind)
        self._sending = threading.Lock()

    def send(self, message: Said) -> None:
        """Send a whole frame; from any thread."""
        with self._sending:
            self.socket.sendall(frame(message))

    def receive(self) -> list[_T] | None:
        """The next messages, at least one; None when the other end is closed. Blocks."""
        while not self.waiting:
            data, fds, _, _ = socket.recv_fds(self.socket, _READ_BYTES, FDS_MAX)
            self.fds += fds
            if not data:
                return None
            self.waiting = self._frames.feed(data)
        messages, self.waiting = self.waiting, []
        return messages

    def receive_one(self) -> _T | None:
        """The next message; None when the other end is closed. Blocks."""
        messages = self.receive()
        if messages is None:
            return None
        self.waiting = messages[1:]
        return messages[0]

    def take_fds(self, count: int) -> list[int]:
        taken, self.fds = self.fds[:count], self.fds[count:]
        assert len(taken) == count, (taken, count)
        return taken
