"""Engines side by side, moved by hand: every message, save and millisecond is somebody's explicit step.

For text scripts and unit tests. Nothing is random: a draw gives its lowest value. What a member has saved is kept as
plain values, so that it can be restarted from exactly that.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from jobrunner.ids import MemberId
from jobrunner.raft.engine import Engine
from jobrunner.raft.log import Log
from jobrunner.raft.messages import Entry, EntryKind, Member, Message, first_entry
from jobrunner.raft.ready import HardState, Save, Send
from jobrunner.raft.roles import Candidate, Follower, Leader, PreCandidate
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Snapshot, encode_snapshot

SETTINGS = RaftSettings(heartbeat_ms=50, election_ms=500, sync_hang_ms=5_000)


class Lowest:
    def randint(self, a: int, b: int, /) -> int:
        return a


class InFlight(NamedTuple):
    sender: MemberId
    to: MemberId
    message: Message

    def __str__(self) -> str:
        return f"{self.sender} -> {self.to} {self.message}"


class Kept:
    """A stored snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.index, self.term = snapshot.index, snapshot.term
        self._bytes = encode_snapshot(snapshot)
        self.size = len(self._bytes)

    def read(self, offset: int, length: int) -> bytes:
        return self._bytes[offset : offset + length]


@dataclass
class Disk:
    entries: list[Entry]
    state: HardState = field(default_factory=lambda: HardState(1, None, 1))

    def write(self, save: Save) -> None:
        self.state = save.state
        if save.install is not None:  # What it covers is never asked for again.
            index, term = save.install.index, save.install.term
            self.entries = [Entry(place, term, EntryKind.NOOP) for place in range(1, index + 1)]
        if save.entries:
            del self.entries[save.entries[0].index - 1 :]
            self.entries += save.entries


def load_log(entries: list[Entry], settings: RaftSettings = SETTINGS) -> Log:
    """A log whose older entries are read from `entries`, as they are then."""

    def read_older(first: int, last: int, bytes_max: int) -> list[Entry]:
        return entries[first - 1 : last]

    log = Log(read_older=read_older, cache_bytes_max=settings.cache_bytes_max)
    for entry in entries:
        log.append(entry)
    log.mark_loaded()
    return log


def entries_of_terms(members: tuple[Member, ...], terms: list[int]) -> list[Entry]:
    """The first entry, then one DATA entry for each of `terms`."""
    data = [Entry(index, term, EntryKind.DATA, b"old%d" % index) for index, term in enumerate(terms, 2)]
    return [first_entry(members), *data]


@dataclass
class RaftGroup:
    count: int
    settings: RaftSettings = SETTINGS
    disks: dict[MemberId, Disk] = field(default_factory=dict)
    engines: dict[MemberId, Engine] = field(default_factory=dict)
    network: list[InFlight] = field(default_factory=list)
    saving: dict[MemberId, tuple[Save, tuple[Send, ...]]] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = tuple(Member(MemberId(f"m{slot}"), slot, f"h{slot}:1") for slot in range(1, self.count + 1))
        self._seen: dict[MemberId, tuple[str, int]] = {}
        for member in self.members:
            self.disks[member.id] = Disk([first_entry(self.members)])
            self.restart(member.id)
        self.story.clear()

    def give_log(self, member: MemberId, terms: list[int], *, term: int | None = None) -> Engine:
        """Restart `member` with a log of the first entry and one entry for each of `terms`."""
        entries = entries_of_terms(self.members, terms)
        self.disks[member] = Disk(entries, HardState(term or entries[-1].term, None, 1))
        return self.restart(member)

    def restart(self, member: MemberId) -> Engine:
        """Begin anew from what is saved; a save under way, and messages to it, are lost."""
        disk = self.disks[member]
        self.saving.pop(member, None)
        self.network = [sent for sent in self.network if sent.to != member]
        log = load_log(list(disk.entries), self.settings)
        engine = Engine(member=member, log=log, state=disk.state, settings=self.settings, rng=Lowest())
        self.engines[member] = engine
        self._seen[member] = (describe_role(engine), engine.commit_index)
        return engine

    def pump(self, member: MemberId) -> None:
        """Take what the engine hands out: messages into the network, a save under way."""
        engine = self.engines[member]
        self._tell(engine)
        engine.applied(engine.commit_index)
        ready = engine.ready()
        self.story += [f"{member} may serve read {read.number} at {read.index}" for read in ready.reads]
        self._put(member, ready.send_now)
        if ready.save is not None:
            self.saving[member] = (ready.save, ready.after_persist)
            self.story.append(f"{member} saves {describe_save(ready.save)}")

    def save(self, member: MemberId) -> None:
        """The save under way becomes durable."""
        save, after = self.saving.pop(member)
        self.disks[member].write(save)
        self._put(member, after)
        if save.install is not None:
            self.engines[member].installed(Kept(save.install))
        else:
            self.engines[member].saved()
        self.pump(member)

    def deliver(self, sent: InFlight) -> None:
        if sent in self.network:
            self.network.remove(sent)
        self.story.append(str(sent))
        self.engines[sent.to].step(sent.sender, sent.message)
        self.pump(sent.to)

    def tick(self, member: MemberId, elapsed_ms: int) -> None:
        self.engines[member].tick(elapsed_ms)
        self.pump(member)

    def stabilize(self, only: set[MemberId] | None = None, *, rounds_max: int = 1_000) -> int:
        """Deliver and save until nothing is left among `only`; the number of rounds it took."""
        among = only or set(self.engines)
        for rounds in range(rounds_max):
            for member in list(self.engines):
                self.pump(member)
            batch = [sent for sent in self.network if sent.sender in among and sent.to in among]
            saves = [member for member in self.saving if member in among]
            if not batch and not saves:
                return rounds
            for member in saves:
                self.save(member)
            for sent in batch:
                self.deliver(sent)
        raise AssertionError(f"not stable after {rounds_max} rounds")

    def elect(self, member: MemberId) -> Engine:
        """Make `member` the leader, with everybody up to date."""
        self.engines[member].campaign()
        self.stabilize()
        engine = self.engines[member]
        assert isinstance(engine.role, Leader), engine.role
        self.tick(member, self.settings.heartbeat_ms)
        self.stabilize()
        return engine

    def compact(self, member: MemberId) -> None:
        """The member's snapshot of all it has applied is durable; no entry before it is kept."""
        engine = self.engines[member]
        term = engine.log.term_at(engine.applied_index)
        assert term is not None
        engine.compact(Kept(Snapshot(engine.applied_index, term, self.members, b"state")), 0)

    def propose(self, member: MemberId, data: bytes) -> None:
        self.engines[member].propose(data)
        self.pump(member)

    def sent(self, kind: type[Message], to: MemberId | None = None) -> list[InFlight]:
        """Messages of one kind that are under way."""
        return [sent for sent in self.network if isinstance(sent.message, kind) and to in (None, sent.to)]

    def _put(self, sender: MemberId, sends: tuple[Send, ...]) -> None:
        self.network += [InFlight(sender, send.to, send.message) for send in sends]

    def _tell(self, engine: Engine) -> None:
        seen, now = self._seen[engine.member], (describe_role(engine), engine.commit_index)
        self._seen[engine.member] = now
        if seen[0] != now[0]:
            self.story.append(f"{engine.member} is {now[0]}")
        if seen[1] != now[1]:
            self.story.append(f"{engine.member} commits {now[1]}")


def describe_role(engine: Engine) -> str:
    match engine.role:
        case Leader():
            text = "leader"
        case Candidate():
            text = "candidate"
        case PreCandidate():
            text = "pre-candidate"
        case Follower(leader=leader):
            text = f"follower of {leader or 'nobody'}"
    return f"{text} in term {engine.term}"


def describe_save(save: Save) -> str:
    entries = ", ".join(str(entry) for entry in save.entries)
    if save.install is not None:
        return f"term={save.state.term} vote={save.state.vote} snapshot {save.install.term}/{save.install.index}"
    return f"term={save.state.term} vote={save.state.vote} commit={save.state.commit} [{entries}]"
