"""Text in: pieces of files to lines, in lists of a megabyte or so.

A line ends at \\n or \\r\\n, nowhere else; the last one need not end. It belongs to the piece in which it begins, so
that pieces which cover a file give each line once. A byte order mark is part of the first line, as any other bytes are.
How lines are cut into lists depends on the bytes and the pieces alone, also where a store reads short.
Each file is compared with what was planned, when it is opened and when its piece is done: one that changed while the
job runs raises InputChanged.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from jobrunner.errors import TaskError
from jobrunner.storage.filesystem import InputStat, open_input, stat_input

UNDECODABLE = "input.undecodable_lines"  # The counter of lines in which bytes were replaced.
BLOCK_BYTES = 1 << 20


class PlannedFile(Protocol):
    """An input as it was when the job was planned; `planner.plan.InputFile` is one."""

    @property
    def url(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def etag(self) -> str: ...


class PlannedPiece(Protocol):
    """Bytes [start, start + length) of the file with this index; `planner.plan.Piece` is one."""

    @property
    def file(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


class InputChanged(TaskError):
    """An input is not what was planned: the job cannot go on. Field `url`."""


class BadInput(TaskError):
    """A line that cannot be read: too long, or not UTF-8 where that is asked for. Fields `url`, `offset`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record begins: bytes from the start of the file."""

    url: str
    offset: int


class LineReader:
    """Iterate for lists of lines, none empty; `place` and `url` speak of the list given out last."""

    def __init__(
        self,
        inputs: Sequence[PlannedFile],
        pieces: Sequence[PlannedPiece],
        *,
        errors: str,
        line_bytes_max: int,
        counters: MutableMapping[str, int],
    ) -> None:
        self.url = ""  # The file being read.
        self._inputs, self._pieces = inputs, pieces
        self._errors, self._line_bytes_max, self._counters = errors, line_bytes_max, counters
        self._data = b""
        self._offset = 0  # Of `_data` in the file.

    def __iter__(self) -> Iterator[list[str]]:
        return map(self._decode, self._pieces_of_bytes())

    def place(self, line: int) -> Place:
        """Where the line with this number in the last list begins. Searches, so only for reports."""
        at = 0
        for _ in range(line):
            at = self._data.index(b"\n", at) + 1
        return Place(self.url, self._offset + at)

    def _pieces_of_bytes(self) -> Iterator[bytes]:
        for piece in self._pieces:
            planned = self._inputs[piece.file]
            self.url = planned.url
            self._compare(planned)
            if piece.length == 0:
                continue
            try:
                file = open_input(planned.url)
            except FileNotFoundError as error:
                raise _changed(planned, "is gone") from error
            with file:
                for data in self._whole_lines(file, planned, piece):
                    self._data = data
                    yield data
                    self._offset += len(data)
            self._compare(planned)

    def _compare(self, planned: PlannedFile) -> None:
        """Raise InputChanged if the file is not as planned. What a store cannot say (-1, "") is not compared."""
        try:
            now = stat_input(planned.url)
        except FileNotFoundError as error:
            raise _changed(planned, "is gone") from error
        then = InputStat(planned.bytes, planned.mtime_ns, planned.etag)
        if now.bytes != then.bytes:
            raise _changed(planned, f"had {then.bytes} bytes and has {now.bytes}")
        if now.etag != then.etag and now.etag and then.etag:
            raise _changed(planned, f"had etag {then.etag} and has {now.etag}")
        if now.mtime_ns != then.mtime_ns and -1 not in (now.mtime_ns, then.mtime_ns):
            raise _changed(planned, "was written again")

    def _whole_lines(self, file: BinaryIO, planned: PlannedFile, piece: PlannedPiece) -> Iterator[bytes]:
        """Bytes of the lines that begin in the piece, cut after line ends; sets `_offset` to where they begin."""
        end = piece.start + piece.length
        position = self._first_line(file, planned, piece)
        if position >= end:
            return
        self._offset = position
        held: list[bytes] = []  # Of a line whose end was not read yet.
        held_bytes = 0
        while True:
            block = _read_block(file)
            position += len(block)
            if not block:
                if position < planned.bytes:
                    raise _changed(planned, f"ends at {position} of {planned.bytes} bytes")
                cut = 0
            elif position >= end:  # The last line is the one that holds byte end - 1.
                cut = block.find(b"\n", max(0, len(block) - (position - end) - 1)) + 1 or block.rfind(b"\n") + 1
            else:
                cut = block.rfind(b"\n") + 1
            self._check_length(block.find(b"\n") if cut else len(block), held_bytes)
            if cut == 0 and block:
                held.append(block)
                held_bytes += len(block)
                continue
            data = b"".join([*held, block[:cut]])
            held, held_bytes = [block[cut:]], len(block) - cut
            if data:
                self._check_lines(data)
                yield data
            if not block or position - held_bytes >= end:
                return

    def _first_line(self, file: BinaryIO, planned: PlannedFile, piece: PlannedPiece) -> int:
        """Move `file` to the first line that begins in the piece and return its offset (the piece's end: none)."""
        if piece.start == 0:
            return 0
        position = piece.start - 1
        end = piece.start + piece.length
        file.seek(position)
        while position < end:
            block = _read_block(file)
            if not block:
                break
            found = block.find(b"\n")
            if found >= 0:
                file.seek(position + found + 1)
                return position + found + 1
            position += len(block)
        return end

    def _check_length(self, first: int, held_bytes: int) -> None:
        if held_bytes + first > self._line_bytes_max:
            self._too_long(self._offset)

    def _check_lines(self, data: bytes) -> None:
        """Lines inside one block can only be too long if the limit is below the size of a block."""
        if self._line_bytes_max >= BLOCK_BYTES:
            return
        at = 0
        for line in data.split(b"\n"):
            if len(line) > self._line_bytes_max:
                self._too_long(self._offset + at)
            at += len(line) + 1

    def _too_long(self, offset: int) -> None:
        limit = self._line_bytes_max
        raise BadInput(
            f"{self.url}: the line at byte {offset} is longer than input.line_bytes_max = {limit} bytes",
            url=self.url, offset=offset,
        )  # fmt: skip

    def _decode(self, data: bytes) -> list[str]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            text = self._decode_bad(data, error)
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()  # What follows the last line end.
        return lines

    def _decode_bad(self, data: bytes, error: UnicodeDecodeError) -> str:
        if self._errors == "surrogateescape":
            return data.decode("utf-8", "surrogateescape")
        if self._errors == "strict":
            offset = self._offset + data.rfind(b"\n", 0, error.start) + 1
            at = self._offset + error.start
            message = f"{self.url}: byte {data[error.start]:#04x} at {at} is not UTF-8 (input.errors = strict)"
            raise BadInput(message, url=self.url, offset=offset) from error
        bad = sum(not _is_utf8(line) for line in data.split(b"\n"))
        self._counters[UNDECODABLE] = self._counters.get(UNDECODABLE, 0) + bad
        return data.decode("utf-8", "replace")


def read_lines(
    inputs: Sequence[PlannedFile],
    pieces: Sequence[PlannedPiece],
    *,
    errors: str,
    line_bytes_max: int,
    counters: MutableMapping[str, int],
) -> LineReader:
    """Lines of the pieces, in order. `errors` is replace, strict or surrogateescape; `counters` gets UNDECODABLE.

    Iterating raises InputChanged, BadInput, OSError.
    """
    return LineReader(inputs, pieces, errors=errors, line_bytes_max=line_bytes_max, counters=counters)


def _changed(planned: PlannedFile, how: str) -> InputChanged:
    return InputChanged(f"{planned.url}: {how}; inputs must not change while the job runs", url=planned.url)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_block(file: BinaryIO) -> bytes:
    """BLOCK_BYTES, or what is left: a store may read short, and blocks must depend on the file alone."""
    block = file.read(BLOCK_BYTES) or b""
    if len(block) in (0, BLOCK_BYTES):
        return block
    parts, count = [block], len(block)
    while count < BLOCK_BYTES and (more := file.read(BLOCK_BYTES - count)):
        parts.append(more)
        count += len(more)
    return b"".join(parts)
