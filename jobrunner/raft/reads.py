"""Reads that need no log entry: a quorum says that this leader still led after the read was asked for.

A read takes the commit index of its arrival and waits for a round of heartbeats that begins afterwards. Rounds are
numbered by the leader and only rise, and every heartbeat carries the newest: an answer that was late, doubled or asked
for by an older round can therefore confirm no younger read (etcd#20418, etcd-io/raft#397: stale reads by reused ids).
One round is under way at a time, and all reads that arrive meanwhile share the next; each beat begins one in any case,
so that a lost answer delays nobody for longer.
Source: Ongaro, thesis, 6.4.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReadReady:
    """The read of this number may be served once everything up to `index` is applied."""

    number: int
    index: int


@dataclass(slots=True)
class Reads:
    """One leadership's. A read that is never handed out was not confirmed, and its asker must go elsewhere."""

    round: int = 0  # The newest; every heartbeat carries it.
    _waiting: list[int] = field(default_factory=list)  # For the next round.
    _under_way: deque[tuple[int, int, list[int]]] = field(default_factory=deque)  # (round, commit index, reads).

    def add(self, number: int) -> None:
        self._waiting.append(number)

    def begin(self, commit_index: int, *, at_beat: bool = False) -> bool:
        """Whether a new round begins: its heartbeats must leave after this."""
        if not self._waiting or (self._under_way and not at_beat):
            return False
        self.round += 1
        self._under_way.append((self.round, commit_index, self._waiting))
        self._waiting = []
        return True

    def confirmed(self, round: int) -> list[ReadReady]:
        """A quorum has answered heartbeats of `round` or later: the reads that this confirms."""
        done: list[ReadReady] = []
        while self._under_way and self._under_way[0][0] <= round:
            _, index, numbers = self._under_way.popleft()
            done += [ReadReady(number, index) for number in numbers]
        return done
