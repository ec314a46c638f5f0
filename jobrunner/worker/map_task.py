"""A map attempt: its split's lines through the user's function, into a block file, or into final output.

    pieces ─► lines ─► map() ─► pairs ─┬─► MapOutputWriter ─► block file ─► MapDone
                                       └─► TextWriter ─► staged partition ─► Sealable     (a job without reduce)

The pairs of the whole split are one lazy stream: where the shuffle cuts it depends on the pairs alone, never on time.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, filterfalse
from operator import is_, length_hint
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from jobrunner.commit.backends import PosixCommit
from jobrunner.commit.names import part_name
from jobrunner.control.messages import InputPlace, MapDone, Sealable
from jobrunner.failpoints import failpoint
from jobrunner.planner.code import StepCode
from jobrunner.planner.plan import JobPlan, Piece
from jobrunner.shuffle.blocks import block_path
from jobrunner.shuffle.buffer import BadPair, chunks
from jobrunner.shuffle.keys import UnsupportedKey
from jobrunner.shuffle.reducers import BadValue, Count, Ready
from jobrunner.shuffle.tables import table_pairs
from jobrunner.shuffle.writer import MapOutputWriter
from jobrunner.storage.batches import BatchReader
from jobrunner.storage.filesystem import is_local, local_path
from jobrunner.storage.readers import BadInput, LineReader
from jobrunner.storage.writers import BadOutput, TextWriter
from jobrunner.worker import wire
from jobrunner.worker.context import SplitInfo, Task, running
from jobrunner.worker.files import empty_directory
from jobrunner.worker.user_code import (
    Meter,
    PlacedError,
    UserFunction,
    blame,
    next_step,
    ready_combiner,
    ready_function,
)

Reader = TypeVar("Reader", bound=LineReader)

_BAD_OUTPUT = (UnsupportedKey, BadPair, BadValue, BadOutput)


def run_map(run: wire.Run, plan: JobPlan, code: StepCode, progress: Callable[[], None]) -> MapDone | Sealable:
    """Run one attempt to its end. Raises what user code raises, and what reading and writing raise."""
    failpoint("map.start")
    scratch = Path(run.scratch)
    task = Task(run.start.attempt, plan.params, str(scratch / "user"), on_progress=progress)
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    try:
        with running(task):
            if plan.shuffle.reducers:
                return _map_to_blocks(run, plan, code, task, scratch)
            return _map_to_output(run, plan, code, task)
    finally:
        empty_directory(run.scratch)


def _map_to_blocks(run: wire.Run, plan: JobPlan, code: StepCode, task: Task, scratch: Path) -> MapDone:
    attempt, token = run.start.attempt, run.start.token
    source = Mapped(plan, plan.splits[attempt.partition], ready_function(code.map), task)
    combine = code.reduce if isinstance(code.reduce, Ready) else ready_combiner(code.combine)
    writer = MapOutputWriter(
        scratch,
        block_path(Path(run.directory, "blocks"), attempt, token),
        attempt,
        token,
        plan.shuffle.reducers,
        plan.shuffle,
        combine,
        code.partition,
        sort_values=plan.shuffle.sort_values,
    )
    with source.placing(), blame(f"map function {source.function.name}", *_BAD_OUTPUT):
        if source.function.batch:
            for table in source.tables():
                source.emitted(writer.add_table(table))
        elif isinstance(combine, Count):
            _add_counted(writer, source.pairs())
        else:
            writer.add(source.pairs())
    task.progress()
    summary = writer.finish(source.counters)
    return MapDone(attempt, token, summary.digest, summary.rows, summary.bytes, source.counters())


def _map_to_output(run: wire.Run, plan: JobPlan, code: StepCode, task: Task) -> Sealable:
    attempt, token = run.start.attempt, run.start.token
    source = Mapped(plan, plan.splits[attempt.partition], ready_function(code.map), task)
    with PosixCommit(plan).open_attempt(attempt.partition, attempt.attempt, token) as output:
        file = output.create(part_name(attempt.partition, plan.output.extension))
        writer = TextWriter(cast("BinaryIO", file))
        with source.placing(), blame(f"map function {source.function.name}", *_BAD_OUTPUT):
            writer.write_pairs(source.table_pairs() if source.function.batch else source.pairs())
        file.records = writer.records
        task.progress()
        files = output.seal()
    return Sealable(attempt, token, files, 0, source.counters())


def _add_counted(writer: MapOutputWriter, items: Iterable[Any]) -> None:
    """With Count(): a tuple or list of two is a pair, anything else a bare key, whatever surrounds it."""
    for chunk in chunks(items):
        kinds = set(map(type, chunk))
        if tuple not in kinds and list not in kinds:
            writer.add_keys(chunk)
        else:
            writer.add_keys([item[0] if isinstance(item, tuple | list) and len(item) == 2 else item for item in chunk])


def _closing(function: UserFunction) -> Any:
    return function.closing()


class Mapped:
    """A split's records through the user's map. One stream; it knows which record it is at."""

    def __init__(self, plan: JobPlan, pieces: list[Piece], function: UserFunction, task: Task) -> None:
        self.function = function
        self._plan = plan
        self._pieces = pieces
        self._task = task
        self._meter = Meter(task.progress)
        self._read_counters: dict[str, int] = {}
        self._records = 0
        self._table_rows = 0
        self._reader: LineReader | None = None  # None while no record is worked on.
        self._line = 0  # Of the reader's last list: where the slice now mapped ends.
        self._slice: Iterator[str] = iter(())

    def pairs(self) -> Iterator[Any]:
        """What map gives for every record in order, between what setup() and close() give."""
        return self._meter.watch(chain.from_iterable(self._parts()))

    def tables(self) -> Iterator[Any]:
        """What a batch function gives for every batch in order, between what setup() and close() give."""
        for given in chain((self.function.opening(),), self._mapped_batches(), map(_closing, (self.function,))):
            if given is not None and not isinstance(given, tuple):
                yield given

    def table_pairs(self) -> Iterator[Any]:
        """`tables` as pairs."""
        return self._meter.watch(chain.from_iterable(map(table_pairs, self.tables())))

    def emitted(self, rows: int) -> None:
        """A table of `rows` rows was taken."""
        self._table_rows += rows

    def counters(self) -> dict[str, int]:
        """Ours and the user's, those of 0 left out."""
        ours = {
            "input.records": self._records,
            "input.bytes": sum(piece.length for piece in self._pieces),
            "map.output_records": self._meter.count + self._table_rows,
            **self._read_counters,
        }
        return {**self._task.counted(), **{name: count for name, count in ours.items() if count}}

    def placing(self) -> "_Placing":
        """Errors inside carry the place of the record that was worked on."""
        return _Placing(self)

    def place(self) -> InputPlace | None:
        """Where the record that map was last called with begins."""
        if self._reader is None:
            return None
        place = self._reader.place(max(0, self._line - length_hint(self._slice) - 1))
        return InputPlace(place.url, place.offset)

    def _parts(self) -> Iterator[Iterable[Any]]:
        yield self.function.opening()
        call = self.function.call
        for lines in self._lines():
            results: Iterable[Any] = map(call, lines)
            if not self.function.always_iterable:
                results = filterfalse(partial(is_, None), results)
            yield chain.from_iterable(results)
        self._reader = None
        yield self.function.closing()

    def _mapped_batches(self) -> Iterator[Any]:
        for piece in self._pieces:
            reader = self._open(piece, BatchReader)
            for batch in reader.batches():
                self._reader, self._line, self._slice = reader, 0, iter(())
                yield self.function.call(batch)
                self._reader = None
                self._records += len(batch)
                self._task.progress()

    def _open(self, piece: Piece, kind: type[Reader]) -> Reader:
        url = self._plan.inputs[piece.file].url
        self._task.split = SplitInfo(local_path(url) if is_local(url) else url, piece.start, piece.length)
        return kind(
            self._plan.inputs,
            [piece],
            errors=self._plan.input.errors,
            line_bytes_max=self._plan.input.line_bytes_max,
            counters=self._read_counters,
        )

    def _lines(self) -> Iterator[Iterator[str]]:
        """The lines of every piece, some at a time, so that the clock is looked at now and then."""
        size = 1
        clock = self._task.clock
        for piece in self._pieces:
            reader = self._open(piece, LineReader)
            for lines in reader:
                self._reader, self._line = reader, 0
                while self._line < len(lines):
                    began = clock()
                    some = lines[self._line : self._line + size]
                    self._line += len(some)
                    self._slice = iter(some)
                    yield self._slice
                    self._records += len(some)
                    self._task.progress()
                    size = next_step(size, clock() - began)
                self._reader = None


class _Placing:
    """Adds the place to what user code raised; what it gave that cannot be taken is found later than the record."""

    def __init__(self, source: Mapped) -> None:
        self._source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (*_BAD_OUTPUT, BadInput, GeneratorExit)):
            return
        place = self._source.place()
        if place is not None:
            raise PlacedError(error, place) from error
