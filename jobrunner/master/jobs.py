"""One job in the masters' state: its stages, its commit steps, its counters, and what people are shown of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from jobrunner.commit.steps import Event, State, is_ended, is_tidy, next_state, public_state, step_due
from jobrunner.control.messages import (
    AttemptInfo,
    EndCause,
    JobError,
    JobState,
    StageSpec,
    StageStatus,
    SubmitJob,
    TaskKind,
)
from jobrunner.ids import AttemptId, SessionId, StageName, TaskId, Token
from jobrunner.locks.sessions import SessionTable
from jobrunner.locks.table import LockTable
from jobrunner.master.tasks import Running, StageTable

STEP_KINDS = (TaskKind.SETUP, TaskKind.PUBLISH, TaskKind.RETRACT, TaskKind.CLEANUP)


def _step_tables() -> dict[StageName, StageTable]:
    return {
        StageName(kind.value): StageTable(StageSpec(StageName(kind.value), kind, 1, final=False)) for kind in STEP_KINDS
    }


@dataclass(slots=True)
class Job:
    """`stages` are the user's, `steps` the commit's; both hold tasks of the same life."""

    submit: SubmitJob
    state: State = State.QUEUED
    stages: dict[StageName, StageTable] = field(default_factory=dict)
    steps: dict[StageName, StageTable] = field(default_factory=_step_tables)
    counters: dict[str, int] = field(default_factory=dict)
    error: JobError | None = None
    finished_ms: int | None = None
    left_behind: str = ""  # Why clean-up was given up, if it was.
    records: list[AttemptInfo] = field(default_factory=list)  # Attempts that ended otherwise than well.
    touched: dict[SessionId, None] = field(default_factory=dict)  # Workers that ran any of it, in order.
    version: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            self.stages = {spec.name: StageTable(spec) for spec in self.submit.stages}

    @property
    def public(self) -> JobState:
        return public_state(self.state)

    @property
    def ended(self) -> bool:
        return is_ended(self.state)

    @property
    def tidy(self) -> bool:
        """Nothing of it is left beside the output, and its path is free."""
        return is_tidy(self.state)

    def move(self, event: Event) -> bool:
        """One step of the commit; whether it changed anything. Raises Refused, ImpossibleStep."""
        before, self.state = self.state, next_state(self.state, event)
        return self.state != before

    def table(self, stage: StageName) -> StageTable | None:
        return self.stages.get(stage) or self.steps.get(stage)

    def tables(self) -> Iterator[StageTable]:
        yield from self.stages.values()
        yield from self.steps.values()

    def final_stages(self) -> list[StageTable]:
        return [table for table in self.stages.values() if table.spec.final]

    def all_sealed(self) -> bool:
        return all(table.complete for table in self.final_stages())

    def readers(self, map_stage: StageName) -> list[StageTable]:
        return [table for table in self.stages.values() if table.spec.reads == map_stage]

    def output_needed(self, map_stage: StageName) -> bool:
        """Whether some partition that reads this stage is not sealed yet."""
        return any(not table.complete for table in self.readers(map_stage))

    def inputs_complete(self, table: StageTable) -> bool:
        """A reduce is assigned only when every map output it reads is there."""
        return not table.spec.reads or self.stages[table.spec.reads].complete

    def open_tables(self) -> list[StageTable]:
        """Tables with tasks to assign now, maps before reduces, steps of the commit when they are due."""
        due = step_due(self.state)
        if due is not None:
            table = self.steps[StageName(due.value)]
            return [table] if table.open_count else []
        if self.state != State.RUNNING:
            return []
        return [table for table in self.stages.values() if table.open_count and self.inputs_complete(table)]

    def add_counters(self, counters: dict[str, int]) -> None:
        for name, amount in counters.items():
            self.counters[name] = self.counters.get(name, 0) + amount

    def keep_record(self, info: AttemptInfo) -> None:
        """Remember an attempt; the first and the latest matter most, so the middle is dropped."""
        kept = self.submit.attempts_kept_max
        if len(self.records) >= kept:
            del self.records[kept // 2]
        self.records.append(info)

    def stage_status(self, table: StageTable) -> StageStatus:
        attempts = dict(table.ends)
        attempts["started"] = table.started
        attempts["lost"] = table.ends.get(EndCause.LOST_WORKER, 0)
        attempts["superseded"] = table.ends.get(EndCause.SUPERSEDED, 0)
        attempts["failed"] = sum(table.faults.values())
        return StageStatus(
            table.spec.name, table.spec.kind, table.spec.tasks, table.done, len(table.running), attempts
        )  # fmt: skip


def attempt_infos(
    job: Job, sessions: SessionTable, locks: LockTable, task: TaskId | None, *, failed_only: bool
) -> list[AttemptInfo]:
    """Attempts to show: recorded ends, those that run, and those whose output counts; by task, then attempt."""

    def wanted(attempt: AttemptId) -> bool:
        return task is None or attempt.task == task

    infos = [info for info in job.records if wanted(info.attempt)]
    if failed_only:
        return infos
    for table in job.tables():
        for running in table.running.values():
            if wanted(running.attempt):
                infos.append(_plain_info(running, "running", sessions))
        infos.extend(info for info in _done_infos(job, table, sessions, locks) if wanted(info.attempt))
    return sorted(infos, key=lambda info: info.token)


def _plain_info(running: Running, state: str, sessions: SessionTable) -> AttemptInfo:
    address = _address(sessions, running.session)
    return AttemptInfo(running.attempt, running.token, running.kind, state, address, "", "", "")


def _done_infos(job: Job, table: StageTable, sessions: SessionTable, locks: LockTable) -> Iterator[AttemptInfo]:
    spec = table.spec
    if spec.final:
        for partition, claim in locks.winners.get((job.submit.job, spec.name), {}).items():
            attempt = AttemptId(job.submit.job, spec.name, partition, claim.attempt)
            yield _plain_info(Running(attempt, claim.token, claim.session, spec.kind), EndCause.DONE, sessions)
        return
    for partition in range(len(table.state)):
        if table.done_token[partition]:
            attempt = AttemptId(job.submit.job, spec.name, partition, table.done_attempt[partition])
            token, session = Token(table.done_token[partition]), SessionId(table.owner[partition])
            yield _plain_info(Running(attempt, token, session, spec.kind), EndCause.DONE, sessions)


def _address(sessions: SessionTable, id: SessionId) -> str:
    session = sessions.live.get(id)
    if session is None:
        session = next((lost for lost in sessions.lost.values() if lost.id == id), None)
    return session.address if session is not None else ""
