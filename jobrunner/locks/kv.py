"""Small values: keys with revisions, transactions of a few steps, keys that go with a session, changes to watch.

Every transaction that changes something makes one revision, and all its changes have it. The last changes are kept,
whole revisions, up to a limit in bytes: who asks for older ones is told that they are gone, and reads everything anew.
Applied in log order, the same on every master.
"""

from collections import deque
from collections.abc import Sequence

from jobrunner.control.locks import Compare, Delete, Get, KeyChange, Keys, KeyStep, KeyValue, Transact, Transacted
from jobrunner.errors import Compacted, Refused
from jobrunner.ids import ClientId
from jobrunner.locks.limits import LockLimits

CHANGE_BYTES = 64  # What a kept change costs beside its key and value.

Staged = dict[str, KeyValue | None]


class KvStore:
    def __init__(self) -> None:
        self.items: dict[str, KeyValue] = {}
        self.revision = 0
        self.bytes = 0  # Of keys and values.
        self.of_client: dict[ClientId, dict[str, None]] = {}  # Keys that go with a session.
        self.history: deque[KeyChange] = deque()
        self.history_bytes = 0
        self.compacted = 0  # Changes up to this revision are not kept any more.
        self._sorted: list[str] | None = None

    # --- changing ----------------------------------------------------------------------------------------------------

    def transact(self, client: ClientId, request: Transact, limits: LockLimits) -> Transacted:
        """All steps or none. Raises Refused, then nothing has changed."""
        if len(request.compares) + len(request.then) + len(request.otherwise) > limits.steps_max:
            raise Refused(f"a transaction has at most {limits.steps_max} steps: locks.steps_max")
        succeeded = all(self._holds(compare) for compare in request.compares)
        staged: Staged = {}
        found = [
            self._step(client, step, staged, limits) for step in (request.then if succeeded else request.otherwise)
        ]
        self._check_room(staged, limits)
        self._commit(staged, limits)
        return Transacted(self.revision, succeeded, found)

    def end_client(self, client: ClientId, limits: LockLimits) -> None:
        """Delete the keys that go with a session, in one revision."""
        self._commit(dict.fromkeys(self.of_client.get(client, {})), limits)

    def _holds(self, compare: Compare) -> bool:
        item = self.items.get(compare.key)
        modified, created, value = (item.modified, item.created, item.value) if item is not None else (0, 0, None)
        return (
            compare.modified in (None, modified)
            and compare.created in (None, created)
            and (compare.value is None or compare.value == value)
        )

    def _step(self, client: ClientId, step: KeyStep, staged: Staged, limits: LockLimits) -> KeyValue | None:
        if not step.key or len(step.key.encode()) > limits.name_bytes_max:
            raise Refused(f"a key has 1 to {limits.name_bytes_max} bytes")
        before = staged[step.key] if step.key in staged else self.items.get(step.key)
        if isinstance(step, Get):
            return before
        if isinstance(step, Delete):
            staged[step.key] = None
            return before
        if len(step.value) > limits.value_bytes_max:
            raise Refused(f"value of {step.key}: {len(step.value)} bytes; locks.value_bytes_max is "
                          f"{limits.value_bytes_max}")  # fmt: skip
        revision = self.revision + 1
        item = KeyValue(
            step.key, step.value, before.created if before else revision, revision,
            client if step.ephemeral else ClientId(0),
        )  # fmt: skip
        staged[step.key] = item
        return item

    def _check_room(self, staged: Staged, limits: LockLimits) -> None:
        growth = sum(_size(item) - _size(self.items.get(key)) for key, item in staged.items())
        if growth > 0 and self.bytes + growth > limits.kv_bytes_max:
            raise Refused(f"{self.bytes} bytes are kept: locks.kv_bytes_max is {limits.kv_bytes_max}")

    def _commit(self, staged: Staged, limits: LockLimits) -> None:
        changed = {key: item for key, item in staged.items() if item is not None or key in self.items}
        if not changed:
            return
        self.revision += 1
        for key, item in changed.items():
            self._replace(key, item)
            value = item.value if item is not None else None
            self.history.append(KeyChange(self.revision, key, value))
            self.history_bytes += _change_bytes(self.history[-1])
        while self.history_bytes > limits.history_bytes_max:
            self._compact_one()

    def _replace(self, key: str, item: KeyValue | None) -> None:
        before = self.items.get(key)
        self.bytes += _size(item) - _size(before)
        if before is not None and before.client:
            keys = self.of_client[before.client]
            del keys[key]
            if not keys:
                del self.of_client[before.client]
        if (before is None) != (item is None):
            self._sorted = None
        if item is None:
            del self.items[key]
            return
        self.items[key] = item
        if item.client:
            self.of_client.setdefault(item.client, {})[key] = None

    def _compact_one(self) -> None:
        """Drop the oldest revision whole: half of one is worth nothing to who watches."""
        self.compacted = self.history[0].revision
        while self.history and self.history[0].revision == self.compacted:
            self.history_bytes -= _change_bytes(self.history.popleft())

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, prefix: str, *, exact: bool, after: str, bytes_max: int) -> Keys:
        """In order of keys; as many as fit into `bytes_max`, at least one."""
        if exact:
            item = self.items.get(prefix)
            return Keys(self.revision, [item] if item is not None else [], more=False)
        if self._sorted is None:
            self._sorted = sorted(self.items)
        found: list[KeyValue] = []
        room = bytes_max
        for key in self._sorted:
            if key.startswith(prefix) and key > after:
                item = self.items[key]
                room -= _size(item) + CHANGE_BYTES
                if room < 0 and found:
                    return Keys(self.revision, found, more=True)
                found.append(item)
        return Keys(self.revision, found, more=False)

    def changes(self, prefix: str, revision: int, *, bytes_max: int) -> tuple[list[KeyChange], int]:
        """Changes from `revision` on, whole revisions up to `bytes_max`, and where to go on. Raises Compacted."""
        if revision <= self.compacted:
            raise Compacted(
                f"changes from revision {revision} are asked for, those up to {self.compacted} are not kept",
                compacted=self.compacted,
            )
        found: list[KeyChange] = []
        room = bytes_max
        for change in self._history_from(revision):
            if not change.key.startswith(prefix):
                continue
            room -= _change_bytes(change)
            if room < 0 and found and found[-1].revision != change.revision:
                return found, change.revision
            found.append(change)
        return found, max(revision, self.revision + 1)

    def _history_from(self, revision: int) -> Sequence[KeyChange]:
        """Walks from the newest: who watches is rarely far behind."""
        found: list[KeyChange] = []
        for change in reversed(self.history):
            if change.revision < revision:
                break
            found.append(change)
        found.reverse()
        return found


def _size(item: KeyValue | None) -> int:
    return len(item.key.encode()) + len(item.value) if item is not None else 0


def _change_bytes(change: KeyChange) -> int:
    return len(change.key.encode()) + len(change.value or b"") + CHANGE_BYTES
