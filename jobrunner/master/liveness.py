"""Heartbeats -> which workers are lost. The leader's memory; the verdict itself is a log entry.

A lease is never shorter than what an earlier leader may have promised: a new leader gives every session its full
time again. Time counts while listening: a gap in which this process did not run is added to every deadline.
"""

from collections.abc import Iterable

from jobrunner.ids import SessionId


class Leases:
    """Deadlines of live sessions, in the caller's monotonic seconds."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._deadlines: dict[SessionId, float] = {}
        self._gone: dict[SessionId, str] = {}

    def follow(self, sessions: Iterable[SessionId], now: float) -> None:
        """Watch exactly these sessions; new ones get a full lease."""
        self._deadlines = {id: self._deadlines.get(id, now + self._ttl_s) for id in sessions}
        self._gone = {id: reason for id, reason in self._gone.items() if id in self._deadlines}

    def renew(self, session: SessionId, now: float) -> None:
        if session in self._deadlines:
            self._deadlines[session] = now + self._ttl_s
            self._gone.pop(session, None)

    def give_up(self, session: SessionId, reason: str) -> None:
        """Its process is known to be gone: no need to wait for the lease."""
        if session in self._deadlines:
            self._gone[session] = reason

    def add_gap(self, seconds: float) -> None:
        self._deadlines = {id: deadline + seconds for id, deadline in self._deadlines.items()}

    def lost(self, now: float) -> list[tuple[SessionId, str]]:
        """Sessions to end, with the reason that `story` and `status` show."""
        verdicts = list(self._gone.items())
        for id, deadline in self._deadlines.items():
            if deadline <= now and id not in self._gone:
                verdicts.append((id, f"no heartbeat for {self._ttl_s:g} s"))
        return verdicts

    def remaining(self, session: SessionId, now: float) -> float:
        return self._deadlines.get(session, now) - now
