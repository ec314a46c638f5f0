"""The simulation finds planted bugs: each is a rule of the control plane left out, found within some tens of seeds.

A simulation that finds nothing may be one that looks at nothing.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from jobrunner.control.messages import EndCause, Sealable, Verdict
from jobrunner.ids import Epoch, SessionId, Token
from jobrunner.locks.sessions import Session
from jobrunner.locks.table import LockTable
from jobrunner.master import outcomes
from jobrunner.master.jobs import Job
from jobrunner.master.leader import Leader, LeaderLimits
from jobrunner.master.liveness import Leases
from jobrunner.master.state import MasterState
from jobrunner.master.tasks import Running, StageTable, TaskState
from jobrunner.worker.attempts import Action, Attempts
from tests.simulation.control_world import ControlFaults, ControlWorld

SEEDS = 40
HARD = ControlFaults(
    loss=0.05, duplicates=0.1, late=0.1, delay_us=(50, 2_000), crashes=1, pauses=0.5, cuts=1, breaks=1,
    worker_crashes=1.5, worker_pauses=1.5, kills=0.3, failures=0.05, refusals=0.1, slow=0.1,
)  # fmt: skip
ZOMBIES = ControlFaults(worker_cuts=2, slow=0.5, fickle=1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def found(seeds: int = SEEDS, faults: ControlFaults = HARD) -> str | None:
    """What the first seed that fails says."""
    for seed in range(1, seeds + 1):
        world = ControlWorld(seed, faults=faults)
        try:
            world.play_all(3_000_000)
            world.finish(6_000_000)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def test_the_unchanged_system_survives_the_same_faults() -> None:
    """Otherwise the planted bugs would prove nothing."""
    assert found(8, HARD) is None
    assert found(8, ZOMBIES) is None


def test_a_winner_that_is_cleared_with_its_session_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What readers may have seen would be replaced."""
    right = outcomes.worker_lost

    def worker_lost(state: MasterState, session: Session, reason: str, at_ms: int) -> None:
        right(state, session, reason, at_ms)
        for (id, stage), winners in state.locks.winners.items():
            for partition in [p for p, claim in winners.items() if claim.session == session.id]:
                if (job := state.active.get(id)) is not None and not job.ended:
                    del winners[partition]
                    table = job.stages[stage]
                    table.state[partition] = TaskState.OPEN
                    table.done -= 1
                    table.reopened.append(partition)

    monkeypatch.setattr(outcomes, "worker_lost", worker_lost)
    report = found() or ""
    assert "had a winner" in report or "without all partitions" in report


def test_a_token_counter_that_starts_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts would write under one name."""
    right = MasterState.apply

    def apply(self: MasterState, entry: Any) -> Any:
        if entry.epoch > self.epoch:
            self.locks.last_token = max(0, self.locks.last_token - 3)  # As if it were the leader's memory.
        return right(self, entry)

    monkeypatch.setattr(MasterState, "apply", apply)
    assert "token" in (found() or "")


def test_state_that_depends_on_the_order_of_a_set_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters would grant different tokens for the same log."""
    count = iter(range(10**9))

    def next_token(self: LockTable) -> Token:
        self.last_token += 1 + next(count) % 7 // 6
        return Token(self.last_token)

    monkeypatch.setattr(LockTable, "next_token", next_token)
    assert found() is not None


def test_a_new_leader_that_gives_no_full_lease_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fail-over would lose the workers that were heard last by the old leader."""
    right = Leader.__init__

    def init(self: Leader, epoch: Epoch, now: float, limits: LeaderLimits) -> None:
        right(self, epoch, now, limits)
        follow = self.leases.follow
        self.leases.follow = lambda sessions, at: follow(sessions, min(at, now - limits.ttl_s * 0.7))  # type: ignore[method-assign]

    monkeypatch.setattr(Leader, "__init__", init)
    assert "of listening, the lease is" in (found() or "")


def test_a_leader_that_counts_the_time_it_was_stopped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg of a master alone would lose all workers."""
    monkeypatch.setattr(Leases, "add_gap", lambda self, seconds: None)
    assert "of listening, the lease is" in (found() or "")


def test_charging_attempts_of_lost_workers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job would fail for the cluster's faults."""
    right = outcomes.drop

    def drop(state: MasterState, running: Running, cause: EndCause, reason: str) -> None:
        right(state, running, cause, reason)
        if cause == EndCause.LOST_WORKER:
            table = state.jobs[running.attempt.job].table(running.attempt.stage)
            assert table is not None
            partition = running.attempt.partition
            table.faults[partition] = table.faults.get(partition, 0) + 1
            table.ends[EndCause.EXCEPTION] = table.ends.get(EndCause.EXCEPTION, 0) + 1
            table.ends[cause] -= 1

    monkeypatch.setattr(outcomes, "drop", drop)
    assert "faults are charged" in (found() or "")


def test_a_seal_without_a_look_at_what_it_consumed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions would be made of different outputs of one map: keys missing, or there twice."""

    def accepts(job: Job, table: StageTable, consumed: int) -> bool:
        return True

    monkeypatch.setattr(outcomes, "_consumed_is_current", accepts)
    assert "different map outputs" in (found(faults=ZOMBIES) or "")


def test_a_second_winner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt called lost would replace the one that won."""

    def seal(self: LockTable, job: Any, stage: Any, partition: int, claim: Any) -> Any:
        self.winners.setdefault((job, stage), {})[partition] = claim
        return claim

    right = outcomes._seal

    def again(state: MasterState, job: Job, table: StageTable, reporter: SessionId, item: Sealable) -> Verdict:
        verdict = right(state, job, table, reporter, item)
        if verdict is Verdict.LOST and job.public == "running":
            winner = state.locks.winner(item.attempt.job, item.attempt.stage, item.attempt.partition)
            if winner is not None:
                claim = type(winner)(item.attempt.attempt, item.token, reporter, item.files, item.consumed)
                state.locks.seal(item.attempt.job, item.attempt.stage, item.attempt.partition, claim)
                return Verdict.WON
        return verdict

    monkeypatch.setattr(LockTable, "seal", seal)
    monkeypatch.setattr(outcomes, "_seal", again)
    assert "was won by token" in (found(faults=ZOMBIES) or "")


def test_a_worker_that_forgets_its_result_with_its_session_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a partition's winner would be deleted by the worker that made them."""
    right = Attempts.session_ended

    def session_ended(self: Attempts) -> list[Action]:
        actions = right(self)
        reports = self.reports(100)
        return actions + self.verdicts(reports, [Verdict.LOST] * len(reports))

    monkeypatch.setattr(Attempts, "session_ended", session_ended)
    assert "are gone" in (found(faults=ZOMBIES) or "")
