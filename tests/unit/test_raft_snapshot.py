"""Snapshots: the file, the store around them at every step of a crash, the log they shorten, and who is sent one."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from jobrunner.errors import CorruptData, LogTooNew
from jobrunner.ids import MemberId
from jobrunner.raft.messages import Entry, EntryKind, Member
from jobrunner.raft.ready import HardState, Save
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Incoming, Snapshot, decode_snapshot, encode_snapshot, piece_of
from jobrunner.raft.store import Store, init_store
from tests.scenarios.raft_group import load_log
from tests.simulation.faulty_files import FaultyDisk, FaultyFiles, PowerCut
from tests.unit.test_raft_driver import Group, add, until

ME = MemberId("m1")
MEMBERS = (Member(ME, 1, "h1:1"),)
SETTINGS = RaftSettings(segment_bytes_max=300)
SNAPSHOT = Snapshot(12, 2, MEMBERS, b"state" * 20)


def entry(index: int, term: int = 2) -> Entry:
    return Entry(index, term, EntryKind.DATA, b"%d" % index)


def new_store(disk: FaultyDisk, entries: int = 20, *, commit: int = 99) -> Store:
    init_store("/d", cluster_id="c", member=ME, slot=1, members=MEMBERS, files=FaultyFiles(disk))
    store = Store.open("/d", SETTINGS, FaultyFiles(disk))
    for index in range(2, entries + 1):
        store.write(Save(HardState(2, ME, min(index - 1, commit)), (entry(index),)))
        store.sync()
    return store


def reopen(disk: FaultyDisk) -> Store:
    disk.crash()
    return Store.open("/d", SETTINGS, FaultyFiles(disk))


def test_any_changed_or_missing_byte_of_a_snapshot_is_seen() -> None:
    """A damaged state would be applied on, and spread."""
    data = encode_snapshot(SNAPSHOT)
    assert decode_snapshot(data, "x") == SNAPSHOT
    for place in range(len(data)):
        with pytest.raises((CorruptData, LogTooNew)):
            decode_snapshot(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :], "x")
        with pytest.raises(CorruptData):
            decode_snapshot(data[:place], "x")


class Bytes:
    index, term = SNAPSHOT.index, SNAPSHOT.term

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def test_a_snapshot_arrives_in_pieces_and_damage_starts_it_again() -> None:
    """A piece that is lost, doubled or changed must not end up in the state."""
    source = Bytes(encode_snapshot(SNAPSHOT))
    first = piece_of(source, term=3, offset=0, bytes_max=30)
    incoming = Incoming(first.index, first.snapshot_term, first.size)
    assert incoming.add(first) is None and len(incoming.data) == 30
    assert incoming.add(first) is None and len(incoming.data) == 30  # Doubled.
    late = piece_of(source, term=3, offset=60, bytes_max=30)
    assert incoming.add(late) is None and len(incoming.data) == 30  # One is missing.
    found = None
    while found is None:
        found = incoming.add(piece_of(source, term=3, offset=len(incoming.data), bytes_max=30))
    assert found == SNAPSHOT
    wrong = Bytes(source.data[:-1] + b"!")
    incoming = Incoming(first.index, first.snapshot_term, first.size)
    assert incoming.add(piece_of(wrong, term=3, offset=0, bytes_max=1000)) is None and not incoming.data


def test_a_log_remembers_the_term_before_its_first_entry() -> None:
    """The next append must still match there, or every follower would need a snapshot."""
    log = load_log([entry(index, 1 + index // 5) for index in range(1, 21)])
    log.compact(12)
    assert (log.first_index, log.term_at(12), log.term_at(11), log.term_at(13)) == (13, 3, None, 3)
    assert log.matches(12, 3) and log.conflict_hint(20, 3) == (14, 3)
    assert log.conflict_hint(14, 2) == (0, 0)
    log.compact(20)
    assert (log.first_index, log.last_index, log.last_term) == (21, 20, 5)
    assert log.conflict_hint(30, 9) == (20, 5)
    log.append(entry(21, 6))
    log.reset(40, 7)
    assert (log.first_index, log.last_index, log.last_term, log.term_at(40)) == (41, 40, 7, 7)


def test_a_crash_at_any_step_of_a_snapshot_leaves_a_log_that_opens() -> None:
    """T37: whichever file operation is the last, nothing that was synced is gone."""
    for lose_all in (False, True):
        for step in range(40):
            disk = FaultyDisk(Random(step), lose_all=lose_all)
            store = new_store(disk)
            disk.operations_left = step
            done = False
            try:
                store.save_snapshot(SNAPSHOT)
                store.drop_prefix(SNAPSHOT.index)
                done = True
            except PowerCut:
                pass
            disk.operations_left = None
            found = reopen(disk)
            log = found.log
            assert log.last_index == 20 and log.term_at(20) == 2
            assert found.snapshot is not None or log.first_index == 1
            assert log.first_index <= SNAPSHOT.index + 1
            if found.snapshot is not None:
                assert found.snapshot.data() == SNAPSHOT.data and found.state.commit >= SNAPSHOT.index
            first = log.first_index
            assert [one.index for one in found.read(first, 20, 1 << 20)] == list(range(first, 21))
            if done:
                assert first > 1
                assert found.snapshot is not None
                break
        else:
            pytest.fail("the steps did not end")


@pytest.mark.parametrize("entries", [5, 20])
def test_a_crash_at_any_step_of_an_install_leaves_the_old_or_the_new(entries: int) -> None:
    """The follower has acknowledged neither, so both are right; a mixture is not."""
    snapshot = Snapshot(14, 3, MEMBERS, b"new")
    for lose_all in (False, True):
        for step in range(60):
            disk = FaultyDisk(Random(step), lose_all=lose_all)
            store = new_store(disk, entries, commit=4)
            disk.operations_left = step
            done = False
            try:
                store.install(Save(HardState(3, None, 14), (), snapshot))
                store.write(Save(HardState(3, None, 14), (entry(15, 3),)))
                store.sync()
                done = True
            except PowerCut:
                pass
            disk.operations_left = None
            found = reopen(disk)
            if found.snapshot is None:
                assert (found.log.first_index, found.log.last_index, found.state.term) == (1, entries, 2) and not done
            else:
                assert (found.log.first_index, found.log.term_at(14)) == (15, 3)
                assert found.log.last_index in ((15,) if done else (14, 15))
            again = reopen(disk)
            assert (again.log.first_index, again.log.last_index) == (found.log.first_index, found.log.last_index)
            last = again.log.last_index
            again.write(Save(HardState(4, None, last), (entry(last + 1, 4),)))
            again.sync()
            assert reopen(disk).log.term_at(last + 1) == 4
            if done:
                break
        else:
            pytest.fail("the steps did not end")


def test_a_gap_between_snapshot_and_log_is_refused() -> None:
    """hashicorp/raft#85: starting from an older snapshot with a shortened log forgets what was committed."""
    disk = FaultyDisk(Random(1))
    store = new_store(disk)
    store.save_snapshot(SNAPSHOT)
    store.drop_prefix(SNAPSHOT.index)
    (name,) = (path for path in disk.names if path.endswith(".snapshot"))
    disk.flip_bit(name, 60)
    with pytest.raises(CorruptData, match="snapshot"):
        reopen(disk)
    disk.flip_bit(name, 60)
    older = Snapshot(3, 2, MEMBERS, b"old")
    disk.locked.clear()
    del disk.names[name]
    Store.save_snapshot(store, older)
    with pytest.raises(CorruptData, match="newest good snapshot ends at 3"):
        reopen(disk)


def test_a_damaged_snapshot_does_no_harm_while_the_log_is_whole() -> None:
    """The log says everything that the snapshot said."""
    disk = FaultyDisk(Random(1))
    new_store(disk).save_snapshot(SNAPSHOT)
    (name,) = (path for path in disk.names if path.endswith(".snapshot"))
    disk.flip_bit(name, 60)
    found = reopen(disk)
    assert found.snapshot is None and found.log.last_index == 20


def test_drivers_snapshot_restart_and_send_their_state(tmp_path: Path) -> None:
    """T22: a follower that missed more than the log keeps gets the state; a restart begins from it."""
    settings = RaftSettings(
        heartbeat_ms=20, election_ms=150, segment_bytes_max=400, snapshot_entries=20, trailing_entries=5,
        snapshot_piece_bytes=40,
    )  # fmt: skip

    async def run() -> None:
        group = Group(tmp_path, 3, settings)
        try:
            for place, member in enumerate(group.members):
                await group.start(member.id, campaign=place == 0)
            leader = await group.leader()
            behind = next(member for member in group.drivers if member != leader.member)
            await group.kill(behind)
            leader = await group.leader()
            for _ in range(200):
                await leader.propose(add(1))
            await until(lambda: leader._engine.log.first_index > 100 or None)
            await group.start(behind)
            await until(lambda: group.machines[behind].total == 200 or None)
            assert len(group.machines[behind].applied) < 100
            other = leader.member
            await group.kill(other)
            await group.start(other)
            leader = await group.leader()
            assert await leader.propose(add(1)) == 201
            await until(lambda: all(machine.total == 201 for machine in group.machines.values()) or None)
            assert len(group.machines[other].applied) < 100 and not group.fatal
            assert len(list((tmp_path / other).glob("*.snapshot"))) == 1
            assert len(list((tmp_path / other).glob("*.log"))) < 10
        finally:
            for driver in group.drivers.values():
                await driver.stop()

    asyncio.run(run())
