"""The log in memory: all terms, the recent entries; older entries are read from the store.

    first ........ cached_first ........ durable ........ unsaved_first ........ last
    └ read from the store ┘└──────── in memory ─────────────────────────────────────┘
                                          └ being written ┘└ for the next write ┘

At most one write is under way, so that an entry replaced while it was being written cannot be taken for durable by the
completion of that write (the ABA race of overlapping writes): `truncate` lowers what the write may attest.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from jobrunner.raft.messages import Entry

ReadOlder = Callable[[int, int, int], list[Entry]]  # (first, last, bytes_max) -> at least one entry, from `first` on.


class Log:
    """Entries `first_index`..`last_index`. Index 0, term 0 is the place before the first."""

    def __init__(self, *, read_older: ReadOlder, cache_bytes_max: int) -> None:
        self._read_older = read_older
        self._cache_bytes_max = cache_bytes_max
        self._runs: list[tuple[int, int]] = []  # (first index, term) of each stretch of one term.
        self._cached: list[Entry] = []
        self._cached_first = 1
        self._cached_bytes = 0
        self.first_index = 1
        self.last_index = 0
        self._before_term: int | None = 0  # Term of the entry before the first, which a snapshot covers, if known.
        self.durable_index = 0  # Written and synced here.
        self._unsaved_first = 1
        self._saving_last = 0

    @property
    def last_term(self) -> int:
        return self._runs[-1][1] if self._runs else self._before_term or 0

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None if it is not here and not the one before the first. Index 0 has 0."""
        if index == self.first_index - 1:
            return self._before_term
        if not self.first_index <= index <= self.last_index:
            return None
        return self._runs[bisect_right(self._runs, index, key=_first_of_run) - 1][1]

    def matches(self, index: int, term: int) -> bool:
        return self.term_at(index) == term

    def is_behind(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends in (last_index, last_term) is at least as complete as this one (Raft, 5.4.1)."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def conflict_hint(self, index: int, term: int) -> tuple[int, int]:
        """(index, term) of the last entry not after `index` whose term is not above `term`; (0, 0) if none.

        Used by both ends, it skips a whole term in each round (etcd-io/raft, findConflictByTerm).
        """
        index = min(index, self.last_index)
        position = bisect_right(self._runs, index, key=_first_of_run) - 1
        while position >= 0 and index >= self.first_index:
            first, its_term = self._runs[position]
            if its_term <= term:
                return index, its_term
            index = first - 1
            position -= 1
        before = self.first_index - 1
        if index >= before > 0 and self._before_term is not None and self._before_term <= term:
            return before, self._before_term
        return 0, 0

    def append(self, entry: Entry) -> None:
        """Add `entry` at the end."""
        assert entry.index == self.last_index + 1, (entry, self.last_index)
        assert entry.term >= self.last_term, (entry, self.last_term)
        if not self._runs or entry.term != self.last_term:
            self._runs.append((entry.index, entry.term))
        self._cached.append(entry)
        self._cached_bytes += entry.size
        self.last_index = entry.index

    def splice(self, entries: Sequence[Entry], *, committed: int) -> None:
        """Make the log hold `entries`, whose predecessor it has; remove only what conflicts with them.

        A late message that repeats what is here, or less, changes nothing: entries after it stay (akka-raft#66).
        """
        for entry in entries:
            if entry.index <= self.last_index:
                if self.matches(entry.index, entry.term):
                    continue
                assert entry.index > committed, f"entry {entry} would replace a committed one ({committed})"
                self.truncate(entry.index)
            self.append(entry)

    def truncate(self, index: int) -> None:
        """Remove `index` and all after it."""
        assert self.first_index <= index <= self.last_index, (index, self.last_index)
        while self._runs and self._runs[-1][0] >= index:
            self._runs.pop()
        keep = max(index - self._cached_first, 0)
        self._cached_bytes -= sum(entry.size for entry in self._cached[keep:])
        del self._cached[keep:]
        self._cached_first = min(self._cached_first, index)
        self.last_index = index - 1
        self.durable_index = min(self.durable_index, index - 1)
        self._unsaved_first = min(self._unsaved_first, index)
        self._saving_last = min(self._saving_last, index - 1)

    def slice(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries from `first` to at most `last`, up to `bytes_max` but at least one; fewer at the cache's edge."""
        assert self.first_index <= first <= last <= self.last_index, (first, last, self.last_index)
        if first < self._cached_first:
            return self._read_older(first, min(last, self._cached_first - 1), bytes_max)
        taken: list[Entry] = []
        for position in range(first - self._cached_first, last - self._cached_first + 1):
            entry = self._cached[position]
            bytes_max -= entry.size
            if taken and bytes_max < 0:
                break
            taken.append(entry)
        return taken

    @property
    def has_unsaved(self) -> bool:
        return self._unsaved_first <= self.last_index

    def take_unsaved(self) -> tuple[Entry, ...]:
        """The entries of the next write; call `mark_saved` when it is durable, before taking more."""
        entries = tuple(self._cached[self._unsaved_first - self._cached_first :])
        self._unsaved_first = self.last_index + 1
        self._saving_last = self.last_index
        return entries

    def mark_saved(self) -> None:
        """The write of the last `take_unsaved` is durable."""
        self.durable_index = max(self.durable_index, self._saving_last)

    def mark_loaded(self) -> None:
        """All entries came from the store."""
        self._unsaved_first = self.last_index + 1
        self.durable_index = self._saving_last = self.last_index

    def compact(self, index: int) -> None:
        """Forget everything up to `index`, which a durable snapshot covers and the store holds durably."""
        if index < self.first_index:
            return
        assert index <= self.durable_index, (index, self.durable_index)
        self._before_term = self.term_at(index)
        self.first_index = index + 1
        keep = bisect_right(self._runs, self.first_index, key=_first_of_run) - 1
        del self._runs[: max(keep, 0)]
        if self._runs and self.last_index == index:
            self._runs.clear()
        drop = min(max(self.first_index - self._cached_first, 0), len(self._cached))
        self._cached_bytes -= sum(entry.size for entry in self._cached[:drop])
        del self._cached[:drop]
        self._cached_first = max(self._cached_first, self.first_index)

    def reset(self, index: int, term: int | None) -> None:
        """Begin anew after a snapshot of `index`, whose entry is of `term` (None: not known)."""
        self._runs.clear()
        self._cached.clear()
        self._cached_bytes = 0
        self._before_term = term
        self.first_index = self._cached_first = self._unsaved_first = index + 1
        self.last_index = self.durable_index = self._saving_last = index

    def know_before(self, term: int) -> None:
        """The entry before the first is of `term`."""
        self._before_term = term

    def shrink(self, index: int) -> None:
        """Forget cached entries up to `index` at most, oldest first, if the cache is over its limit."""
        if self._cached_bytes <= self._cache_bytes_max:
            return
        index = min(index, self.durable_index)
        goal = self._cache_bytes_max * 3 // 4  # Room, so that the list is not moved at every entry.
        drop = 0
        while drop < len(self._cached) and self._cached[drop].index <= index and self._cached_bytes > goal:
            self._cached_bytes -= self._cached[drop].size
            drop += 1
        del self._cached[:drop]
        self._cached_first += drop


def _first_of_run(run: tuple[int, int]) -> int:
    return run[0]
