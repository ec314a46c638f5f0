"""Messages about clients' sessions, named locks and small values.

A client opens a session and keeps it alive. What it asks within the session is numbered: a request sent again under
its number is carried out once, and answered as the first time.
"""

from jobrunner.control.values import Message, Value
from jobrunner.ids import ClientId, Token

OUTPUT_PREFIX = "output:"  # The lock "output:URL" is held by the job that writes URL, or by a program.


class Step(Value, frozen=True, array_like=True):
    """A part of a transaction."""


class Compare(Step, frozen=True):
    """True if all that is given holds for the key; `modified` and `created` are 0 for a key that is not there."""

    key: str
    modified: int | None = None
    created: int | None = None
    value: bytes | None = None


class Put(Step, frozen=True, tag=True):
    """`ephemeral`: the key goes with the session that put it."""

    key: str
    value: bytes
    ephemeral: bool = False


class Delete(Step, frozen=True, tag=True):
    key: str


class Get(Step, frozen=True, tag=True):
    key: str


KeyStep = Put | Delete | Get


# --- what is asked in a session, once --------------------------------------------------------------------------------


class Operation(Value, frozen=True, array_like=True, tag=True):
    """Goes into the log as it is."""


class Acquire(Operation, frozen=True):
    """Take a lock, or stand in line for it (`wait`). The number of this request is the ticket."""

    name: str
    shared: bool
    wait: bool
    delay_ms: int  # After a failure of the holder the lock stays closed for so long.


class Release(Operation, frozen=True):
    """Give back what `ticket` has: the lock or the place in line."""

    name: str
    ticket: int


class Transact(Operation, frozen=True):
    """If all of `compares` hold do `then`, else `otherwise`; at once, and both seen by all or by nobody."""

    compares: list[Compare]
    then: list[KeyStep]
    otherwise: list[KeyStep]


AnyOperation = Acquire | Release | Transact


class Outcome(Value, frozen=True, array_like=True, tag=True):
    """What an operation came to; kept until the client has acknowledged it."""


class Granted(Outcome, frozen=True):
    token: Token


class Queued(Outcome, frozen=True):
    """`before`: how many wait before this one."""

    before: int


class Busy(Outcome, frozen=True):
    owner: str


class Released(Outcome, frozen=True):
    """`held`: it was held until now. False: there was no lock and no place in line."""

    held: bool


class KeyValue(Value, frozen=True):
    """`client`: whose session the key goes with; 0 for a key that stays."""

    key: str
    value: bytes
    created: int  # Revisions.
    modified: int
    client: ClientId = ClientId(0)


class Transacted(Outcome, frozen=True):
    """`found[i]`: what Get found, what Put wrote, what Delete deleted."""

    revision: int
    succeeded: bool
    found: list[KeyValue | None]


class OperationRefused(Outcome, frozen=True):
    """Refused by a limit or a rule; asking again under another number may go otherwise."""

    reason: str


AnyOutcome = Granted | Queued | Busy | Released | Transacted | OperationRefused


# --- client to master ------------------------------------------------------------------------------------------------


class OpenClient(Message, frozen=True):
    """Start a session. `key` is a uuid: the same again is the same session. `owner` is for people."""

    key: str
    owner: str
    ttl_ms: int


class ClientOpened(Message, frozen=True):
    client: ClientId


class KeepAlive(Message, frozen=True):
    """Answered only by a leader that was still one after this arrived. `held`: tokens the client believes it has."""

    client: ClientId
    held: list[Token]


class KeptAlive(Message, frozen=True):
    """`gone`: those of `held` that are not the client's any more (released by an operator)."""

    gone: list[Token]


class CloseClient(Message, frozen=True):
    """End the session and release all it has, without lock-delay. Safe to repeat."""

    client: ClientId


class Ask(Message, frozen=True):
    """Carry out an operation once. Raises SessionEnded if the session is over: then it was not, and never will be.

    `lowest`: every number below it is acknowledged, or given up, and will not be carried out any more.
    """

    client: ClientId
    sequence: int
    lowest: int
    operation: AnyOperation


class Answered(Message, frozen=True):
    outcome: AnyOutcome


class AwaitGrant(Message, frozen=True):
    """Answered with Granted, with Queued after timeout_ms, or with Released(False) if the ticket has nothing."""

    client: ClientId
    name: str
    ticket: int
    timeout_ms: int


class LockOwner(Value, frozen=True):
    """Who holds a lock, or waits for it (then the token is 0). `since_ms`: a master's unix time."""

    owner: str
    client: ClientId
    token: Token
    shared: bool
    since_ms: int


class LockInfo(Value, frozen=True):
    """`job`: the job that holds it, or "". `delays`: who held it and failed: it stays closed for a while.

    `waiters`: the first in line, of `waiting` in all.
    """

    name: str
    holders: list[LockOwner]
    waiters: list[LockOwner]
    waiting: int
    delays: list[LockOwner]
    job: str = ""


class Forced(Value, frozen=True):
    """A lock that an operator released."""

    name: str
    owner: str
    token: Token
    reason: str
    at_ms: int


class ListLocks(Message, frozen=True):
    """Locks whose names begin with `prefix` and come after `after`."""

    prefix: str = ""
    after: str = ""


class LockList(Message, frozen=True):
    """By name. `more`: ask again after the last one. `forced`: newest last. `now_ms`: the master's clock."""

    locks: list[LockInfo]
    more: bool
    forced: list[Forced]
    now_ms: int


class ForceRelease(Message, frozen=True):
    """Take the lock from the holder of `token`. Raises Refused if that is not its holder any more."""

    name: str
    token: Token
    reason: str


class ReadKeys(Message, frozen=True):
    """The key `prefix` (`exact`), or those that begin with it and come after `after`."""

    prefix: str
    exact: bool = False
    after: str = ""


class Keys(Message, frozen=True):
    """By key. `more`: ask again after the last one."""

    revision: int
    items: list[KeyValue]
    more: bool


class WatchKeys(Message, frozen=True):
    """Changes from `revision` on; waits for the first up to timeout_ms. Raises Compacted."""

    prefix: str
    revision: int
    timeout_ms: int


class KeyChange(Value, frozen=True):
    """`value` is None: the key was deleted."""

    revision: int
    key: str
    value: bytes | None


class Changes(Message, frozen=True):
    """In order, whole revisions. Ask again from `next`."""

    changes: list[KeyChange]
    next: int


LockMessage = (
    OpenClient | ClientOpened | KeepAlive | KeptAlive | CloseClient | Ask | Answered | AwaitGrant | ListLocks | LockList
    | ForceRelease | ReadKeys | Keys | WatchKeys | Changes
)  # fmt: skip
