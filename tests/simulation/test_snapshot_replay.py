"""A state restored from a snapshot at any point is the replayed one, byte for byte, and goes on alike."""

import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from jobrunner.errors import CorruptData, LogTooNew
from jobrunner.ids import MemberId
from jobrunner.master.invariants import check_state
from jobrunner.master.snapshot import SnapshotEncoder, decode_state, encode_state
from jobrunner.master.state import MasterState
from jobrunner.raft.messages import Entry, EntryKind, Member
from jobrunner.raft.ready import HardState, Save
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.store import Store, init_store
from tests.simulation.control_history import state_bytes
from tests.simulation.snapshot_entries import entries_of_jobs, entries_of_locks, replay

FIXTURE = Path(__file__).parents[1] / "fixtures" / "log-1"
SEEDS = int(os.environ.get("JOBRUNNER_SEEDS", "4"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def check_at_random_points(entries: list[bytes], rng: Random) -> None:
    whole = MasterState()
    results = replay(whole, entries)
    final = encode_state(whole)
    encoder, state, done = SnapshotEncoder(), MasterState(), 0
    for point in sorted(rng.sample(range(len(entries) + 1), min(8, len(entries)))):
        replay(state, entries[done:point])
        done = point
        state.service.names.granted.clear()  # What the last entry granted is no state.
        data = encoder.encode(state)
        assert data == encode_state(state), f"kept bytes of tidy jobs are old at {point}"
        restored = decode_state(data)
        check_state(restored)
        assert encode_state(restored) == data, f"not the same bytes at {point}"
        assert state_bytes(restored) == state_bytes(state), f"not the same state at {point}"
        assert replay(restored, entries[point:]) == results[point:], f"other results after {point}"
        assert encode_state(restored) == final, f"another state at the end, restored at {point}"
        assert encode_state(state) == data, f"what was restored shares something with the original at {point}"


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_jobs_restored_anywhere_go_on_as_replayed(seed: int) -> None:
    """A field that is left out would show weeks later, on the one master that was restored."""
    check_at_random_points(entries_of_jobs(seed), Random(seed))


@pytest.mark.parametrize("seed", range(1, 5 * SEEDS + 1))
def test_locks_restored_anywhere_go_on_as_replayed(seed: int) -> None:
    """The same for locks, small values and what each client was answered."""
    check_at_random_points(entries_of_locks(seed), Random(seed))


def test_a_newer_snapshot_and_a_damaged_one_are_told_apart() -> None:
    """Exit 7 asks for an upgrade, exit 5 for a repair."""
    data = encode_state(MasterState())
    with pytest.raises(LogTooNew):
        decode_state(data[:8] + struct.pack("<HH", 2, 1) + data[12:])
    with pytest.raises(LogTooNew):
        decode_state(data[:8] + struct.pack("<HH", 1, 99) + data[12:])
    for damaged in (b"", b"JRSTAT", data[:-1], b"X" + data[1:], data[:12] + b"\x90"):
        with pytest.raises(CorruptData):
            decode_state(damaged)


# --- what this version wrote, kept for later ones ---------------------------------------------------------------------


def write_fixture() -> None:
    """Run by hand when a log of a new version is to be kept: python -m tests.simulation.test_snapshot_replay."""
    shutil.rmtree(FIXTURE, ignore_errors=True)
    member = MemberId("m1")
    members = (Member(member, 0, "127.0.0.1:1"),)
    settings = RaftSettings(segment_bytes_max=40_000)
    init_store(str(FIXTURE), cluster_id="c", member=member, slot=0, members=members)
    entries = [data for part in (entries_of_jobs(2), entries_of_locks(2, level=1)) for data in part]
    store = Store.open(str(FIXTURE), settings)
    state = MasterState()
    for index, data in enumerate(entries, 2):
        store.write(Save(HardState(2, member, index - 1), (Entry(index, 2, EntryKind.DATA, data),)))
        replay(state, [data])
        if index == len(entries) // 2:
            (FIXTURE / f"{index}.state").write_bytes(encode_state(state))
    store.sync()
    store.close()
    (FIXTURE / "lock").unlink()
    (FIXTURE / "final.sha256").write_text(hashlib.sha256(encode_state(state)).hexdigest() + "\n")


def test_an_old_log_and_its_snapshot_lead_to_the_state_they_led_to(tmp_path: Path) -> None:
    """A version that reads its own logs only would lose a cluster at the first upgrade."""
    directory = tmp_path / "log"
    shutil.copytree(FIXTURE, directory)
    store = Store.open(str(directory), RaftSettings())
    last = store.log.last_index
    entries: list[Entry] = []
    while len(entries) < last:
        entries += store.read(len(entries) + 1, last, 1 << 30)
    store.close()
    (snapshot,) = FIXTURE.glob("*.state")
    point = int(snapshot.stem)
    restored, whole = decode_state(snapshot.read_bytes()), MasterState()
    replay(restored, [entry.data for entry in entries[point:] if entry.kind == EntryKind.DATA])
    replay(whole, [entry.data for entry in entries if entry.kind == EntryKind.DATA])
    restored.service.names.granted.clear()
    whole.service.names.granted.clear()
    assert state_bytes(restored) == state_bytes(whole)
    assert encode_state(restored) == encode_state(whole)
    assert hashlib.sha256(encode_state(whole)).hexdigest() == (FIXTURE / "final.sha256").read_text().strip()


if __name__ == "__main__":
    write_fixture()
