"""What is shown while a job runs, always on stderr: a live display on a terminal, else a line per change."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from jobrunner.cli.present import progress_line, waiting_text
from jobrunner.control.messages import JobStatus

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_S = 1.0  # Counts change with every task: they are shown once a second at most.


class Display(Protocol):
    """Shows a job's statuses; a context manager that leaves the terminal as it was."""

    def show(self, status: JobStatus) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(stream: TextIO | None = None) -> Display:
    """The display for `stream` (stderr)."""
    stream = stream or sys.stderr
    return Live() if stream.isatty() else Lines(stream)


class Lines:
    """A line at every turn of the job (state, stage done, failure), and for mere counts one a second."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._line = ""
        self._turn: object = None
        self._shown_at = 0.0

    def show(self, status: JobStatus) -> None:
        line = progress_line(status)
        failures = [stage.attempts.get(end, 0) for stage in status.stages for end in ("failed", "lost")]
        turn = (status.state, [stage.done == stage.tasks for stage in status.stages], failures)
        now = self._now()
        if line == self._line or (turn == self._turn and now < self._shown_at + _LINE_S):
            return
        if self._turn is None:
            print(f"job {status.id} ({status.name}) -> {status.output}", file=self._stream)
        self._line, self._turn, self._shown_at = line, turn, now
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Live:
    """One bar a stage, and under them what the job waits for."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def show(self, status: JobStatus) -> None:
        for index, stage in enumerate(status.stages):
            if stage.name not in self._bars:
                if index == 0:
                    self._progress.console.print(
                        f"job {status.id} ({status.name}) -> {status.output}", markup=False, highlight=False
                    )
                self._bars[stage.name] = self._progress.add_task(stage.name, total=stage.tasks, start=False, note="")
            bar = self._bars[stage.name]
            if stage.attempts.get("started") and not self._progress.tasks[index].started:
                self._progress.start_task(bar)
            self._progress.update(bar, completed=stage.done, note=_note(status, index))
            if stage.done == stage.tasks and self._progress.tasks[index].started:
                self._progress.stop_task(bar)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def _note(status: JobStatus, index: int) -> str:
    stage = status.stages[index]
    notes = [f"{stage.running} running"] if stage.running else []
    notes += [f"{stage.attempts[end]} {end}" for end in ("failed", "lost") if stage.attempts.get(end)]
    if index == len(status.stages) - 1 and (waiting := waiting_text(status)):
        notes.append(f"waiting for {waiting}")
    return ", ".join(notes)
