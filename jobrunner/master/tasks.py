"""The life of a task and of an attempt, as tables.

A stage's tasks are columns, grown when a task first runs: before that they are the range [len(columns), tasks).
Only attempts that run are objects.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush

from jobrunner.control.messages import EndCause, StageSpec, TaskKind
from jobrunner.ids import AttemptId, SessionId, Token

DIGEST_MASK = (1 << 64) - 1


class TaskState(IntEnum):
    OPEN = 0  # To be assigned.
    RUNNING = 1  # One attempt is assigned.
    DONE = 2  # Map output is on a live worker, or the partition is sealed, or the step is done.


class Event(IntEnum):
    ASSIGNED = 0
    FINISHED = 1  # Its result counts (also a result of an earlier attempt that was called lost).
    ENDED = 2  # Its running attempt ended without a result.
    OUTPUT_LOST = 3  # Its map output is gone and still needed.


# A pair outside the table is a bug. (DONE, ENDED): a slower attempt of a finished task ends; nothing changes.
TASK_STEPS: dict[tuple[TaskState, Event], TaskState] = {
    (TaskState.OPEN, Event.ASSIGNED): TaskState.RUNNING,
    (TaskState.OPEN, Event.FINISHED): TaskState.DONE,
    (TaskState.RUNNING, Event.FINISHED): TaskState.DONE,
    (TaskState.RUNNING, Event.ENDED): TaskState.OPEN,
    (TaskState.DONE, Event.ENDED): TaskState.DONE,
    (TaskState.DONE, Event.OUTPUT_LOST): TaskState.OPEN,
}


@dataclass(slots=True)
class Running:
    """An attempt that is assigned: waiting at its worker, or running there."""

    attempt: AttemptId
    token: Token
    session: SessionId
    kind: TaskKind


@dataclass(slots=True)
class StageTable:
    """The tasks of one stage. Keys are partitions; columns are filled up to the first task that never ran."""

    spec: StageSpec
    state: bytearray = field(default_factory=bytearray)
    last_attempt: array[int] = field(default_factory=lambda: array("I"))
    last_token: array[int] = field(default_factory=lambda: array("Q"))
    # The attempt whose output counts; of a map whose output was lost, the one that last counted.
    done_attempt: array[int] = field(default_factory=lambda: array("I"))
    done_token: array[int] = field(default_factory=lambda: array("Q"))  # 0: never done.
    owner: array[int] = field(default_factory=lambda: array("Q"))  # Session whose disk has the block file.
    digest: array[int] = field(default_factory=lambda: array("Q"))
    bytes: array[int] = field(default_factory=lambda: array("Q"))
    earlier: dict[int, dict[int, Token]] = field(default_factory=dict)  # Attempts before the last, and their tokens.
    running: dict[int, Running] = field(default_factory=dict)
    reopened: list[int] = field(default_factory=list)  # A heap: run before tasks that never ran.
    faults: dict[int, int] = field(default_factory=dict)  # Charged ends of each task.
    corruptions: dict[int, int] = field(default_factory=dict)  # Times its map output was damaged.
    ends: dict[str, int] = field(default_factory=dict)  # Attempts by end cause.
    started: int = 0
    done: int = 0
    digest_sum: int = 0  # Of the recorded digests, modulo 2^64.
    recorded: int = 0  # Maps with a recorded digest, whether or not the output is still there.
    version: int = 0  # Changes with the set of outputs.

    @property
    def open_count(self) -> int:
        return self.spec.tasks - self.done - len(self.running)

    @property
    def complete(self) -> bool:
        return self.done == self.spec.tasks

    def state_of(self, partition: int) -> TaskState:
        return TaskState(self.state[partition]) if partition < len(self.state) else TaskState.OPEN

    def take_open(self, count: int) -> list[int]:
        """Up to `count` open tasks, reopened ones first; looks, does not change anything."""
        first = sorted(p for p in set(self.reopened) if self.state[p] == TaskState.OPEN)[:count]
        fresh = range(len(self.state), min(self.spec.tasks, len(self.state) + count - len(first)))
        return [*first, *fresh]

    def step(self, partition: int, event: Event) -> None:
        """Move one task; raises AssertionError for a pair outside the table."""
        before = self.state_of(partition)
        after = TASK_STEPS.get((before, event))
        assert after is not None, f"{self.spec.name}/{partition}: {event.name} while {before.name}"
        self.state[partition] = after
        self.done += (after == TaskState.DONE) - (before == TaskState.DONE)
        if after == TaskState.OPEN and before != TaskState.OPEN:
            heappush(self.reopened, partition)
        while self.reopened and self.state[self.reopened[0]] != TaskState.OPEN:
            heappop(self.reopened)

    def grow(self, partition: int) -> None:
        """Give columns to every task up to `partition`."""
        for fresh in range(len(self.state), partition + 1):
            self.state.append(TaskState.OPEN)
            for column in (self.last_attempt, self.last_token, self.done_attempt, self.done_token, self.owner,
                           self.digest, self.bytes):  # fmt: skip
                column.append(0)
            if fresh < partition:
                heappush(self.reopened, fresh)

    def assign(self, attempt: AttemptId, token: Token, session: SessionId) -> Running:
        """Start attempt number `attempt.attempt`, which is `next_attempt(partition)`."""
        partition = attempt.partition
        self.grow(partition)
        if self.last_token[partition]:
            earlier = self.earlier.setdefault(partition, {})
            earlier[self.last_attempt[partition]] = Token(self.last_token[partition])
        self.step(partition, Event.ASSIGNED)
        self.last_attempt[partition], self.last_token[partition] = attempt.attempt, token
        running = self.running[partition] = Running(attempt, token, session, self.spec.kind)
        self.started += 1
        return running

    def next_attempt(self, partition: int) -> int:
        if partition >= len(self.state) or not self.last_token[partition]:
            return 0
        return self.last_attempt[partition] + 1

    def issued(self, partition: int, attempt: int, token: Token) -> bool:
        """Whether this very attempt was ever assigned."""
        if partition >= len(self.state):
            return False
        if self.last_attempt[partition] == attempt and self.last_token[partition] == token:
            return True
        return self.earlier.get(partition, {}).get(attempt) == token

    def revoke(self, partition: int, attempt: int, instead: Token) -> None:
        """No result of this attempt may count any more: its token is replaced by one that nobody was given."""
        if self.last_attempt[partition] == attempt:
            self.last_token[partition] = instead
        else:
            self.earlier[partition][attempt] = instead

    def end_running(self, partition: int, cause: EndCause) -> Running:
        """The running attempt of a task ends, with or without a result."""
        running = self.running.pop(partition)
        self.ends[cause] = self.ends.get(cause, 0) + 1
        return running

    def record_output(
        self, partition: int, *, attempt: int, token: Token, owner: SessionId, digest: int, bytes: int
    ) -> None:
        """The output of a map counts from now on."""
        if self.done_token[partition]:
            self.digest_sum -= self.digest[partition]
        else:
            self.recorded += 1
        self.digest_sum = (self.digest_sum + digest) & DIGEST_MASK
        self.done_attempt[partition], self.done_token[partition] = attempt, token
        self.owner[partition], self.digest[partition], self.bytes[partition] = owner, digest, bytes
        self.version += 1

    def outputs_of(self, session: SessionId) -> Iterator[int]:
        """Maps whose output lies on this worker."""
        for partition, owner in enumerate(self.owner):
            if owner == session and self.state[partition] == TaskState.DONE:
                yield partition
