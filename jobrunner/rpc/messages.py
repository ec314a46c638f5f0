"""The envelope: handshake, requests, replies, pushes. What is inside belongs to its package.

After the HTTP upgrade (whose headers carry the token) the caller sends one `Hello`; the answer is `Welcome`, or
`Turned` and the end of the connection. Then both sides send frames: msgpack arrays of envelopes.
"""

from typing import Annotated, Any, Literal

import msgspec

PROTOCOL = 1  # Raised when a peer of the older number could no longer be understood.

Role = Literal["master", "bulk", "worker", "client"]
ROLES: frozenset[str] = frozenset(("master", "bulk", "worker", "client"))

DEADLINE_MS_MAX = 86_400_000  # A day: a longer wait is asked for again.
ID_MAX = (1 << 63) - 1


class Hello(msgspec.Struct, frozen=True, tag="hello", tag_field="type"):
    """Who calls. Fields of a later protocol are ignored, so that its caller gets a clear answer."""

    protocol: int
    cluster_id: str
    role: str  # One of ROLES; "bulk" is a master's second connection, for what may be slow.
    identity: str  # Uuid of the member's or worker's directory, 32 hex digits; "" for a client.
    name: str  # For people, as in "worker-2".
    expects: str = ""  # Identity that the caller believes to reach; "" for any.


class Welcome(msgspec.Struct, frozen=True, tag="welcome", tag_field="type"):
    """Who answers."""

    protocol: int
    cluster_id: str
    role: str
    identity: str
    name: str


class Turned(msgspec.Struct, frozen=True, tag="turned", tag_field="type"):
    """Not let in, and why; asking again as it was will not help."""

    reason: str


class Request(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """`id` is the sender's, not used twice on one connection. Past `deadline_ms` nobody waits for the reply."""

    id: Annotated[int, msgspec.Meta(ge=1, le=ID_MAX)]
    deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=DEADLINE_MS_MAX)]
    body: msgspec.Raw


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    id: int
    body: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """An error of errors.py: `kind` is the class name."""

    id: int
    kind: str
    message: str
    fields: dict[str, Any]


class Push(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """Said once, not answered, perhaps lost."""

    body: msgspec.Raw


Envelope = Request | Reply | Failure | Push
