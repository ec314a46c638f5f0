"""Small values from Python: `client.kv`. For what programs agree upon, not for data."""

from collections.abc import Callable, Iterator, Sequence

from jobrunner.api.remote import Remote
from jobrunner.api.sessions import LockSession
from jobrunner.control.locks import (
    Changes,
    Compare,
    Delete,
    Get,
    KeyChange,
    Keys,
    KeyStep,
    KeyValue,
    Put,
    ReadKeys,
    Transact,
    Transacted,
    WatchKeys,
)

__all__ = ["Compare", "Delete", "Get", "KeyChange", "KeyValue", "Kv", "Put"]

_POLL_MS = 5_000


class Kv:
    """Keys with values of bytes. `modified` of a KeyValue is the revision that wrote it; 0 stands for no such key.

    Writes are carried out once, whatever happens to messages and masters; reads see every write that was answered.
    """

    def __init__(self, remote: Remote, session: Callable[[], LockSession]) -> None:
        self._remote = remote
        self._session = session

    def get(self, key: str) -> KeyValue | None:
        found = self._remote.call(ReadKeys(key, exact=True), Keys).items
        return found[0] if found else None

    def list(self, prefix: str = "") -> "list[KeyValue]":
        """All keys that begin with `prefix`, by key; a long list is not of one instant."""
        return [item for page in self._pages(prefix) for item in page.items]

    def _pages(self, prefix: str) -> Iterator[Keys]:
        after = ""
        while True:
            page = self._remote.call(ReadKeys(prefix, after=after), Keys)
            yield page
            if not page.more:
                return
            after = page.items[-1].key

    def put(
        self, key: str, value: bytes | str, *, ephemeral: bool = False, if_modified: int | None = None
    ) -> KeyValue | None:
        """Write; with `if_modified` only if the key is still of that revision, else None.

        An ephemeral key is deleted with the session: when this client is closed, or dead for its ttl.
        """
        data = value.encode() if isinstance(value, str) else value
        compares = [] if if_modified is None else [Compare(key, modified=if_modified)]
        done = self.transact(compares, [Put(key, data, ephemeral)])
        return done.found[0] if done.succeeded else None

    def delete(self, key: str, *, if_modified: int | None = None) -> bool:
        """True if there was such a key, of that revision."""
        compares = [] if if_modified is None else [Compare(key, modified=if_modified)]
        done = self.transact(compares, [Delete(key)])
        return done.succeeded and done.found[0] is not None

    def transact(
        self, compares: Sequence[Compare], then: Sequence[KeyStep], otherwise: Sequence[KeyStep] = ()
    ) -> Transacted:
        """If all compares hold do `then`, else `otherwise`: at once, once. Raises Refused, LockLost, Unknown."""
        outcome = self._session().ask(Transact([*compares], [*then], [*otherwise]))
        assert isinstance(outcome, Transacted)
        return outcome

    def watch(self, prefix: str = "", *, revision: int | None = None) -> Iterator[KeyChange]:
        """Changes for ever, each once, in order: from `revision` on, else from now on.

        Raises Compacted if they are no longer kept: list everything anew.
        """
        if revision is None:
            revision = self._remote.call(ReadKeys(prefix, exact=True), Keys).revision + 1
        return self._watch(prefix, revision)

    def _watch(self, prefix: str, revision: int) -> Iterator[KeyChange]:
        while True:
            page = self._remote.call(WatchKeys(prefix, revision, _POLL_MS), Changes, patience_ms=_POLL_MS)
            yield from page.changes
            revision = page.next
