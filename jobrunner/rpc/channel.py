"""One connection without its socket: request ids, deadlines, limits, and envelopes <-> frames of bytes.

Both ends of a connection hold one. What is to be sent waits here, in a queue bounded in bytes; `take` packs as much of
it as fits into one frame, so that a burst costs one write. A call counts as sent from the moment its frame is taken:
before that a lost connection means "not carried out", after it nobody can know.
"""

import heapq
from collections import deque
from math import inf
from typing import NamedTuple

import msgspec

from jobrunner.errors import JobrunnerError, SpecError, Unavailable, error_from_wire
from jobrunner.rpc.messages import DEADLINE_MS_MAX, Envelope, Failure, Push, Reply, Request

_COALESCE_BYTES = 65_536  # A frame of several envelopes ends here: a longer one would only delay its first.
_COALESCE_COUNT = 65_535  # What a two-byte msgpack array header can count.
_ENVELOPE_BYTES = 32  # More than a frame's and an envelope's own bytes around a body.
_RESERVED = frozenset(("self", "message", "args", "fields", "with_traceback", "add_note", "exit_status"))
_FAILURE_TEXT_MAX = 8_192  # Characters of a message that is sent in place of a failure too long for a frame.


class BadFrame(Exception):
    """The peer does not keep to the protocol: drop the connection."""


class Expired(NamedTuple):
    """Whose deadline has passed: our calls (id -> was it sent), and the peer's requests, which nobody waits for."""

    calls: dict[int, bool]
    requests: list[int]


class _Waiting(NamedTuple):
    """An encoded envelope; `call` is the id of a request, else 0."""

    call: int
    data: bytes


class Deadlines:
    """Ids with a deadline each, earliest first. Removal is lazy, and the heap is rebuilt when most of it is gone."""

    def __init__(self) -> None:
        self.by_id: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def add(self, key: int, deadline: float) -> None:
        self.by_id[key] = deadline
        if len(self._heap) > 2 * len(self.by_id) + 64:
            self._heap = [(when, each) for each, when in self.by_id.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (deadline, key))

    def remove(self, key: int) -> bool:
        return self.by_id.pop(key, None) is not None

    def first(self) -> float:
        """The earliest deadline; infinity if there is none."""
        while self._heap and self.by_id.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def passed(self, now: float) -> list[int]:
        """Remove and return the ids whose deadline is not after `now`."""
        gone: list[int] = []
        while self.first() <= now:
            key = heapq.heappop(self._heap)[1]
            del self.by_id[key]
            gone.append(key)
        return gone


class Channel:
    """Calls and requests of one connection. `now` is monotonic seconds."""

    def __init__(self, *, frame_bytes_max: int, queue_bytes_max: int, calls_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self.queue_bytes_max = queue_bytes_max
        self.calls_max = calls_max
        self.queue_bytes = 0
        self.earliest = inf  # No deadline is before this; `expire` makes it exact.
        self._queue: deque[_Waiting] = deque()
        self._calls = Deadlines()  # Ours, unanswered.
        self._unsent: set[int] = set()  # Those of them that are still in the queue.
        self._requests = Deadlines()  # The peer's, unanswered.
        self._last_id = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._failure_encoder = msgspec.msgpack.Encoder(enc_hook=str)
        self._decoder = msgspec.msgpack.Decoder(list[Envelope])

    # --- what we send ---

    def call(self, message: msgspec.Struct | bytes, *, now: float, timeout_s: float) -> int:
        """Queue a request and return its id.

        Raises SpecError if it does not fit a frame, Unavailable if too many calls are open or the queue is full.
        """
        if len(self._calls.by_id) >= self.calls_max:
            raise Unavailable(f"{self.calls_max} calls are unanswered on this connection (limits.calls_max)")
        call = self._last_id + 1
        deadline_ms = min(max(round(timeout_s * 1000), 0), DEADLINE_MS_MAX)
        if not self._put(self._encoder.encode(Request(call, deadline_ms, self._body(message))), call=call):
            raise Unavailable(f"{self.queue_bytes} bytes are unsent on this connection (raft.queue_bytes_max)")
        self._last_id = call
        self._unsent.add(call)
        self._expect(self._calls, call, now + deadline_ms / 1000)
        return call

    def forget(self, call: int) -> bool:
        """Nobody waits for this call any more: an unsent one is not sent. Returns whether it was sent."""
        self._calls.remove(call)
        sent = call not in self._unsent
        self._unsent.discard(call)
        return sent

    def push(self, message: msgspec.Struct | bytes) -> bool:
        """Queue a message that has no reply; False if the queue is full. Raises SpecError if it fits no frame."""
        return self._put(self._encoder.encode(Push(self._body(message))))

    def answer(self, request: int, message: msgspec.Struct | bytes) -> bool:
        """Queue the reply to an open request; False if the queue is full. Raises SpecError if it fits no frame."""
        data = self._encoder.encode(Reply(request, self._body(message)))
        return not self._requests.remove(request) or self._put(data)

    def fail(self, request: int, error: JobrunnerError) -> bool:
        """Queue an error as the answer; one too long for a frame goes shortened. False if the queue is full."""
        return not self._requests.remove(request) or self._fail(request, error)

    def take(self) -> bytes | None:
        """The next frame to write, None if nothing waits. Its calls count as sent from now on."""
        pieces: list[bytes] = []
        size = 0
        while self._queue and len(pieces) < _COALESCE_COUNT:
            call, data = self._queue[0]
            abandoned = call and call not in self._unsent
            if pieces and not abandoned and size + len(data) > _COALESCE_BYTES:
                break
            self._queue.popleft()
            self.queue_bytes -= len(data)
            if abandoned:
                continue
            self._unsent.discard(call)
            pieces.append(data)
            size += len(data)
        return _array_header(len(pieces)) + b"".join(pieces) if pieces else None

    # --- what we receive ---

    def receive(self, frame: bytes, *, now: float) -> list[Envelope]:
        """Requests to carry out, answers to open calls, and pushes, in the order they were sent.

        Answers nobody waits for are left out; requests over the limit are refused here. Raises BadFrame.
        """
        if len(frame) > self.frame_bytes_max:
            raise BadFrame(f"a frame of {len(frame)} bytes (limits.frame_bytes_max is {self.frame_bytes_max})")
        try:
            envelopes = self._decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadFrame(f"not a frame: {error}") from None
        return [envelope for envelope in envelopes if self._admit(envelope, now)]

    def _admit(self, envelope: Envelope, now: float) -> bool:
        if isinstance(envelope, Push):
            return True
        if not isinstance(envelope, Request):
            return envelope.id not in self._unsent and self._calls.remove(envelope.id)
        if envelope.id in self._requests.by_id:
            raise BadFrame(f"request {envelope.id} is open already")
        if len(self._requests.by_id) >= self.calls_max:
            refusal = Unavailable(f"{self.calls_max} of your calls are unanswered (limits.calls_max)")
            if not self._fail(envelope.id, refusal):
                raise BadFrame("sends requests without reading replies")
            return False
        self._expect(self._requests, envelope.id, now + envelope.deadline_ms / 1000)
        return True

    # --- time and the end ---

    def expire(self, now: float) -> Expired:
        """Give up all whose deadline has passed; an expired call that is still unsent is never sent."""
        expired = Expired({call: self.forget(call) for call in self._calls.passed(now)}, self._requests.passed(now))
        self.earliest = min(self._calls.first(), self._requests.first())
        return expired

    def close(self) -> dict[int, bool]:
        """Give up everything: our open calls, each with whether it was sent."""
        calls = {call: call not in self._unsent for call in self._calls.by_id}
        self._queue.clear()
        self.queue_bytes = 0
        self._unsent.clear()
        self._calls = Deadlines()
        self._requests = Deadlines()
        self.earliest = inf
        return calls

    # --- inside ---

    def _expect(self, deadlines: Deadlines, key: int, deadline: float) -> None:
        deadlines.add(key, deadline)
        if deadline < self.earliest:
            self.earliest = deadline

    def _body(self, message: msgspec.Struct | bytes) -> msgspec.Raw:
        body = message if isinstance(message, bytes) else self._encoder.encode(message)
        if len(body) + _ENVELOPE_BYTES > self.frame_bytes_max:
            kind = "message" if isinstance(message, bytes) else type(message).__name__
            raise SpecError(f"a {kind} of {len(body)} bytes does not fit a frame of {self.frame_bytes_max}")
        return msgspec.Raw(body)

    def _fail(self, request: int, error: JobrunnerError) -> bool:
        kind = type(error).__name__
        try:
            data = self._failure_encoder.encode(Failure(request, kind, error.message, error.fields))
        except (TypeError, ValueError, OverflowError, RecursionError):  # A field that msgpack cannot carry.
            data = b""
        if not data or len(data) + _ENVELOPE_BYTES > self.frame_bytes_max:
            text = error.message[:_FAILURE_TEXT_MAX].encode(errors="replace").decode()
            data = self._encoder.encode(Failure(request, kind, text, {}))
        return self._put(data)

    def _put(self, data: bytes, *, call: int = 0) -> bool:
        if self._queue and self.queue_bytes + len(data) > self.queue_bytes_max:
            return False
        self.queue_bytes += len(data)
        self._queue.append(_Waiting(call, data))
        return True


def _array_header(count: int) -> bytes:
    """The msgpack header of an array of `count` values."""
    return bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


def raised_there(failure: Failure) -> JobrunnerError:
    """The error that the peer raised, with those of its fields that an attribute can be."""
    fields = {
        name: value
        for name, value in failure.fields.items()
        if name.isidentifier() and not name.startswith("_") and name not in _RESERVED
    }
    return error_from_wire(failure.kind, failure.message, fields)
