"""A member's directory: who it is, and its durable log in segment files.

    DIR/member.json    {"cluster_id", "member", "slot"}: written once by `init_store`, after the log
    DIR/00000001.log   segments, numbered without gaps; format in segment.py
    DIR/lock           held while a process has the directory open

One save of the engine is one frame: one write, one sync. A conflicting suffix is overridden by later frames, never
rewritten. A full segment is followed by a new one, which begins with a frame of the term, vote and commit, so that
older ones can be unlinked whole. What a snapshot (snapshots.py) covers may be gone from the log.

Crash cases, by step:
- in a frame's write, or before its sync: the torn tail is cut at the next open; nothing that depended on it was sent;
- between a new segment's creation and its name: a `.tmp` file, removed at the next open;
- between unlinking old segments: oldest first, each made durable before the next, so the rest has no gap;
- in `install`: the snapshot is there, and the log ends before it or contradicts it: the log is dropped at the next
  open; or the new segment is there, which begins after the snapshot, and the old ones too: they are dropped then;
- in `init_store`: no member.json, so the directory is refused until `init_store` runs again.
A process that was killed may leave bytes that its successor reads but that are not durable: `open` syncs all it read,
and the directory, before anything is said to anybody.

After a failed write or sync the kernel may drop the pages and call the next sync a success (Rebello et al., Can
Applications Recover from fsync Failures?, ATC 2020): StorageFailed is final, and the store refuses all further work.
"""

import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Lock

import msgspec

from jobrunner.errors import CorruptData, SpecError, StorageFailed
from jobrunner.ids import MemberId
from jobrunner.raft.files import TEMPORARY, File, Files, RealFiles, write_whole
from jobrunner.raft.log import Log
from jobrunner.raft.messages import Entry, Member, first_entry
from jobrunner.raft.ready import HardState, Save
from jobrunner.raft.segment import (
    FRAME_BYTES,
    HEADER_BYTES,
    Frame,
    Header,
    check_frame,
    decode_header,
    decode_payload,
    encode_frame,
    encode_header,
    read_frames,
)
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Snapshot
from jobrunner.raft.snapshots import StoredSnapshot, newest_snapshot, write_snapshot

logger = logging.getLogger(__name__)

MEMBER_FILE = "member.json"
LOCK_FILE = "lock"
SUFFIX = ".log"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of member.json."""

    cluster_id: str
    member: MemberId
    slot: int


@dataclass(slots=True)
class _Segment:
    number: int
    path: str
    file: File
    header: Header
    size: int
    last_index: int = 0  # Highest entry here that no later frame replaced.


class _FrameIndex:
    """Where each entry is: parallel arrays, 28 bytes a frame, in order of first index."""

    def __init__(self) -> None:
        self.firsts = array("Q")
        self.numbers = array("I")
        self.offsets = array("Q")
        self.lengths = array("Q")

    def add(self, first: int, number: int, offset: int, length: int) -> None:
        """A frame whose entries replace all at and after `first`."""
        keep = len(self.firsts)
        while keep and self.firsts[keep - 1] >= first:
            keep -= 1
        for column, value in zip(self._columns(), (first, number, offset, length), strict=True):
            del column[keep:]
            column.append(value)

    def drop_segment(self, number: int) -> None:
        keep = 0
        while keep < len(self.numbers) and self.numbers[keep] <= number:
            keep += 1
        for column in self._columns():
            del column[:keep]

    def _columns(self) -> "tuple[array[int], array[int], array[int], array[int]]":
        return self.firsts, self.numbers, self.offsets, self.lengths


def init_store(
    directory: str,
    *,
    cluster_id: str,
    member: MemberId,
    slot: int,
    members: tuple[Member, ...],
    files: Files | None = None,
) -> None:
    """Make `directory` a new member of a new group: its log holds the members, its member.json who it is. Durable.

    Raises SpecError if it is a member already. After a crash in the middle it may be called again.
    """
    files = files or RealFiles()
    assert any(one.id == member and one.slot == slot for one in members), (member, slot, members)
    with _storage_errors(directory):
        files.make_dir(directory)
        with closing(_lock(files, directory)):
            if MEMBER_FILE in files.list(directory):
                raise SpecError(f"{directory} is a master's directory already", directory=directory)
            head, header = encode_header(member, first_index=1, seed=0)
            frame, _ = encode_frame(Save(HardState(1, None, 1), (first_entry(members),)), header, 0)
            write_whole(files, _segment_path(directory, 1), head + frame)
            identity = Identity(cluster_id, member, slot)
            write_whole(files, os.path.join(directory, MEMBER_FILE), msgspec.json.encode(identity) + b"\n")
            files.sync_dir(os.path.dirname(os.path.abspath(directory)))


def read_identity(directory: str, files: Files | None = None) -> Identity:
    """Who the member in `directory` is. Raises CorruptData if nobody."""
    files = files or RealFiles()
    path = os.path.join(directory, MEMBER_FILE)
    try:
        with closing(files.open(path)) as file:
            return msgspec.json.decode(file.read(0, file.size()), type=Identity)
    except FileNotFoundError:
        raise CorruptData(
            f"{directory} has no {MEMBER_FILE}: a master without its memory would vote again with an empty one",
            path=path,
        ) from None
    except msgspec.MsgspecError as error:
        raise CorruptData(f"{path} is damaged: {error}", path=path) from None
    except OSError as error:
        raise StorageFailed(f"{path}: {error}", path=path) from error


class Store:
    """One open directory. `write` and `sync` belong to one thread; `read` may be called from another."""

    def __init__(self, directory: str, identity: Identity, settings: RaftSettings, files: Files, lock: File) -> None:
        self.directory = directory
        self.identity = identity
        self.state = HardState(0, None, 0)  # As last written.
        self.log = Log(read_older=self.read, cache_bytes_max=settings.cache_bytes_max)  # As opened; then the engine's.
        self.snapshot: StoredSnapshot | None = None  # As opened.
        self._settings = settings
        self._files = files
        self._lock_file = lock
        self._segments: list[_Segment] = []
        self._frames = _FrameIndex()
        self._frames_lock = Lock()
        self._snapshots_lock = Lock()  # One removes what is older: another's, perhaps, that is being made.
        self._seed = 0
        self._next_index = 1
        self._failed: BaseException | None = None

    @classmethod
    def open(cls, directory: str, settings: RaftSettings, files: Files | None = None) -> "Store":
        """Read and check the whole log, mend a torn tail, sync what was read.

        Raises SpecError if another process has the directory, CorruptData if the directory is not what it was,
        LogTooNew, StorageFailed.
        """
        files = files or RealFiles()
        identity = read_identity(directory, files)
        with _storage_errors(directory):
            lock = _lock(files, directory)
            store = cls(directory, identity, settings, files, lock)
            try:
                store._load()
            except BaseException:
                store.close()
                raise
            return store

    def write(self, save: Save) -> None:
        """Append `save` as one frame; durable after `sync`. Raises StorageFailed, and then for ever."""
        with self._guard():
            if self._segments[-1].size >= self._settings.segment_bytes_max:
                self._rotate()
            frame, seed = encode_frame(save, self._segments[-1].header, self._seed)
            segment = self._segments[-1]
            segment.file.append(frame)
            self._note(segment, save, offset=segment.size, length=len(frame), check=seed)

    def sync(self) -> None:
        """Make all writes durable. Raises StorageFailed, and then for ever."""
        with self._guard():
            self._segments[-1].file.sync()

    def read(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries from `first` to at most `last`, up to `bytes_max` but at least one."""
        taken: list[Entry] = []
        while first <= last:
            with self._frames_lock:
                frames = self._frames
                place = bisect_right(frames.firsts, first) - 1
                assert place >= 0, (first, "is not stored")
                end = frames.firsts[place + 1] if place + 1 < len(frames.firsts) else self._next_index
                assert first < end, (first, "is not stored")
                segment = self._segments[frames.numbers[place] - self._segments[0].number]
                offset, length = frames.offsets[place], frames.lengths[place]
            for entry in self._read_frame(segment, offset, length).entries:
                if first <= entry.index < end and entry.index <= last:
                    bytes_max -= entry.size
                    if taken and bytes_max < 0:
                        return taken
                    taken.append(entry)
            first = end
        return taken

    def drop_prefix(self, index: int) -> None:
        """Unlink the segments that hold nothing after `index`, which nobody reads any more. The newest always stays.

        A log without its first segment can be opened only together with a snapshot that covers what is gone.
        """
        with self._guard():
            while len(self._segments) > 1 and self._segments[0].last_index <= index:
                self._drop_segments(self._segments[0].number)

    def save_snapshot(self, snapshot: Snapshot) -> StoredSnapshot:
        """Make a snapshot of this member's own durable. May run in a thread of its own; the log is not touched."""
        with _storage_errors(self.directory), self._snapshots_lock:
            return write_snapshot(self._files, self.directory, snapshot)

    def install(self, save: Save) -> StoredSnapshot:
        """Make the snapshot of another member durable, then begin the log anew after it. Durable on return."""
        snapshot = save.install
        assert snapshot is not None
        with self._guard():
            with self._snapshots_lock:
                stored = write_snapshot(self._files, self.directory, snapshot)
            self._begin_after(snapshot.index, save.state)
            return stored

    def _begin_after(self, index: int, state: HardState) -> None:
        """A new segment whose first entry is the one after `index`; then the older ones go."""
        last = self._segments[-1].number
        self.state, self._next_index = state, index + 1
        self._rotate()
        self._drop_segments(last)

    def _drop_segments(self, number: int) -> None:
        """Unlink the segments up to `number`, oldest first."""
        while self._segments[0].number <= number:
            segment = self._segments[0]
            with self._frames_lock:
                self._frames.drop_segment(segment.number)
                self._segments.pop(0)
            segment.file.close()
            self._files.unlink(segment.path)
            self._files.sync_dir(self.directory)

    def close(self) -> None:
        for segment in self._segments:
            segment.file.close()
        self._segments.clear()
        self._lock_file.close()

    # --- opening ---

    def _load(self) -> None:
        log = self.log
        numbers = self._list_segments()
        if not numbers:
            raise CorruptData(
                f"{self.directory} has no log: a master without its memory would vote again with an empty one",
                path=self.directory,
            )
        self._load_snapshot()
        if numbers[0] != 1 and self.snapshot is None:
            raise CorruptData(f"{_segment_path(self.directory, 1)} is missing", path=self.directory)
        for number in numbers:
            if number != numbers[0] + len(self._segments):
                raise CorruptData(f"{_segment_path(self.directory, number - 1)} is missing", path=self.directory)
            self._load_segment(log, number, is_last=number == numbers[-1])
        if log.last_index == 0:
            raise CorruptData(f"{self._segments[0].path}: the log is empty", path=self._segments[0].path)
        for segment in self._segments:
            segment.file.sync()
        self._files.sync_dir(self.directory)
        self._files.sync_dir(os.path.dirname(os.path.abspath(self.directory)))
        if self.snapshot is not None:
            self._fit(self.snapshot)

    def _load_snapshot(self) -> None:
        """If all are damaged the log alone may do, if it begins at the beginning."""
        try:
            self.snapshot = newest_snapshot(self._files, self.directory)
        except CorruptData:
            if self._list_segments()[0] != 1:
                raise

    def _fit(self, snapshot: StoredSnapshot) -> None:
        """The log must reach the snapshot, and agree with it; a crash in `install` may have left one that does not."""
        log = self.log
        if log.first_index > snapshot.index + 1:
            path = self._segments[0].path
            raise CorruptData(
                f"{path}: the log begins at {log.first_index}, the newest good snapshot ends at {snapshot.index}",
                path=path,
            )
        begun = next((one.number for one in reversed(self._segments) if one.header.first_index == log.first_index), 0)
        if log.first_index == snapshot.index + 1:
            log.know_before(snapshot.term)
        if begun > self._segments[0].number and log.first_index == snapshot.index + 1:
            self._drop_segments(begun - 1)
        if log.last_index < snapshot.index or log.term_at(snapshot.index) not in (None, snapshot.term):
            log.reset(snapshot.index, snapshot.term)
            state = self.state
            if state.term < snapshot.term:
                state = HardState(snapshot.term, None, 0)
            self._begin_after(snapshot.index, HardState(state.term, state.vote, snapshot.index))
        if self.state.commit < snapshot.index:
            self.state = HardState(self.state.term, self.state.vote, snapshot.index)

    def _list_segments(self) -> list[int]:
        numbers = []
        for name in self._files.list(self.directory):
            if name.endswith(TEMPORARY):
                self._files.unlink(os.path.join(self.directory, name))
            elif name.endswith(SUFFIX) and name.removesuffix(SUFFIX).isdigit():
                numbers.append(int(name.removesuffix(SUFFIX)))
        return sorted(numbers)

    def _load_segment(self, log: Log, number: int, *, is_last: bool) -> None:
        path = _segment_path(self.directory, number)
        file = self._files.open(path)
        try:
            data = file.read(0, file.size())
            header = decode_header(data, path)
            if header.member != self.identity.member:
                raise CorruptData(f"{path} belongs to member {header.member}, not {self.identity.member}", path=path)
            self._continue_in(header, path)
        except BaseException:
            file.close()
            raise
        segment = _Segment(number, path, file, header, HEADER_BYTES)
        self._segments.append(segment)
        for frame in read_frames(data, header, path=path, is_last=is_last):
            self._check(frame, log, path)
            if frame.save.entries:
                self._make_room(frame.save.entries[0].index)
            for entry in frame.save.entries:
                log.append(entry)
            log.mark_loaded()
            self._note(segment, frame.save, offset=frame.offset, length=frame.length, check=frame.check)
            log.shrink(log.last_index)
        if segment.size == HEADER_BYTES:
            raise CorruptData(f"{path}: the log segment holds no record", path=path, offset=HEADER_BYTES)
        if segment.size < len(data):
            logger.warning("%s: cut a torn record of %d bytes at its end", path, len(data) - segment.size)
            file.cut(segment.size)

    def _make_room(self, first: int) -> None:
        """Entries from `first` on follow: they replace what is there."""
        log = self.log
        if first < log.first_index:  # What these replaced was in a segment that is gone, and so is all before it.
            log.reset(first - 1, None)
        elif first <= log.last_index:
            log.truncate(first)

    def _continue_in(self, header: Header, path: str) -> None:
        """The segment follows the one before it, or is the first, or begins anew after an installed snapshot."""
        log, snapshot = self.log, self.snapshot
        after = snapshot is not None and header.first_index == snapshot.index + 1
        if snapshot is not None and not self._segments and header.first_index > 1:
            log.reset(header.first_index - 1, None)  # It may be one that an install has not yet removed.
        elif header.seed != self._seed or (header.first_index != self._next_index and not after):
            raise CorruptData(f"{path} does not continue the segment before it", path=path, offset=0)
        elif snapshot is not None and header.first_index != self._next_index:
            log.reset(snapshot.index, snapshot.term)
        self._seed, self._next_index = header.seed, header.first_index

    def _check(self, frame: Frame, log: Log, path: str) -> None:
        """Records that no correct member writes in this order are damage, however whole each is."""
        state, before = frame.save.state, self.state
        wrong = ""
        index, term = self._next_index - 1, 0
        if frame.save.entries:
            index = min(index, frame.save.entries[0].index - 1)
            term = log.term_at(index) or 0
        for entry in frame.save.entries:
            if entry.index != index + 1 or entry.index <= before.commit or not term <= entry.term <= state.term:
                wrong = f"entry {entry} cannot follow {term}/{index}"
            index, term = entry.index, entry.term
        if state.term < before.term or (state.term == before.term and before.vote not in (None, state.vote)):
            wrong = f"term {state.term} vote {state.vote} cannot follow term {before.term} vote {before.vote}"
        if not before.commit <= state.commit <= index:
            wrong = f"commit {state.commit} cannot follow {before.commit} in a log of {index}"
        if wrong:
            raise CorruptData(f"{path}: record at offset {frame.offset}: {wrong}", path=path, offset=frame.offset)

    # --- writing ---

    def _rotate(self) -> None:
        """Begin a new segment. The full one is durable: every write is followed by a sync before the next."""
        number = self._segments[-1].number + 1
        path = _segment_path(self.directory, number)
        head, header = encode_header(self.identity.member, first_index=self._next_index, seed=self._seed)
        state = Save(self.state, ())
        frame, check = encode_frame(state, header, self._seed)
        write_whole(self._files, path, head + frame)
        segment = _Segment(number, path, self._files.open(path), header, HEADER_BYTES)
        with self._frames_lock:
            self._segments.append(segment)
        self._note(segment, state, offset=HEADER_BYTES, length=len(frame), check=check)

    def _note(self, segment: _Segment, save: Save, *, offset: int, length: int, check: int) -> None:
        """A frame is in the file: remember where its entries are, and what they replace."""
        self.state = save.state
        self._seed = check
        segment.size = offset + length
        if not save.entries:
            return
        first = save.entries[0].index
        with self._frames_lock:
            if first < self._next_index:
                for earlier in self._segments:
                    earlier.last_index = min(earlier.last_index, first - 1)
            self._frames.add(first, segment.number, offset, length)
            self._next_index = save.entries[-1].index + 1
            segment.last_index = self._next_index - 1

    def _read_frame(self, segment: _Segment, offset: int, length: int) -> Save:
        with _storage_errors(segment.path):
            data = segment.file.read(offset, length)
        if check_frame(data, 0, segment.header) != length:
            raise CorruptData(f"{segment.path}: damaged record at offset {offset}", path=segment.path, offset=offset)
        return decode_payload(data[FRAME_BYTES:], segment.path, offset)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        if self._failed is not None:
            raise StorageFailed(f"{self.directory}: an earlier write failed: {self._failed}") from self._failed
        try:
            with _storage_errors(self.directory):
                yield
        except BaseException as error:
            self._failed = error
            raise


def _segment_path(directory: str, number: int) -> str:
    return os.path.join(directory, f"{number:08d}{SUFFIX}")


def _lock(files: Files, directory: str) -> File:
    try:
        return files.lock(os.path.join(directory, LOCK_FILE))
    except BlockingIOError:
        raise SpecError(f"{directory} is in use by another process", directory=directory) from None


@contextmanager
def _storage_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{place}: {error}", path=place) from error
