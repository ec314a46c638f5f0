"""What must hold of masters, workers and output, seen over the whole run and at every entry that is applied.

`raft_history` says that all masters apply the same entries; this, that they come to the same state, and that the state
keeps its promises: to workers (who won), to clients (what was acknowledged, how it ended), and about tokens, charges
and output. The first master to apply an entry is checked in full, the others are compared with it.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from jobrunner.commit.steps import State
from jobrunner.control.messages import CHARGED, EndCause, Ended, JobState, JobStatus, Sealable, Start, Verdict
from jobrunner.ids import AttemptId, JobId, SessionId, TaskId
from jobrunner.master.commands import AnyCommand, EndAttempts, Entry
from jobrunner.master.invariants import check_state
from jobrunner.master.jobs import Job
from jobrunner.master.state import MasterState
from tests.simulation.control_client import MAP
from tests.simulation.raft_history import Broken

if TYPE_CHECKING:
    from tests.simulation.control_master import Master
    from tests.simulation.control_world import ControlWorld

COMPARE_EVERY = 8  # A difference stays, so a look at some entries finds it.
_COMMITTED = (State.COMMITTED, State.COMMITTED_TIDY)
_NOT_COMMITTED = (State.FAILED, State.KILLED, State.FAILED_TIDY, State.KILLED_TIDY)


def state_bytes(state: MasterState) -> bytes:
    """All of a state as bytes: equal exactly if the states are, the order of every dict included."""
    return _encoder.encode(_Parts(state))


class _Parts:
    """An object that is to be encoded by its fields."""

    def __init__(self, of: object) -> None:
        self.of = of


def _plain(value: Any) -> Any:
    """What msgpack does not know. Sets are not among it: their order is nobody's."""
    assert not isinstance(value, set | frozenset), value
    if isinstance(value, array | deque):
        return list(value)
    of = value.of if isinstance(value, _Parts) else value
    fields = vars(of) if hasattr(of, "__dict__") else {name: getattr(of, name) for name in type(of).__slots__}
    return [(name, _pairs(field)) for name, field in fields.items() if name != "_handlers" and not callable(field)]


def _pairs(field: Any) -> Any:
    return list(field.items()) if isinstance(field, dict) else field


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


class ControlHistory:
    def __init__(self, world: ControlWorld) -> None:
        self._world = world
        self._states: dict[int, bytes] = {}  # By index of the entry that made it.
        self._results: dict[int, str] = {}
        self.newest_index = 0
        self.newest: dict[JobId, State] = {}  # By the newest entry that anybody has applied.
        self._winners: dict[TaskId, int] = {}  # Token of each, for ever.
        self._issued: dict[int, tuple[AttemptId, SessionId]] = {}
        self._token_peak = 0
        self._charges: dict[TaskId, set[int]] = {}  # Tokens of attempts that failed by their own fault.
        self._hopeless: set[JobId] = set()
        self._damaged: set[JobId] = set()
        self._acknowledged: set[JobId] = set()
        self._ends: dict[JobId, JobState] = {}  # As some client was told.
        self._outputs: dict[TaskId, int] = {}  # Token of the map output that counts.
        self._refused: set[int] = set()  # Tokens of results whose workers were told to delete them.
        self._late: list[Sealable] = []

    # --- masters -----------------------------------------------------------------------------------------------------

    def before(self, master: Master, index: int, command: AnyCommand) -> bool:
        """An entry is about to be applied; whether this master is the first to."""
        newest = index > self.newest_index
        self._late = []
        if newest and isinstance(command, EndAttempts):
            running = master.state.attempts.values()
            self._late = [
                item
                for item in command.items
                if isinstance(item, Sealable) and not any(item.token in attempts for attempts in running)
            ]
        return newest

    def applied(self, master: Master, index: int, entry: Entry, result: object, *, newest: bool) -> None:
        text = f"{type(result).__name__} {result}"
        if self._results.setdefault(index, text) != text:
            raise Broken(f"{master.name} answers entry {index} with {text}, another with {self._results[index]}")
        state = master.state
        if index % COMPARE_EVERY == 0:
            data = state_bytes(state)
            if self._states.setdefault(index, data) != data:
                raise Broken(f"{master.name} has another state after entry {index} ({entry.command}) than the first")
        if newest:
            self.newest_index = index
            self._world.note(f"{index}: {type(entry.command).__name__} -> {text[:200]}")
            self._check(state, f"entry {index} {entry.command}"[:500])
            self._mark(state)

    def leads(self, master: Master) -> None:
        """A new leader: it must know all that was ever acknowledged."""
        lost = sorted(self._acknowledged - set(master.state.jobs))
        if lost:
            raise Broken(f"{master.name} leads without {lost}, which clients were told are accepted")
        self._world.mark("new leader")
        if any(job.state in (State.COMMITTING, State.RETRACTING) for job in master.state.jobs.values()):
            self._world.mark("leader changed during a commit")

    def silent(self, master: str, session: SessionId, heard_us: int) -> None:
        """A leader gives a session up."""
        ttl_us = self._world.cluster_settings.session.ttl_ms * 1000
        if heard_us < ttl_us:
            raise Broken(f"{master} gives up session {session} after {heard_us} us of listening, the lease is {ttl_us}")
        self._world.mark("lease ran out")

    # --- the newest state --------------------------------------------------------------------------------------------

    def _check(self, state: MasterState, after: str) -> None:
        try:
            check_state(state)
        except AssertionError as error:
            raise Broken(f"{error} after {after}") from None
        self._check_tokens(state)
        for id, job in state.jobs.items():
            self._check_winners(state, job)
            self._check_charges(job)
            before = self.newest.get(id)
            if before != job.state:
                self._check_step(job, before)
                self.newest[id] = job.state
        missing = [id for id in self.newest if id not in state.jobs]
        if missing:
            raise Broken(f"{missing} are no longer known after {after}")

    def _check_tokens(self, state: MasterState) -> None:
        """Never the same twice, and always above all before."""
        running = sorted((token, each) for attempts in state.attempts.values() for token, each in attempts.items())
        fresh = [(int(token), each) for token, each in running if token not in self._issued]
        for token, each in running:
            known = self._issued.get(token, (each.attempt, each.session))
            if known != (each.attempt, each.session):
                raise Broken(f"token {token} is {each.attempt}'s, and was {known[0]}'s")
        for token, each in fresh:
            if token <= self._token_peak:
                raise Broken(f"{each.attempt} has token {token}, which is not above {self._token_peak}")
            self._issued[token] = (each.attempt, each.session)
        self._token_peak = max([self._token_peak, *(token for token, _ in fresh)])
        if state.locks.last_token < self._token_peak:
            raise Broken(f"the counter of tokens fell to {state.locks.last_token}")

    def _check_winners(self, state: MasterState, job: Job) -> None:
        consumed = set()
        for table in job.final_stages():
            winners = state.locks.winners.get((job.submit.job, table.spec.name), {})
            for partition, claim in winners.items():
                task = TaskId(job.submit.job, table.spec.name, partition)
                if self._winners.setdefault(task, claim.token) != claim.token:
                    raise Broken(f"{task} was won by token {self._winners[task]}, and now by {claim.token}")
                if claim.token in self._refused and not job.tidy:
                    raise Broken(f"{task}: token {claim.token} won after its worker was told to delete its files")
                consumed.add(claim.consumed)
        sealed = sum(1 for task in self._winners if task.job == job.submit.job)
        counted = sum(len(state.locks.winners.get((job.submit.job, t.spec.name), {})) for t in job.final_stages())
        if sealed != counted:
            raise Broken(f"{job.submit.job}: {sealed} partitions had a winner, {counted} have one")
        if len(consumed) > 1:
            raise Broken(f"{job.submit.job}: its partitions were made of different map outputs: {sorted(consumed)}")

    def _check_charges(self, job: Job) -> None:
        for table in job.stages.values():
            for partition, faults in table.faults.items():
                task = TaskId(job.submit.job, table.spec.name, partition)
                if faults > len(self._charges.get(task, ())):
                    raise Broken(f"{task}: {faults} faults are charged, {len(self._charges.get(task, ()))} happened")

    def _check_step(self, job: Job, before: State | None) -> None:
        """A job's commit went a step."""
        id, published = job.submit.job, self._world.outputs.published
        if job.state in _COMMITTED:
            if id not in published:
                raise Broken(f"{id} is {job.state}, and nothing is published")
            parts = tuple((task.partition, token) for task, token in sorted(self._winners.items()) if task.job == id)
            if published[id] != parts:
                raise Broken(f"{id}: published {published[id]}, won {parts}")
            if job.counters.get("parts") != len(parts):
                raise Broken(f"{id}: {len(parts)} winners, counted {job.counters}")
        if job.state in _NOT_COMMITTED:
            if id in published:
                raise Broken(f"{id} is {job.state}, and its output is published")
            if job.state is State.FAILED:
                self._check_failure(job)
        if job.ended and job.public != self._ends.setdefault(id, job.public):
            raise Broken(f"{id} ended {self._ends[id]}, and now is {job.public}")

    def _check_failure(self, job: Job) -> None:
        """A job fails only for what was done to it."""
        assert job.error is not None
        kind, id = job.error.kind, job.submit.job
        allowed = {
            "commit_refused": True,
            "not_deterministic": self._world.job(id).fickle,
            "corrupt": id in self._damaged,
        }
        worst = max((len(tokens) for task, tokens in self._charges.items() if task.job == id), default=0)
        charged = kind in set(CHARGED) and (id in self._hopeless or worst >= job.submit.faults_max)
        if not allowed.get(kind, charged):
            raise Broken(f"{id} failed with {job.error}, and nothing of the kind had happened")

    def _mark(self, state: MasterState) -> None:
        """Note rare events that a run is to have met."""
        for item in self._late:
            if self._winners.get(item.attempt.task) == item.token:
                self._world.mark("late seal by a lost attempt")
        for id, job in state.active.items():
            table = job.stages[MAP]
            for partition in range(len(table.state)):
                task, token = TaskId(id, MAP, partition), table.done_token[partition]
                if token and self._outputs.setdefault(task, token) != token:
                    self._outputs[task] = token
                    self._world.mark("lost map output made again")

    # --- workers -----------------------------------------------------------------------------------------------------

    def started(self, worker: str, start: Start) -> None:
        """A worker accepted an instruction: of an attempt that the log knows."""
        if start.token not in self._issued or self._issued[start.token][0] != start.attempt:
            raise Broken(f"{worker} is told to run {start.attempt} under token {start.token}: never assigned")

    def told(self, report: Ended, verdict: Verdict) -> None:
        """A worker hears what became of a result."""
        if not isinstance(report, Sealable):
            return
        winner = self._winners.get(report.attempt.task)
        if verdict in (Verdict.LOST, Verdict.GONE):
            self._refused.add(report.token)
        if verdict is Verdict.LOST:
            self._world.mark("stale input refused" if winner is None else "second result refused")
        if verdict is Verdict.WON and winner != report.token:
            raise Broken(f"{report.attempt} (token {report.token}) is told it won, but {winner} did")
        tidy = self.newest.get(report.attempt.job) in (State.COMMITTED_TIDY, State.FAILED_TIDY, State.KILLED_TIDY)
        if verdict is not Verdict.WON and winner == report.token and not tidy:
            raise Broken(f"{report.attempt} (token {report.token}) won, and is told {verdict}")

    def injected(self, attempt: AttemptId, token: int, cause: EndCause) -> None:
        """The simulation makes an attempt fail by its own fault."""
        self._charges.setdefault(attempt.task, set()).add(token)
        if cause in (EndCause.FATAL, EndCause.INPUT_CHANGED):
            self._hopeless.add(attempt.job)

    def damaged(self, attempt: AttemptId) -> None:
        self._damaged.add(attempt.job)

    def no_stage(self, attempt: AttemptId) -> None:
        """An attempt finds no stage to write to: only after the job has ended."""
        state = self.newest[attempt.job]
        if state is State.RUNNING:
            raise Broken(f"{attempt}: no stage directory while the job is {state}")

    # --- clients -----------------------------------------------------------------------------------------------------

    def acknowledged(self, job: JobId) -> None:
        self._acknowledged.add(job)

    def shown(self, status: JobStatus) -> None:
        """A client reads a status."""
        if status.state in (JobState.COMMITTED, JobState.FAILED, JobState.KILLED):
            ended = self._ends.get(status.id)
            if ended != status.state:
                raise Broken(f"a client is told that {status.id} is {status.state}, it ended {ended}")
        elif status.id in self._ends and status.tidy:
            raise Broken(f"{status.id} is shown as {status.state} and tidy")
        self._world.mark(f"job {status.state}")
