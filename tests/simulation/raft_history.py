"""What must hold of a group, by observation only: terms, votes, logs and what was durable where.

The checker remembers across time, so that it sees what a look at one moment cannot: two leaders of one term who never
met, a vote given twice with a restart between, a committed entry that is replaced later.
Source: Ongaro's thesis, figure 3.2; openraft, tests-turmoil (12 invariants).
"""

from dataclasses import dataclass, field

from jobrunner.ids import MemberId
from jobrunner.raft.engine import Engine
from jobrunner.raft.messages import Entry
from jobrunner.raft.ready import Save
from jobrunner.raft.roles import Leader


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Observed:
    """One member, as seen so far. `synced` is what its disk must still hold after any crash."""

    synced: list[Entry] = field(default_factory=list)  # Entry i at place i - 1.
    synced_term: int = 1
    synced_vote: MemberId | None = None
    saving: Save | None = None
    installing: Save | None = None
    term: int = 0
    commit: int = 0  # Of this life of the process.
    votes: dict[int, MemberId] = field(default_factory=dict)  # Votes that left the process, by term.


@dataclass
class History:
    members: list[MemberId]
    first: Entry  # Every member begins with it, committed.
    observed: dict[MemberId, Observed] = field(default_factory=dict)
    leaders: dict[int, MemberId] = field(default_factory=dict)
    committed: list[Entry] = field(default_factory=list)
    chains: dict[int, int] = field(default_factory=dict)
    committed_in: list[int] = field(default_factory=list)  # For each, the term in which it was seen to be committed.

    def __post_init__(self) -> None:
        self.observed = {member: Observed([self.first]) for member in self.members}
        self.committed, self.committed_in = [self.first], [self.first.term]

    def started(self, engine: Engine) -> None:
        """A process began on its disk: it finds what was synced, or that and the whole save that was under way."""
        seen = self.observed[engine.member]
        found = (entries_of(engine, engine.log.first_index), engine.term, engine.vote)
        synced = (list(seen.synced), seen.synced_term, seen.synced_vote)
        possible = [synced]
        if seen.saving is not None:
            self.saved(engine.member, seen.saving)
            possible.append((seen.synced, seen.synced_term, seen.synced_vote))
        if seen.installing is not None:
            install = seen.installing
            self.installed(engine.member, install)
            possible.append((seen.synced, seen.synced_term, seen.synced_vote))
            possible.append((seen.synced, *synced[1:]))  # The snapshot was durable, the new segment not.
        first = engine.log.first_index
        real = [
            one for one in possible if (one[0][first - 1 :], *one[1:]) == found and engine.log.last_index == len(one[0])
        ]
        if not real:
            raise Broken(f"{engine.member} had synced term, vote {synced[1:]}, {len(synced[0])}, found {found[1:]}")
        seen.synced, seen.synced_term, seen.synced_vote = list(real[0][0]), real[0][1], real[0][2]
        seen.term, seen.commit = engine.term, 0
        self.check(engine)

    def saving(self, member: MemberId, save: Save) -> None:
        """A save was written, and is not yet synced."""
        self.observed[member].saving = save

    def saved(self, member: MemberId, save: Save) -> None:
        """A sync completed."""
        seen = self.observed[member]
        seen.saving = None
        if save.entries:
            del seen.synced[save.entries[0].index - 1 :]
            seen.synced.extend(save.entries)
        seen.synced_term, seen.synced_vote = save.state.term, save.state.vote

    def installing(self, member: MemberId, save: Save) -> None:
        """The log is about to be replaced by a snapshot."""
        self.observed[member].installing = save

    def installed(self, member: MemberId, save: Save) -> None:
        """It was; what the snapshot covers is known to be committed."""
        seen = self.observed[member]
        assert save.install is not None
        if save.install.index > len(self.committed):
            raise Broken(f"{member} installs a snapshot of {save.install.index}, {len(self.committed)} are committed")
        if self.committed[save.install.index - 1].term != save.install.term:
            raise Broken(f"{member} installs a snapshot of another log")
        seen.installing = seen.saving = None
        seen.synced = self.committed[: save.install.index]
        seen.synced_term, seen.synced_vote = save.state.term, save.state.vote

    def applied(self, index: int, chain: int) -> None:
        """A machine has applied, or was restored to, `index`: all agree in what it then holds."""
        if self.chains.setdefault(index, chain) != chain:
            raise Broken(f"two machines differ after entry {index}")

    def voted(self, member: MemberId, candidate: MemberId, term: int) -> None:
        """A granted vote left the process."""
        given = self.observed[member].votes.setdefault(term, candidate)
        if given != candidate:
            raise Broken(f"{member} voted in term {term} for {given} and for {candidate}")

    def check(self, engine: Engine) -> None:
        """After every event, for the member that it changed."""
        seen = self.observed[engine.member]
        if engine.term < seen.term:
            raise Broken(f"{engine.member} went back from term {seen.term} to {engine.term}")
        seen.term = engine.term
        if isinstance(engine.role, Leader):
            self._check_leader(engine)
        if engine.commit_index < seen.commit:
            raise Broken(f"{engine.member} went back from commit {seen.commit} to {engine.commit_index}")
        if engine.commit_index > seen.commit:
            self._check_committed(engine, seen.commit + 1)
            seen.commit = engine.commit_index

    def _check_leader(self, engine: Engine) -> None:
        """Election safety; leader completeness, when it is first seen.

        A member that was stopped may wake and find that it won a term which is over: what was committed since is not
        its to know.
        """
        if engine.term in self.leaders:
            if self.leaders[engine.term] != engine.member:
                raise Broken(f"term {engine.term} has two leaders, {self.leaders[engine.term]} and {engine.member}")
            return
        self.leaders[engine.term] = engine.member
        for entry, term in zip(self.committed, self.committed_in, strict=True):
            covered = entry.index < engine.log.first_index
            if term < engine.term and not covered and engine.log.term_at(entry.index) != entry.term:
                raise Broken(f"{engine.member} leads term {engine.term} without the committed entry {entry}")

    def _check_committed(self, engine: Engine, first: int) -> None:
        """State machine safety; what is committed is durable on a majority from that moment on."""
        if engine.log.first_index - 1 > len(self.committed):
            raise Broken(f"{engine.member} holds a snapshot of {engine.log.first_index - 1}, which nobody committed")
        for entry in entries_of(engine, max(first, engine.log.first_index), engine.commit_index):
            if entry.index <= len(self.committed):
                if entry != self.committed[entry.index - 1]:
                    raise Broken(f"{engine.member} commits {entry}, another {self.committed[entry.index - 1]}")
                continue
            holders = sum(
                1
                for seen in self.observed.values()
                if len(seen.synced) >= entry.index and seen.synced[entry.index - 1].term == entry.term
            )
            if holders <= len(self.members) // 2:
                raise Broken(
                    f"{engine.member} commits {entry}, which only {holders} of {len(self.members)} have synced"
                )
            self.committed.append(entry)
            self.committed_in.append(engine.term)

    def read(self, engine: Engine, committed: int) -> None:
        """A read is served that was asked for when `committed` entries were seen to be committed, anywhere."""
        if engine.applied_index < committed:
            raise Broken(f"{engine.member} serves a read at {engine.applied_index} that began after {committed}")

    def check_logs(self, engines: list[Engine]) -> None:
        """Log matching: where two logs agree in a term, they agree in everything before."""
        logs = [(engine.member, entries_of(engine, engine.log.first_index)) for engine in engines]
        for place, (one, mine_all) in enumerate(logs):
            for other, theirs_all in logs[place + 1 :]:
                start = max(mine_all[0].index, theirs_all[0].index) if mine_all and theirs_all else 0
                its = [entry for entry in mine_all if entry.index >= start]
                theirs = [entry for entry in theirs_all if entry.index >= start]
                same = [mine == yours for mine, yours in zip(its, theirs, strict=False)]
                terms = [mine.term == yours.term for mine, yours in zip(its, theirs, strict=False)]
                if True in terms and not all(same[: len(terms) - terms[::-1].index(True)]):
                    raise Broken(f"the logs of {one} and {other} agree after a place where they differ")


def entries_of(engine: Engine, first: int, last: int | None = None) -> list[Entry]:
    """The entries of a log, also those that are no longer in memory."""
    last = engine.log.last_index if last is None else last
    entries: list[Entry] = []
    while first <= last:
        entries += engine.log.slice(first, last, 1 << 30)
        first = entries[-1].index + 1
    return entries
