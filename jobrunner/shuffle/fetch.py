"""Fetching: one reducer's share of every map output, as runs in map order. Runs in a slot process.

Outputs on this worker's own disk are read where they are; of every other worker one request asks for all its maps. Up
to fetch_bytes_max stay in memory, the rest goes to the attempt's scratch directory. Every byte is checked against the
checksum in the block's index, and every index against the digest that the masters recorded.
A worker that does not answer is asked again, fetch_retries_max times without any progress; what it says is missing or
is damaged is lost at once. Failures are the source's, never the reducer's: they end as LostOutput.
"""

import http.client
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from jobrunner.control.messages import LossKind, MapOutputs
from jobrunner.errors import CorruptData, Denied, JobrunnerError
from jobrunner.ids import AttemptId, JobId, StageName, Token
from jobrunner.shuffle.blocks import PIECE_BYTES, block_path, check_partition, read_index, read_partition_bytes
from jobrunner.shuffle.exchange import HEADER, MAPS_MAX, PATH, BlocksRequest, Status
from jobrunner.shuffle.limits import ShuffleLimits
from jobrunner.shuffle.runs import BytesRun, FileRun, Run

_STREAMS_MAX = 4  # Workers asked at once.
_BACKOFF_S, _BACKOFF_S_MAX = 0.05, 1.0
_DAMAGED_MAX = 2  # Times that bytes may come with a wrong checksum: once may be the way, twice is the file.


class LostOutput(JobrunnerError):
    """Map outputs that cannot be read, all for the same reason."""

    def __init__(self, lost: Sequence[AttemptId], kind: LossKind, message: str) -> None:
        super().__init__(f"{len(lost)} map outputs {kind}: {message}")
        self.lost = tuple(lost)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Fetched:
    """Runs in map order, and the sum modulo 2^64 of the digests of the outputs they are of."""

    runs: list[Run]
    consumed: int


@dataclass(frozen=True, slots=True)
class _Lost:
    """Why one map's output is lost."""

    kind: LossKind
    message: str


class _Budget:
    """Bytes that may still be kept in memory."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True


@dataclass(slots=True)
class _Fetch:
    """What the sources of one fetch share."""

    outputs: MapOutputs
    reducer: int
    job: JobId
    stage: StageName
    limits: ShuffleLimits
    scratch: Path
    cluster_token: str
    progress: Callable[[], None]
    budget: _Budget
    runs: list[Run | None]
    lost: dict[int, _Lost] = field(default_factory=dict)

    def attempt(self, number: int) -> AttemptId:
        return AttemptId(self.job, self.stage, number, self.outputs.attempt[number])


def fetch_runs(
    outputs: MapOutputs,
    reducer: int,
    *,
    own_directory: str,
    blocks_root: Path,
    job: JobId,
    stage: StageName,
    cluster_token: str,
    plan: ShuffleLimits,
    scratch: Path,
    progress: Callable[[], None] = lambda: None,
) -> Fetched:
    """Runs of `reducer` from all map outputs of `stage`. Fetched bytes may be in `scratch` until the runs were read.

    `progress` is called whenever bytes arrived, from any thread. Raises LostOutput, Denied, OSError of the own disk.
    """
    count = len(outputs.owner)
    fetch = _Fetch(
        outputs,
        reducer,
        job,
        stage,
        plan,
        scratch,
        cluster_token,
        progress,
        _Budget(plan.fetch_bytes_max),
        [None] * count,
    )
    remote: dict[int, list[int]] = {}
    for number, owner in enumerate(outputs.owner):
        if outputs.owners[owner].directory == own_directory:
            _fetch_local(fetch, number, blocks_root)
        else:
            remote.setdefault(owner, []).append(number)
    _raise_lost(fetch)  # Before anything is asked of others.
    if len(remote) == 1:
        for owner, numbers in remote.items():
            _Source(fetch, owner).fetch(numbers)
    elif remote:
        with ThreadPoolExecutor(min(_STREAMS_MAX, len(remote)), "fetch") as pool:
            list(pool.map(lambda item: _Source(fetch, item[0]).fetch(item[1]), remote.items()))
    _raise_lost(fetch)
    runs = [run for run in fetch.runs if run is not None]
    assert len(runs) == count
    return Fetched(runs, sum(outputs.digest) & ((1 << 64) - 1))


def _raise_lost(fetch: _Fetch) -> None:
    """Raise LostOutput for the maps that are surely lost, or else for those out of reach."""
    for kind in (LossKind.MISSING, LossKind.CORRUPT, LossKind.UNREACHABLE):
        numbers = sorted(number for number, lost in fetch.lost.items() if lost.kind is kind)
        if numbers:
            raise LostOutput([fetch.attempt(number) for number in numbers], kind, fetch.lost[numbers[0]].message)


def _fetch_local(fetch: _Fetch, number: int, root: Path) -> None:
    token = Token(fetch.outputs.token[number])
    path = block_path(root, fetch.attempt(number), token)
    try:
        index = read_index(path)
        if index.digest != fetch.outputs.digest[number]:
            raise CorruptData(f"{path}: its digest is not the recorded one", path=str(path))
        length = index.lengths[fetch.reducer]
        if length == 0 or fetch.budget.take(length):
            fetch.runs[number] = BytesRun(read_partition_bytes(path, fetch.reducer, index), str(path))
        else:
            check_partition(path, index, fetch.reducer)
            fetch.runs[number] = FileRun(path, index.offsets[fetch.reducer], length)
        fetch.progress()
    except FileNotFoundError:
        fetch.lost[number] = _Lost(LossKind.MISSING, f"{path} is not there")
    except (CorruptData, IndexError) as error:
        fetch.lost[number] = _Lost(LossKind.CORRUPT, str(error))


class _Source:
    """Another worker, asked for all its maps over one connection at a time."""

    def __init__(self, fetch: _Fetch, owner: int) -> None:
        self._fetch = fetch
        self._owner = owner
        self._address = fetch.outputs.owners[owner].address
        self._damaged: dict[int, int] = {}
        self._spill = fetch.scratch / f"fetch-{owner}.run"

    def fetch(self, numbers: list[int]) -> None:
        """Fill in the runs of these maps, or say what is lost."""
        tries, reason = 0, ""
        todo = numbers
        while todo:
            if tries >= self._fetch.limits.fetch_retries_max:
                for number in todo:
                    self._fetch.lost[number] = _Lost(LossKind.UNREACHABLE, f"{self._address}: {reason}")
                return
            if tries:
                time.sleep(min(_BACKOFF_S * 2 ** (tries - 1), _BACKOFF_S_MAX))
            tries += 1
            try:
                self._ask(todo[:MAPS_MAX])
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            left = [number for number in todo if self._fetch.runs[number] is None and number not in self._fetch.lost]
            if len(left) < len(todo):
                tries = 0
            todo = left

    def _ask(self, numbers: list[int]) -> None:
        """One request; takes what comes. Raises OSError, HTTPException."""
        fetch = self._fetch
        host, _, port = self._address.rpartition(":")
        connection = http.client.HTTPConnection(
            host.strip("[]"), int(port), timeout=fetch.limits.fetch_timeout_ms / 1000, blocksize=PIECE_BYTES
        )
        try:
            maps = [(number, fetch.outputs.attempt[number], fetch.outputs.token[number]) for number in numbers]
            body = msgspec.msgpack.encode(BlocksRequest(fetch.job, fetch.stage, fetch.reducer, maps))
            connection.request("POST", PATH, body, {"Authorization": f"Bearer {fetch.cluster_token}"})
            response = connection.getresponse()
            if response.status in (401, 403):
                raise Denied(f"{self._address}: {response.status} {response.reason}", address=self._address)
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status} {response.reason}")
            for number in numbers:
                self._take(response, number)
        finally:
            connection.close()

    def _take(self, response: http.client.HTTPResponse, number: int) -> None:
        """The frame of one map."""
        partition, status, length, checksum, digest = HEADER.unpack(b"".join(_exactly(response, HEADER.size)))
        if partition != number:
            raise http.client.HTTPException(f"asked for map {number}, got {partition}")
        fetch = self._fetch
        if status != Status.OK:
            kind = LossKind.MISSING if status == Status.MISSING else LossKind.CORRUPT
            fetch.lost[number] = _Lost(kind, f"{self._address} has no whole output of map {number}")
            return
        run, found = self._keep(response, length)
        fetch.progress()
        if digest != fetch.outputs.digest[number]:
            fetch.lost[number] = _Lost(LossKind.CORRUPT, f"{self._address}: map {number} is not the recorded output")
        elif found == checksum:
            fetch.runs[number] = run
        else:
            self._damaged[number] = self._damaged.get(number, 0) + 1
            if self._damaged[number] >= _DAMAGED_MAX:
                fetch.lost[number] = _Lost(LossKind.CORRUPT, f"{self._address}: map {number} has a wrong checksum")

    def _keep(self, response: http.client.HTTPResponse, length: int) -> tuple[Run, int]:
        """A partition's bytes as a run, in memory or on disk, and their checksum."""
        checksum = 0
        if length == 0 or self._fetch.budget.take(length):
            parts = []
            for data in _exactly(response, length):
                checksum = zlib.crc32(data, checksum)
                parts.append(data)
            return BytesRun(b"".join(parts), self._address), checksum
        with open(self._spill, "ab") as file:
            offset = file.tell()
            for data in _exactly(response, length):
                checksum = zlib.crc32(data, checksum)
                file.write(data)
                self._fetch.progress()
        return FileRun(self._spill, offset, length), checksum


def _exactly(response: http.client.HTTPResponse, count: int) -> Iterator[bytes]:
    """`count` bytes in pieces. Raises IncompleteRead if the answer ends before."""
    while count:
        data = response.read(min(count, PIECE_BYTES))
        if not data:
            raise http.client.IncompleteRead(b"", count)
        count -= len(data)
        yield data
