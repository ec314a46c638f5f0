"""Worker sessions: who is alive, by leases that the leader keeps and verdicts that the log keeps.

A session belongs to one process of one data directory. Keepalives are the leader's memory; the end of a session is a
log entry. Source: Burrows, The Chubby lock service, OSDI 2006, section 2.8.
"""

import msgspec

from jobrunner.control.messages import HostInfo
from jobrunner.ids import SessionId


class Session(msgspec.Struct, frozen=True):
    """One process of a worker's directory, as it registered."""

    id: SessionId
    directory: str
    process: str
    name: int
    address: str
    pid: int
    host: HostInfo
    slots: int


class SessionTable:
    """Live sessions, and the last one of each directory that has none."""

    def __init__(self) -> None:
        self.live: dict[SessionId, Session] = {}
        self.by_directory: dict[str, SessionId] = {}
        self.lost: dict[str, Session] = {}  # By directory; for `cluster status`.

    def same_process(self, directory: str, process: str) -> Session | None:
        """The live session of this very process, which asks again because a reply was lost."""
        session = self.live.get(self.by_directory.get(directory, SessionId(-1)))
        return session if session is not None and session.process == process else None

    def register(self, session: Session) -> Session | None:
        """Start `session`; return the session of the same directory that it replaces, if one was live."""
        replaced = self.live.pop(self.by_directory.get(session.directory, SessionId(-1)), None)
        self.live[session.id] = session
        self.by_directory[session.directory] = session.id
        self.lost.pop(session.directory, None)
        return replaced

    def end(self, id: SessionId) -> Session | None:
        """End a session; None if it is not live (a repeat)."""
        session = self.live.pop(id, None)
        if session is not None:
            self.by_directory.pop(session.directory, None)
            self.lost[session.directory] = session
        return session

    def forget_lost(self, directory: str) -> None:
        self.lost.pop(directory, None)
