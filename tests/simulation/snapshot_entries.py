"""Logs of random lives, to be replayed: jobs from the simulated control plane, locks and small values drawn here."""

from random import Random

from jobrunner.control.locks import Acquire, Delete, Put, Release, Transact
from jobrunner.errors import JobrunnerError
from jobrunner.ids import ClientId, Epoch, Token
from jobrunner.locks.limits import LockLimits
from jobrunner.master.commands import (
    BeginClient,
    Command,
    EndClient,
    EndDelay,
    Entry,
    RunOperation,
    SetLockLimits,
    TakeLock,
    decode_entry,
    encode_entry,
)
from jobrunner.master.state import MasterState
from jobrunner.raft.messages import EntryKind
from tests.simulation.control_world import ControlWorld


def entries_of_jobs(seed: int) -> list[bytes]:
    """All that the masters applied in a random life of a cluster."""
    world = ControlWorld(seed)
    world.play_all()
    world.finish()
    node = max(world.nodes.values(), key=lambda one: len(one.applied))
    return [entry.data for entry in node.applied if entry.kind == EntryKind.DATA]


def entries_of_locks(seed: int, count: int = 300, *, level: int = 1) -> list[bytes]:
    """Clients that come, lock, write and go, by the state that these entries make."""
    rng, state, entries = Random(seed), MasterState(), []
    for number in range(count):
        entry = Entry(level, number, Epoch(2), _draw(rng, state, number))
        entries.append(encode_entry(entry))
        state.apply(decode_entry(entries[-1]))
    return entries


def _draw(rng: Random, state: MasterState, number: int) -> Command:
    names, clients = state.service.names, list(state.service.clients.live)
    client = ClientId(rng.choice(clients)) if clients else ClientId(0)
    kind = rng.random()
    if not clients or kind < 0.08:
        return BeginClient(f"key{number % 7}", f"owner{number}", 1000)
    if kind < 0.12:
        return EndClient(client, rng.random() < 0.5, "silent")
    if kind < 0.16 and names.delayed:
        return EndDelay(rng.choice(list(names.delayed)))
    if kind < 0.18 and names.locks:
        return TakeLock(rng.choice(list(names.locks)), Token(rng.randint(1, state.locks.last_token)), "by hand")
    if kind < 0.19:
        return SetLockLimits(LockLimits(waiters_max=rng.randint(1, 5), history_bytes_max=rng.choice((200, 100_000))))
    lowest = max(1, number - rng.choice((3, 50)))
    return RunOperation(client, number + 1 - rng.choice((0, 0, 0, 1)), lowest, _operation(rng, client, state))


def _operation(rng: Random, client: ClientId, state: MasterState) -> Acquire | Release | Transact:
    held = list(state.service.names.of_client.get(client, {}).items())
    if held and rng.random() < 0.4:
        (_, ticket), name = rng.choice(held)
        return Release(name, ticket)
    if rng.random() < 0.5:
        return Acquire(rng.choice("xyz"), rng.random() < 0.3, rng.random() < 0.8, rng.choice((0, 500)))
    key = rng.choice("abcd")
    step = Delete(key) if rng.random() < 0.2 else Put(key, rng.randbytes(rng.randint(0, 40)), rng.random() < 0.3)
    return Transact([], [step], [])


def replay(state: MasterState, entries: list[bytes]) -> list[str]:
    """Apply `entries`; what each came to, as text."""
    results = []
    for data in entries:
        result = state.apply(decode_entry(data))
        results.append(f"{type(result).__name__} {result}" if isinstance(result, JobrunnerError) else repr(result))
    return results
