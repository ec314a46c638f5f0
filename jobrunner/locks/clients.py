"""Sessions of clients: each request is carried out at most once, however often it is sent.

    (client, sequence, lowest) ──► known? its kept answer; below `lowest`? refused; else carry out, keep the answer

An answer is kept until the client says, by `lowest`, that it has it or wants it no more. A request of a session that
is over is refused for ever: it may not take a lock that nobody would give back.
Source: Ongaro, Consensus: Bridging Theory and Practice, 2014, section 6.3.
"""

from dataclasses import dataclass, field

from jobrunner.control.locks import AnyOutcome
from jobrunner.errors import Refused, SessionEnded
from jobrunner.ids import ClientId
from jobrunner.locks.limits import LockLimits


@dataclass(slots=True)
class ClientSession:
    """`lowest`: no number below it is carried out any more. `answers`: by number, from `lowest` on."""

    id: ClientId
    key: str
    owner: str
    ttl_ms: int
    opened_ms: int  # For display.
    lowest: int = 1
    answers: dict[int, AnyOutcome] = field(default_factory=dict)


class ClientTable:
    """Live sessions. Their keepalives are the leader's memory, their end is a log entry."""

    def __init__(self) -> None:
        self.live: dict[ClientId, ClientSession] = {}
        self.by_key: dict[str, ClientId] = {}
        self.version = 0  # Rises when a session begins or ends.

    def check_open(self, key: str, owner: str, ttl_ms: int, limits: LockLimits) -> None:
        """Raises Refused if no such session may be opened."""
        if not limits.ttl_ms_min <= ttl_ms <= limits.ttl_ms_max:
            raise Refused(f"ttl: found {ttl_ms} ms, allowed: {limits.ttl_ms_min} to {limits.ttl_ms_max} ms")
        if not key or max(len(key.encode()), len(owner.encode())) > limits.name_bytes_max:
            raise Refused(f"a session's key or owner is empty or longer than {limits.name_bytes_max} bytes")
        if len(self.live) >= limits.sessions_max:
            raise Refused(f"{len(self.live)} sessions are open: locks.sessions_max")

    def open(self, session: ClientSession) -> None:
        self.live[session.id] = session
        self.by_key[session.key] = session.id
        self.version += 1

    def end(self, id: ClientId) -> ClientSession | None:
        """End a session; None if it is over (a repeat)."""
        session = self.live.pop(id, None)
        if session is not None:
            del self.by_key[session.key]
            self.version += 1
        return session

    def session(self, id: ClientId) -> ClientSession:
        if id not in self.live:
            raise SessionEnded(f"the session of client {id} is over")
        return self.live[id]

    def kept(self, id: ClientId, sequence: int, lowest: int, limits: LockLimits) -> AnyOutcome | None:
        """The answer given before; None: carry it out, then `keep`. Raises SessionEnded, Refused."""
        session = self.session(id)
        if lowest > session.lowest:
            session.lowest = lowest
            for old in [number for number in session.answers if number < lowest]:
                del session.answers[old]
        if sequence < session.lowest:
            raise Refused(f"request {sequence} of client {id} was given up: {session.lowest} is the lowest now")
        known = session.answers.get(sequence)
        if known is None and len(session.answers) >= limits.unanswered_max:
            raise Refused(f"client {id} has {len(session.answers)} unacknowledged requests: locks.unanswered_max")
        return known

    def keep(self, id: ClientId, sequence: int, answer: AnyOutcome) -> None:
        self.live[id].answers[sequence] = answer
