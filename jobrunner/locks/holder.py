"""The client's end of a session: how long it may rely on what it holds.

    HELD ──ttl since the last confirmed keepalive was sent──► IN_DOUBT ──grace──► LOST
      ▲───────────────a keepalive is confirmed───────────────────┘                 ▲── the masters say so, from either

Time counts from the moment a keepalive is sent: the masters count from when it arrives, which is later. A tenth of
the ttl is kept back for clocks that run at different speeds. LOST is for ever.
Source: Burrows, The Chubby lock service, OSDI 2006, section 2.8 (jeopardy).
"""

from enum import StrEnum

MARGIN = 0.1  # Of the ttl.
BEATS = 4  # Keepalives in one ttl.


class Hold(StrEnum):
    HELD = "held"
    IN_DOUBT = "in doubt"
    LOST = "lost"


class Lease:
    """One session's time, in the caller's monotonic seconds. Compare it with the clock before each step of the work."""

    def __init__(self, ttl_s: float, *, sent_at: float, grace_s: float) -> None:
        """`sent_at`: when the request that opened the session was first sent."""
        self.ttl_s = ttl_s
        self._grace_s = grace_s
        self._until = sent_at + self._good_s
        self._ended = False

    @property
    def _good_s(self) -> float:
        return self.ttl_s * (1 - MARGIN)

    @property
    def beat_s(self) -> float:
        return self.ttl_s / BEATS

    def state(self, now: float) -> Hold:
        if not self._ended and now >= self._until + self._grace_s:
            self._ended = True
        if self._ended:
            return Hold.LOST
        return Hold.HELD if now < self._until else Hold.IN_DOUBT

    def confirmed(self, *, sent_at: float, now: float) -> None:
        """A keepalive that was first sent at `sent_at` was answered. It cannot bring back what is lost."""
        if self.state(now) is not Hold.LOST:
            self._until = max(self._until, sent_at + self._good_s)

    def ended(self) -> None:
        """The masters say that the session is over."""
        self._ended = True

    def left_s(self, now: float) -> float:
        """Seconds until the next change of state that silence brings; 0 when there is none."""
        if self.state(now) is Hold.LOST:
            return 0.0
        return self._until - now if now < self._until else self._until + self._grace_s - now
