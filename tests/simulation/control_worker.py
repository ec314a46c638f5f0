"""A simulated worker: the real `Attempts` in a small shell, as `agent.py` and `session.py` are to a real one.

Its disk (block files) outlives its process. Slots are values with a life of their own: what a slot does to the shared
file system happens also while the agent is stopped, and sometimes after it is dead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from jobrunner.control.messages import (
    Beat,
    BeatAck,
    BlockOffer,
    EndCause,
    Failed,
    GetMapOutputs,
    GetWinners,
    HostInfo,
    Instruct,
    LeaderIs,
    LossKind,
    MapOutputs,
    OfferBlocks,
    Offered,
    Registered,
    RegisterWorker,
    Report,
    Reported,
    ReportLostOutput,
    Start,
    TaskKind,
    Winners,
)
from jobrunner.errors import JobEnded, JobrunnerError, SessionEnded, UnknownJob
from jobrunner.ids import AttemptId, JobId, Token
from jobrunner.worker import attempts as core
from tests.simulation.control_network import Actor, Caller
from tests.simulation.control_tasks import Run
from tests.simulation.raft_world import MS

if TYPE_CHECKING:
    from tests.simulation.control_world import ControlWorld

AGENT_TICK_US = 100 * MS
RETRY_US = 50 * MS


@dataclass(eq=False)
class Slot:
    """A child process."""

    number: int
    alive: bool = True
    run: Run | None = None


class SimWorker(Actor):
    def __init__(self, world: ControlWorld, name: str, number: int) -> None:
        super().__init__(world, name)
        self.number = number
        self.blocks: dict[Token, BlockOffer] = {}  # The disk.

    # --- the process -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.begin()
        rng = self.world.rng
        self.slots_max = rng.randint(1, 3)
        self.core = core.Attempts(self.slots_max, slot_attempts_max=rng.choice((2, 1000)))
        self.caller = Caller(self)
        self.slots: dict[int, Slot] = {}
        self._answers: dict[tuple[str, ...], msgspec.Struct] = {}
        self._early: deque[Instruct] = deque(maxlen=64)
        self._lost: deque[tuple[AttemptId, list[AttemptId], LossKind]] = deque()
        self._asking = False  # A report, or what comes before it, is not answered.
        self._beats = 0  # The line of beats that goes on; 0 while there is none.
        self._lines = 0
        self.woke_us = -1
        self.world.note(f"{self.name} starts")
        self._tick()
        self._register()

    def crash(self, *, power: bool) -> None:
        """The agent dies, its children with it; a step of a commit may still do what it was about to."""
        self.end()
        for slot in self.slots.values():
            slot.alive = slot.run is not None and slot.run.is_step and self.world.rng.random() < 0.3
        if power:
            for token in [token for token in self.blocks if self.world.rng.random() < 0.3]:
                del self.blocks[token]
        self.world.note(f"{self.name} crashes")

    def wake(self) -> None:
        self.woke_us = self.world.now_us
        super().wake()

    def _tick(self) -> None:
        self.perform(self.core.tick(self.world.now_us / 1_000_000))
        self.later(AGENT_TICK_US, self._tick)

    # --- the session -------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        found = [self.blocks[token] for token in sorted(self.blocks)]
        hello = RegisterWorker(
            self.name, f"{self.name}-{self.life}", self.number, self.name, self.life,
            HostInfo(self.name, "boot", "pids"), self.slots_max,
        )  # fmt: skip
        self.caller.ask(hello, lambda answer: self._registered(answer, found), self._not_possible)

    def _registered(self, answer: msgspec.Struct, found: list[BlockOffer]) -> None:
        assert isinstance(answer, Registered), answer
        self.core.registered(answer.session, answer.epoch)
        early = list(self._early)
        self._early.clear()
        for message in early:
            self.perform(self.core.instruct(message))
        if found:
            self._offer(found)
        else:
            self._settle(set())

    def _settle(self, kept: set[JobId]) -> None:
        """The answers to offers are here: report what an earlier session left, forget the rest, then live."""
        self._asking = False
        self._report()
        session = self.core.session

        def settled() -> None:
            if session != self.core.session:
                return
            if self.core.reports(1):
                self.later(MS, settled)
                return
            for job in {block.attempt.job: None for block in self.blocks.values() if block.attempt.job not in kept}:
                self._forget(job)
            self._wake_beat()

        settled()

    def _not_possible(self, error: JobrunnerError) -> None:
        raise AssertionError(f"{self.name}: {type(error).__name__}: {error}")

    def _beat(self, number: int) -> None:
        """One line of beats a session; a wake-up starts the next at once."""
        if number != self._beats:
            return
        beat = Beat(self.core.session, self.core.epoch, self.core.sequence, self.core.held())
        beat_us = self.world.cluster_settings.session.beat_ms * MS

        def answered(answer: msgspec.Struct) -> None:
            assert isinstance(answer, BeatAck)
            self.core.leader(answer.epoch)
            self.later(beat_us, lambda: self._beat(number))

        def refused(error: JobrunnerError) -> None:
            if isinstance(error, SessionEnded):
                self._over(beat.session)
            else:
                self.later(beat_us, lambda: self._beat(number))

        self.caller.ask(beat, answered, refused, timeout_us=beat_us, for_us=beat_us)

    def _wake_beat(self) -> None:
        self._lines += 1
        self._beats = self._lines
        self._beat(self._beats)

    def _over(self, session: int) -> None:
        if session != self.core.session or not session:
            return
        if self.woke_us >= 0 and self.world.now_us - self.woke_us < 300 * MS:
            self.world.mark("worker paused past its lease")
        self.world.mark("session ended")
        self.world.note(f"{self.name}: session {session} is over")
        self._lost.clear()
        self._beats = 0
        self._asking = True  # Until the next session lives.
        self.perform(self.core.session_ended())
        self._register_when_idle()

    def _register_when_idle(self) -> None:
        if self.slots:
            self.later(10 * MS, self._register_when_idle)
        else:
            self._register()

    def _offer(self, found: list[BlockOffer]) -> None:
        """Before the first beat."""
        session = self.core.session
        self._asking = True

        def answered(answer: msgspec.Struct) -> None:
            assert isinstance(answer, Offered)
            if session != self.core.session:
                return
            kept = set()
            for block, keep in zip(found, answer.keep, strict=True):
                if not keep:
                    self.blocks.pop(block.token, None)
                else:
                    kept.add(block.attempt.job)
                    self.world.mark("block kept after a restart")
            self._settle(kept)

        def refused(error: JobrunnerError) -> None:
            assert isinstance(error, SessionEnded), error
            self._over(session)

        self.caller.ask(OfferBlocks(session, found), answered, refused)

    def _report(self) -> None:
        """Lost output first, then ends; one request at a time, each until answered."""
        session = self.core.session
        if self._asking or not session:
            return
        if self._lost:
            reader, lost, kind = self._lost[0]
            self._asking = True
            message = ReportLostOutput(session, reader, lost, kind)
            refused = lambda error: self._ask_failed(error, session)  # noqa: E731
            self.caller.ask(message, lambda answer: self._told_lost(session), refused)
            return
        reports = self.core.reports(self.world.rng.choice((1, 2, 1000)))
        if not reports:
            return
        self._asking = True

        def answered(answer: msgspec.Struct) -> None:
            assert isinstance(answer, Reported)
            for report, verdict in zip(reports, answer.verdicts, strict=True):
                self.world.control.told(report, verdict)
            if session == self.core.session:
                self.perform(self.core.verdicts(reports, answer.verdicts))
                self._asking = False
                self._report()

        self.caller.ask(Report(session, reports), answered, lambda error: self._ask_failed(error, session))

    def _told_lost(self, session: int) -> None:
        if session == self.core.session:
            self._lost.popleft()
            self._asking = False
            self._report()

    def _ask_failed(self, error: JobrunnerError, session: int) -> None:
        """As in `Session._ask`: only the end of the session is an end; all else is asked again."""
        if session != self.core.session:
            return
        if isinstance(error, SessionEnded):
            self._over(session)
            return

        def again() -> None:
            if session == self.core.session:
                self._asking = False
                self._report()

        self.later(RETRY_US, again)

    # --- from the masters --------------------------------------------------------------------------------------------

    def pushed(self, message: msgspec.Struct) -> None:
        if isinstance(message, LeaderIs):
            self.caller.leader_is(message.epoch, message.address)
            if self.core.leader(message.epoch) and self._beats:
                self._wake_beat()
        elif isinstance(message, Instruct):
            if message.session > self.core.session:
                self._early.append(message)
            else:
                self.perform(self.core.instruct(message))

    # --- what the core decided ---------------------------------------------------------------------------------------

    def perform(self, actions: Sequence[core.Action]) -> None:
        for action in actions:
            self._perform(action)
        self._report()

    def _perform(self, action: core.Action) -> None:
        match action:
            case core.Prepare(start):
                self.world.control.started(self.name, start)
                self.later(self.world.rng.randint(0, 5 * MS), lambda: self._prepare(start))
            case core.StartSlot(number, _):
                self.slots[number] = Slot(number)
            case core.RunAttempt(number, start):
                slot = self.slots[number]
                slot.run = Run(self, slot, start, self._answers.get(_answer_key(start)))
                slot.run.begin()
            case core.KillSlot(number, _):
                self.later(self.world.rng.randint(100, 5 * MS), lambda: self.slot_exits(number, EndCause.SIGNAL))
            case core.DeleteFiles(start):
                self._delete(start)
            case core.ForgetJob(job):
                self._forget(job)

    def _prepare(self, start: Start) -> None:
        """Fetch what the attempt needs; again until it is there, or the attempt is withdrawn."""
        key = _answer_key(start)
        if not self.core.knows(start.token):
            return
        if not key or key in self._answers:
            self.perform(self.core.prepared(start.token, self.world.attempt_timeout_s))
            return
        question: msgspec.Struct = GetWinners(start.attempt.job)
        if start.kind is TaskKind.REDUCE:
            question = GetMapOutputs(start.attempt.job, start.map_stage, start.version)

        def answered(answer: msgspec.Struct) -> None:
            assert isinstance(answer, MapOutputs | Winners)
            self._answers[key] = answer
            self._prepare(start)

        def refused(error: JobrunnerError) -> None:
            if isinstance(error, UnknownJob | JobEnded):
                self.perform(self.core.ended(Failed(start.attempt, start.token, EndCause.OPERATOR, str(error))))
            else:
                self.later(RETRY_US, lambda: self._prepare(start))

        self.caller.ask(question, answered, refused, for_us=500 * MS)

    def _delete(self, start: Start) -> None:
        if start.kind is TaskKind.MAP:
            self.blocks.pop(start.token, None)
        self.world.outputs.delete(start.attempt.job, start.attempt.partition, start.token)

    def _forget(self, job: JobId) -> None:
        for token in [token for token, block in self.blocks.items() if block.attempt.job == job]:
            del self.blocks[token]
        for key in [key for key in self._answers if key[1] == job]:
            del self._answers[key]

    # --- from its slots ----------------------------------------------------------------------------------------------

    def fetched(self, token: Token) -> None:
        """A reduce has all its input."""
        self.core.fetched(token)
        if self._beats:
            self._wake_beat()

    def slot_exits(self, number: int, cause: EndCause) -> None:
        slot = self.slots.pop(number, None)
        if slot is not None:
            slot.alive = False
            self.perform(self.core.slot_exited(number, cause, f"slot ended: {cause}"))

    def cannot_read(self, start: Start, lost: list[AttemptId], kind: LossKind) -> None:
        if not self.core.knows(start.token):
            return
        self.world.mark(f"lost input: {kind}")
        self._lost.append((start.attempt, lost, kind))
        self.perform(self.core.ended(Failed(start.attempt, start.token, EndCause.LOST_INPUT, "map output is gone")))


def _answer_key(start: Start) -> tuple[str, ...]:
    """What has to be asked of the leader for this attempt; () for nothing."""
    if start.kind is TaskKind.REDUCE:
        return ("outputs", start.attempt.job, start.map_stage, str(start.version))
    if start.kind is TaskKind.PUBLISH:
        return ("winners", start.attempt.job)
    return ()
