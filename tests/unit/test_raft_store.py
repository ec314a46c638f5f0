"""The durable log: what a crash may leave, what is damage, and that nothing synced is lost.

Every test that can runs on the real file system and on the simulated disk: the fake passes the tests of the real thing.
"""

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from jobrunner.errors import CorruptData, LogTooNew, SpecError, StorageFailed
from jobrunner.ids import MemberId
from jobrunner.raft.files import Files, RealFiles
from jobrunner.raft.messages import Entry, EntryKind, Member
from jobrunner.raft.ready import HardState, Save
from jobrunner.raft.segment import HEADER_BYTES
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.store import Store, init_store, read_identity
from tests.simulation.faulty_files import FaultyDisk, FaultyFiles

SETTINGS = RaftSettings(segment_bytes_max=1 << 20)
SMALL = replace(SETTINGS, segment_bytes_max=200)
MEMBER = MemberId("a" * 32)
MEMBERS = (Member(MEMBER, 1, "h1:1"), Member(MemberId("b" * 32), 2, "h2:1"))


def data(index: int, term: int = 1, text: bytes = b"") -> Entry:
    return Entry(index, term, EntryKind.DATA, text or b"entry %d" % index)


def save(*entries: Entry, term: int = 1, vote: MemberId | None = None, commit: int = 1) -> Save:
    return Save(HardState(max([term, *(entry.term for entry in entries)]), vote, commit), entries)


def write_and_sync(store: Store, one: Save) -> None:
    store.write(one)
    store.sync()


def contents(store: Store) -> list[Entry]:
    log = store.log
    return log.slice(1, log.last_index, 1 << 30)


class Disk:
    """One directory, on either kind of file system."""

    def __init__(self, directory: str, files: Files) -> None:
        self.directory, self.files = directory, files

    def init(self) -> None:
        init_store(self.directory, cluster_id="c", member=MEMBER, slot=1, members=MEMBERS, files=self.files)

    def open(self, settings: RaftSettings = SETTINGS) -> Store:
        return Store.open(self.directory, settings, self.files)

    def path(self, number: int) -> str:
        return os.path.join(self.directory, f"{number:08d}.log")

    def bytes_of(self, path: str) -> bytes:
        file = self.files.open(path)
        content = file.read(0, file.size())
        file.close()
        return content

    def put(self, path: str, content: bytes) -> None:
        file = self.files.create(path)
        file.append(content)
        file.sync()
        file.close()

    def write(self, *saves: Save, settings: RaftSettings = SETTINGS) -> None:
        store = self.open(settings)
        for one in saves:
            store.write(one)
            store.sync()
        store.close()

    def reopen(self, settings: RaftSettings = SETTINGS) -> tuple[list[Entry], HardState]:
        store = self.open(settings)
        try:
            return contents(store), store.state
        finally:
            store.close()


@pytest.fixture(params=["real", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    files: Files = RealFiles() if request.param == "real" else FaultyFiles(FaultyDisk(Random(1)))
    made = Disk(str(tmp_path / "master-1"), files)
    made.init()
    return made


# --- what is kept ---


def test_a_new_member_begins_with_the_members_committed(disk: Disk) -> None:
    """The group's identity is the first entry: whoever lacks it cannot count a quorum."""
    entries, state = disk.reopen()
    assert [entry.kind for entry in entries] == [EntryKind.CONFIG]
    assert state == HardState(1, None, 1)
    identity = read_identity(disk.directory, disk.files)
    assert (identity.cluster_id, identity.member, identity.slot) == ("c", MEMBER, 1)


def test_everything_written_is_read_again(disk: Disk) -> None:
    """Term, vote, commit and entries of one save are one record."""
    disk.write(save(data(2), data(3)), save(term=4, vote=MEMBER), save(data(4, 4), term=4, vote=MEMBER, commit=3))
    entries, state = disk.reopen()
    assert [entry.data for entry in entries[1:]] == [b"entry 2", b"entry 3", b"entry 4"]
    assert state == HardState(4, MEMBER, 3)


def test_a_conflicting_suffix_is_overridden_and_its_ghosts_never_reappear(disk: Disk) -> None:
    """T35: the old entries lie in the file, whole and with a valid checksum."""
    old = [data(index, 1, b"ghost") for index in range(2, 8)]
    disk.write(save(*old), save(data(3, 2)), save(data(4, 2)))
    for _ in range(2):
        entries, _ = disk.reopen()
        assert [(entry.index, entry.term) for entry in entries] == [(1, 1), (2, 1), (3, 2), (4, 2)]
        assert b"ghost" not in [entry.data for entry in entries[2:]]


def test_full_segments_are_followed_by_new_ones(disk: Disk) -> None:
    """Old segments can only be deleted whole."""
    disk.write(*(save(data(index)) for index in range(2, 30)), settings=SMALL)
    assert len([name for name in disk.files.list(disk.directory) if name.endswith(".log")]) > 3
    entries, _ = disk.reopen(SMALL)
    assert [entry.index for entry in entries] == list(range(1, 30))


def test_entries_are_read_from_any_segment_also_after_an_override(disk: Disk) -> None:
    """A lagging follower needs what is no longer in memory, and never what was replaced."""
    saves = [save(data(index), data(index + 1)) for index in range(2, 30, 2)]
    disk.write(*saves, save(data(11, 2), data(12, 2)), save(data(13, 2)), settings=SMALL)
    for settings in (SMALL, replace(SMALL, cache_bytes_max=1)):
        store = disk.open(settings)
        read = store.read(2, 13, 1 << 20)
        assert [(entry.index, entry.term) for entry in read] == [(i, 1 if i < 11 else 2) for i in range(2, 14)]
        assert [entry.index for entry in store.read(10, 13, 1)] == [10]
        store.close()


def test_a_prefix_is_dropped_in_whole_segments(disk: Disk) -> None:
    """What some snapshot covers must go, and nothing else."""
    disk.write(*(save(data(index)) for index in range(2, 30)), settings=SMALL)
    store = disk.open(SMALL)
    before = disk.files.list(disk.directory)
    store.drop_prefix(15)
    assert len(disk.files.list(disk.directory)) < len(before)
    assert [entry.index for entry in store.read(16, 29, 1 << 20)] == list(range(16, 30))
    store.write(save(data(30)))
    store.sync()
    store.drop_prefix(1_000)
    assert len([name for name in disk.files.list(disk.directory) if name.endswith(".log")]) == 1
    store.close()
    with pytest.raises(CorruptData, match=r"00000001\.log is missing"):
        disk.open(SMALL)


# --- torn tails ---


def test_a_tail_torn_at_any_byte_is_cut_and_everything_before_it_is_kept(disk: Disk) -> None:
    """T30."""
    disk.write(save(data(2)), save(data(3), term=2, vote=MEMBER))
    whole = disk.bytes_of(disk.path(1))
    disk.write(save(data(4, 2), data(5, 2), term=2, vote=MEMBER))
    longer = disk.bytes_of(disk.path(1))
    for length in range(len(whole), len(longer)):
        disk.put(disk.path(1), longer[:length])
        entries, state = disk.reopen()
        assert [entry.index for entry in entries] == [1, 2, 3] and state == HardState(2, MEMBER, 1)
        assert disk.bytes_of(disk.path(1)) == whole
        disk.write(save(data(4, 3)))
        assert [(entry.index, entry.term) for entry in disk.reopen()[0]][3:] == [(4, 3)]


def test_a_tail_with_a_hole_is_torn(disk: Disk) -> None:
    """The size may be durable before the data is: a sector of zeros was never written."""
    disk.write(save(data(2)))
    whole = disk.bytes_of(disk.path(1))
    disk.write(save(data(3, 1, b"x" * 2_000)))
    longer = bytearray(disk.bytes_of(disk.path(1)))
    holes = [(len(whole), len(longer)), (1_024, 1_536), (len(whole), 512), (2_048, len(longer))]
    for begin, end in holes:
        torn = bytearray(longer)
        torn[begin:end] = bytes(end - begin)
        disk.put(disk.path(1), bytes(torn))
        assert [entry.index for entry in disk.reopen()[0]] == [1, 2]


def test_a_flipped_bit_anywhere_is_damage_and_is_never_mended(disk: Disk) -> None:
    """A member that forgets one synced entry without a word votes with a false memory; SQLite's -wal does that."""
    disk.write(save(data(2)), save(data(3)), save(data(4)))
    whole = disk.bytes_of(disk.path(1))
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 4
        disk.put(disk.path(1), bytes(damaged))
        with pytest.raises(CorruptData, match="offset") as error:
            disk.open()
        assert error.value.fields["path"] == disk.path(1) and error.value.fields["offset"] <= offset
        assert disk.bytes_of(disk.path(1)) == bytes(damaged)


def test_a_hole_before_a_whole_record_is_damage(disk: Disk) -> None:
    """Only the last write can be torn: what follows proves that this one was durable."""
    disk.write(save(data(2, 1, b"x" * 2_000)))
    disk.write(save(data(3)))
    content = bytearray(disk.bytes_of(disk.path(1)))
    content[1_024:1_536] = bytes(512)
    disk.put(disk.path(1), bytes(content))
    with pytest.raises(CorruptData):
        disk.open()


def test_a_torn_record_that_carries_another_members_log_is_torn(disk: Disk, tmp_path: Path) -> None:
    """Users' data may hold anything; a frame inside a payload is no proof that this one was durable."""
    other = Disk(str(tmp_path / "other"), disk.files)
    init_store(other.directory, cluster_id="c", member=MEMBERS[1].id, slot=2, members=MEMBERS, files=disk.files)
    disk.write(save(data(2)))
    disk.write(save(data(3, 1, other.bytes_of(other.path(1)))))
    content = disk.bytes_of(disk.path(1))
    disk.put(disk.path(1), content[:-3])
    assert [entry.index for entry in disk.reopen()[0]] == [1, 2]


@pytest.mark.parametrize("number", [1, 2])
def test_a_torn_record_in_an_older_segment_is_damage(disk: Disk, number: int) -> None:
    """An older segment was synced before the next was begun."""
    disk.write(*(save(data(index)) for index in range(2, 30)), settings=SMALL)
    content = disk.bytes_of(disk.path(number))
    disk.put(disk.path(number), content[:-1])
    with pytest.raises(CorruptData, match=f"{number:08d}.log"):
        disk.open(SMALL)


# --- damage of other kinds ---


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_segment_is_damage(disk: Disk, number: int) -> None:
    """Its entries were acknowledged."""
    disk.write(*(save(data(index)) for index in range(2, 40)), settings=SMALL)
    disk.files.unlink(disk.path(number))
    with pytest.raises(CorruptData, match=f"{number:08d}.log is missing"):
        disk.open(SMALL)


def test_a_segment_of_another_member_is_damage(disk: Disk, tmp_path: Path) -> None:
    """A file copied from a neighbour has its votes."""
    other = Disk(str(tmp_path / "other"), disk.files)
    init_store(other.directory, cluster_id="c", member=MEMBERS[1].id, slot=2, members=MEMBERS, files=disk.files)
    disk.put(disk.path(1), other.bytes_of(other.path(1)))
    with pytest.raises(CorruptData, match="belongs to member"):
        disk.open()


@pytest.mark.parametrize(
    "wrong",
    [
        save(data(9)),
        save(data(2, 1), data(4, 1)),
        save(data(1, 2)),
        save(term=1, commit=7),
        save(term=3, vote=MEMBERS[1].id),
        Save(HardState(3, MEMBER, 1), (data(4, 4),)),
        save(data(4, 1), term=2),
    ],
    ids=["gap", "gap inside", "committed", "commit beyond", "second vote", "term above", "term back"],
)
def test_records_that_no_correct_member_writes_are_damage(disk: Disk, wrong: Save) -> None:
    """Whole and in order, and still not the log of one member."""
    disk.write(save(data(2), data(3), term=3, vote=MEMBER))
    disk.write(wrong)
    with pytest.raises(CorruptData, match="cannot follow"):
        disk.open()


def test_a_directory_without_its_memory_is_refused(disk: Disk) -> None:
    """It would vote again with an empty one."""
    path = os.path.join(disk.directory, "member.json")
    identity = disk.bytes_of(path)
    disk.files.unlink(path)
    with pytest.raises(CorruptData, match="vote again with an empty one"):
        disk.open()
    disk.put(path, identity)
    disk.files.unlink(disk.path(1))
    with pytest.raises(CorruptData, match="vote again with an empty one"):
        disk.open()
    disk.put(path, b"{")
    with pytest.raises(CorruptData, match=r"member\.json is damaged"):
        disk.open()


def test_a_member_is_made_once(disk: Disk) -> None:
    """A second first entry would be another group with the same name."""
    with pytest.raises(SpecError, match="already"):
        disk.init()


def test_a_directory_is_held_by_one_process(disk: Disk) -> None:
    """Two writers of one log are two members with one vote."""
    store = disk.open()
    with pytest.raises(SpecError, match="in use") as error:
        disk.open()
    assert disk.directory in str(error.value)
    store.close()
    disk.open().close()


def test_a_newer_log_is_left_alone(disk: Disk) -> None:
    """An older program would misread it, and might call it damaged."""
    content = bytearray(disk.bytes_of(disk.path(1)))
    struct.pack_into("<H", content, 6, 2)
    struct.pack_into("<I", content, HEADER_BYTES - 4, zlib.crc32(bytes(content[: HEADER_BYTES - 4])))
    disk.put(disk.path(1), bytes(content))
    with pytest.raises(LogTooNew, match="version 2"):
        disk.open()


# --- crashes of the simulated disk ---


def crash_disk(seed: int, **fields: bool) -> tuple[FaultyDisk, Disk]:
    simulated = FaultyDisk(Random(seed), **fields)
    return simulated, Disk("/d", FaultyFiles(simulated))


@pytest.mark.parametrize("lose_all", [True, False])
def test_a_crash_between_any_two_steps_of_init_leaves_a_member_or_none(lose_all: bool) -> None:
    """Half a member must not vote; `init_store` can be called again."""
    for steps in range(1, 20):
        for seed in range(5):
            simulated, disk = crash_disk(seed, lose_all=lose_all)
            whole = not _init_until(simulated, steps)
            simulated.crash()
            try:
                disk.init()
            except SpecError:
                pass
            assert len(disk.reopen()[0]) == 1
            assert not whole or "member.json" in disk.files.list("/d")


def _init_until(simulated: FaultyDisk, steps: int) -> bool:
    """Initialise until the `steps`-th file operation; whether it was cut there."""

    class Cut(Exception):
        pass

    class Counting(FaultyFiles):
        left = steps

        def _count(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise Cut

        def create(self, path: str):  # type: ignore[no-untyped-def]
            self._count()
            return super().create(path)

        def rename(self, old: str, new: str) -> None:
            self._count()
            super().rename(old, new)

        def sync_dir(self, directory: str) -> None:
            self._count()
            super().sync_dir(directory)

    try:
        init_store("/d", cluster_id="c", member=MEMBER, slot=1, members=MEMBERS, files=Counting(simulated))
    except Cut:
        return True
    return False


@pytest.mark.parametrize("seed", range(60))
def test_a_power_cut_at_any_time_loses_nothing_that_was_synced(seed: int) -> None:
    """T30, T35 at random: overrides, segments, torn writes, holes, and the same again after each restart."""
    rng = Random(seed)
    simulated, disk = crash_disk(seed)
    disk.init()
    model = disk.reopen()[0]
    term = 1
    for _ in range(6):
        store = disk.open(SMALL)
        assert contents(store) == model
        for _ in range(rng.randint(0, 8)):
            term += rng.random() < 0.3
            first = rng.randint(max(2, len(model) - 2), len(model) + 1) if term > model[-1].term else len(model) + 1
            entries = tuple(
                data(index, term, bytes(rng.randint(0, 700)) + b"x")
                for index in range(first, first + rng.randint(1, 3))
            )
            last = save(*entries)
            store.write(last)
            if rng.random() < 0.2:
                simulated.crash()
                after = model_after(model, last)
                found = disk.reopen(SMALL)[0]
                assert found in (model, after)
                model = found
                break
            store.sync()
            model = model_after(model, last)
        else:
            simulated.crash()
            assert disk.reopen(SMALL)[0] == model
        term = max(term, model[-1].term)


def model_after(model: list[Entry], one: Save) -> list[Entry]:
    return [*model[: one.entries[0].index - 1], *one.entries]


def test_what_a_killed_process_left_is_synced_before_anything_is_said() -> None:
    """Its successor reads the bytes from the cache; a power cut could still take them back after a promise."""
    simulated, disk = crash_disk(1, lose_all=True)
    disk.init()
    store = disk.open()
    store.write(save(data(2)))
    simulated.kill()
    assert [entry.index for entry in disk.reopen()[0]] == [1, 2]
    simulated.crash()
    assert [entry.index for entry in disk.reopen()[0]] == [1, 2]


@pytest.mark.parametrize("fault", ["sync", "space"])
def test_a_failed_write_or_sync_is_final(fault: str) -> None:
    """Rebello et al. 2020: the next sync may succeed although the data is gone."""
    simulated, disk = crash_disk(1)
    disk.init()
    store = disk.open()
    simulated.fail_syncs = fault == "sync"
    simulated.bytes_free = 10 if fault == "space" else None
    with pytest.raises(StorageFailed):
        write_and_sync(store, save(data(2)))
    simulated.fail_syncs, simulated.bytes_free = False, None
    with pytest.raises(StorageFailed):
        store.sync()
    with pytest.raises(StorageFailed):
        store.write(save(data(2)))
    simulated.kill()
    disk.open().close()
