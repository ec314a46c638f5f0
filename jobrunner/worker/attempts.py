"""What should run on this worker against what runs: instructions and ends in, actions out.

    Start ──► PREPARING ──prepared──► READY ──a slot──► RUNNING ──► an Ended report ──verdict──► forgotten
                  └─────────────────────┴── Stop, Forget, session over: withdrawn or killed, nothing is reported

Fenced: an instruction of a lower epoch, of another session, or not above the last sequence is refused whole; a Start
whose token is not above the highest accepted is refused alone. A result that may be a winner is kept, with its files,
until a master has given its verdict: not even the end of the session drops it.
Slots belong to one job; steps of the commit have a small pool of their own, so that a full worker still commits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush

from jobrunner.control.messages import (
    EndCause,
    Ended,
    Failed,
    Forget,
    Held,
    Instruct,
    MapDone,
    Sealable,
    Start,
    Stop,
    TaskKind,
    Verdict,
)
from jobrunner.ids import AttemptId, Epoch, JobId, SessionId, Token

GAP_S = 1.0  # Ticks further apart than this mean that the process was stopped: nobody is blamed for the gap.
USER_KINDS = frozenset({TaskKind.MAP, TaskKind.REDUCE})


@dataclass(frozen=True, slots=True)
class Prepare:
    """Fetch what the attempt needs, start its job's template; then call `prepared` or `ended`."""

    start: Start


@dataclass(frozen=True, slots=True)
class Unprepare:
    """Stop preparing."""

    token: Token


@dataclass(frozen=True, slots=True)
class StartSlot:
    """Fork a slot; `job` None: from the base template, for steps of the commit."""

    slot: int
    job: JobId | None


@dataclass(frozen=True, slots=True)
class RunAttempt:
    slot: int
    start: Start


@dataclass(frozen=True, slots=True)
class KillSlot:
    """Kill the slot's process group; `slot_exited` follows."""

    slot: int
    why: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verdict that the result counts: its files stay until the job is forgotten."""

    report: Ended
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class DeleteFiles:
    """Nothing of this attempt counts, nor ever will."""

    start: Start


@dataclass(frozen=True, slots=True)
class ForgetJob:
    """Delete the job's blocks and working directories here; end its template."""

    job: JobId


@dataclass(frozen=True, slots=True)
class Refuse:
    """An instruction was not followed; for the agent's log."""

    why: str


Action = (
    Prepare | Unprepare | StartSlot | RunAttempt | KillSlot | Accepted | DeleteFiles | ForgetJob | Refuse
)  # What the agent is to do, in this order.


class Phase(StrEnum):
    PREPARING = "preparing"
    READY = "ready"
    RUNNING = "running"
    ENDED = "ended"  # Reported until there is a verdict.


@dataclass(slots=True)
class _Attempt:
    start: Start
    phase: Phase = Phase.PREPARING
    slot: int = 0
    timeout_s: float = 0.0
    progress_at: float = 0.0
    fetched: bool = False
    report: Ended | None = None


@dataclass(slots=True)
class _Slot:
    job: JobId | None
    token: Token | None = None  # Of the attempt it runs.
    runs: int = 0
    ending: tuple[EndCause, str] | None = (
        None  # It is being killed; report this then, instead of the signal that killed it.
    )
    dying: bool = False


class Attempts:
    """All that one worker has been told to do. One writer: the agent's loop."""

    def __init__(self, slots_max: int, commit_slots_max: int = 2, slot_attempts_max: int = 1000) -> None:
        self.slots_max = slots_max
        self.commit_slots_max = commit_slots_max
        self.slot_attempts_max = slot_attempts_max
        self.epoch = Epoch(0)
        self.session = SessionId(0)  # 0: none.
        self.sequence = 0  # Every Instruct of `epoch` up to this one was accepted, or is void.
        self._sequence_last = 0  # Of the last Instruct accepted: above `sequence` if one before it is missing.
        self.token_peak = Token(0)
        self._attempts: dict[Token, _Attempt] = {}
        self._ready: dict[bool, list[Token]] = {True: [], False: []}  # Heaps: user code, steps of the commit.
        self._ended: set[Token] = set()  # Those of `_attempts` that wait for a verdict.
        self._slots: dict[int, _Slot] = {}
        self._slot_last = 0
        self._now: float | None = None

    # --- from the masters --------------------------------------------------------------------------------------------

    def registered(self, session: SessionId, epoch: Epoch) -> None:
        """There is a session; instructions of any other are refused from here on."""
        if session != self.session:
            self.session, self.sequence, self._sequence_last = session, 0, 0
        self.leader(epoch)

    def leader(self, epoch: Epoch) -> bool:
        """A leader of `epoch` is known; True if it is newer than any before."""
        if epoch <= self.epoch:
            return False
        self.epoch, self.sequence, self._sequence_last = epoch, 0, 0
        return True

    def instruct(self, message: Instruct) -> list[Action]:
        """Follow the leader's instruction, or refuse it."""
        if message.session != self.session:
            return [Refuse(f"instruction for session {message.session}, ours is {self.session}")]
        if message.epoch < self.epoch:
            return [Refuse(f"instruction of epoch {message.epoch}, the leader's is {self.epoch}")]
        self.leader(message.epoch)
        if message.sequence <= self._sequence_last:
            return [Refuse(f"instruction {message.sequence} again, have had {self._sequence_last}")]
        self._sequence_last = message.sequence
        self.sequence = max(self.sequence, message.void)
        if message.sequence == self.sequence + 1:
            self.sequence = message.sequence
        actions: list[Action] = []
        for item in message.items:
            if isinstance(item, Start):
                actions += self._start(item)
            elif isinstance(item, Stop):
                actions += self._withdraw(item.token, f"stopped: {item.cause}")
            else:
                actions += self._forget(item)
        return actions + self._fill()

    def verdicts(self, reports: Iterable[Ended], verdicts: Iterable[Verdict]) -> list[Action]:
        """The leader's answer to a Report, item by item."""
        actions: list[Action] = []
        for report, verdict in zip(reports, verdicts, strict=True):
            attempt = self._attempts.get(report.token)
            if attempt is None or attempt.phase is not Phase.ENDED:
                continue  # Forgotten meanwhile.
            self._drop(report.token)
            if verdict in (Verdict.ACCEPTED, Verdict.WON):
                actions.append(Accepted(report, verdict))
            if verdict is Verdict.REFUSED:
                actions.append(Refuse(f"{report.attempt}: its token has sealed something else; its files stay"))
            if verdict in (Verdict.LOST, Verdict.GONE) or isinstance(report, Failed):
                actions.append(DeleteFiles(attempt.start))
        return actions

    def session_ended(self) -> list[Action]:
        """The session is over: everything stops. What may be a winner is still reported, in the next session."""
        self.session, self.sequence, self._sequence_last = SessionId(0), 0, 0
        actions: list[Action] = []
        for token, attempt in list(self._attempts.items()):
            if attempt.phase is not Phase.ENDED:
                actions += self._withdraw(token, "the session is over")
            elif not isinstance(attempt.report, Sealable):
                # A finished map output is offered after registering; what failed is lost with the session anyway.
                self._drop(token)
                if not isinstance(attempt.report, MapDone):
                    actions.append(DeleteFiles(attempt.start))
        actions += [self._kill(number, "the session is over") for number, slot in self._slots.items() if not slot.dying]
        return actions

    # --- from this host ----------------------------------------------------------------------------------------------

    def prepared(self, token: Token, timeout_s: float) -> list[Action]:
        """All that the attempt needs is here; it may run for `timeout_s` without progress."""
        attempt = self._attempts.get(token)
        if attempt is None or attempt.phase is not Phase.PREPARING:
            return []
        attempt.phase, attempt.timeout_s = Phase.READY, timeout_s
        heappush(self._ready[attempt.start.kind in USER_KINDS], token)
        return self._fill()

    def progress(self, token: Token) -> None:
        """The attempt read or wrote a record."""
        attempt = self._attempts.get(token)
        if attempt is not None:
            attempt.progress_at = self._now or 0.0

    def fetched(self, token: Token) -> None:
        """The attempt, a reduce, has all its input here."""
        attempt = self._attempts.get(token)
        if attempt is not None:
            attempt.fetched = True

    def ended(self, report: Ended) -> list[Action]:
        """An attempt ended, by its own word or while it was prepared. One that was stopped meanwhile is ignored."""
        attempt = self._attempts.get(report.token)
        if attempt is None or attempt.phase is Phase.ENDED:
            return []
        actions: list[Action] = []
        if attempt.phase is Phase.RUNNING:
            slot = self._slots[attempt.slot]
            slot.token = None
            if slot.dying:
                slot.ending = None  # It finished in the instant before it was killed.
            elif isinstance(report, Failed) or slot.runs >= self.slot_attempts_max:
                actions.append(self._kill(attempt.slot, "a fresh process for the next attempt"))
        self._end(attempt, report)
        return actions + self._fill()

    def slot_exited(self, number: int, cause: EndCause, message: str, tail: str = "") -> list[Action]:
        """A slot's process is gone, and all that it said was heard."""
        slot = self._slots.pop(number, None)
        if slot is None:
            return []
        attempt = self._attempts.get(slot.token) if slot.token is not None else None
        if attempt is not None and attempt.phase is Phase.RUNNING:
            if slot.ending is not None:
                cause, message = slot.ending
            self._end(attempt, Failed(attempt.start.attempt, attempt.start.token, cause, message, tail=tail))
        return self._fill()

    def tick(self, now: float) -> list[Action]:
        """Time passes (monotonic seconds): kill what made no progress. A gap moves every deadline."""
        gap = 0.0 if self._now is None else now - self._now
        self._now = now
        actions: list[Action] = []
        for attempt in self._attempts.values():
            if attempt.phase is not Phase.RUNNING:
                continue
            if gap > GAP_S:
                attempt.progress_at += gap
            slot = self._slots[attempt.slot]
            if now - attempt.progress_at > attempt.timeout_s and not slot.dying:
                text = f"no record read or written and no progress() for {attempt.timeout_s:g} s"
                slot.ending = (EndCause.TIMEOUT, text)
                actions.append(self._kill(attempt.slot, text))
        return actions + self._fill()

    # --- what others read --------------------------------------------------------------------------------------------

    def held(self) -> list[Held]:
        """All attempts here, in order of token; one whose end is not yet acknowledged still counts as running."""
        return [
            Held(token, attempt.phase in (Phase.RUNNING, Phase.ENDED), attempt.fetched)
            for token, attempt in sorted(self._attempts.items())
        ]

    def reports(self, count_max: int) -> list[Ended]:
        """Ends without a verdict, oldest token first."""
        reports = (self._attempts[token].report for token in sorted(self._ended)[:count_max])
        return [report for report in reports if report is not None]

    @property
    def reporting(self) -> bool:
        """Something has ended and has no verdict yet."""
        return bool(self._ended)

    def running_on(self, number: int) -> Start | None:
        """What a slot runs."""
        slot = self._slots.get(number)
        attempt = self._attempts.get(slot.token) if slot is not None and slot.token is not None else None
        return attempt.start if attempt is not None else None

    def knows(self, token: Token) -> bool:
        return token in self._attempts

    def jobs(self) -> set[JobId]:
        """Jobs with an attempt here."""
        return {attempt.start.attempt.job for attempt in self._attempts.values()}

    def phase(self, attempt: AttemptId) -> Phase | None:
        """Where an attempt stands, for its logs and for tests."""
        for held in self._attempts.values():
            if held.start.attempt == attempt:
                return held.phase
        return None

    # --- steps -------------------------------------------------------------------------------------------------------

    def _start(self, start: Start) -> list[Action]:
        if start.token <= self.token_peak:
            return [Refuse(f"{start.attempt}: token {start.token} is not above {self.token_peak}")]
        self.token_peak = start.token
        self._attempts[start.token] = _Attempt(start)
        return [Prepare(start)]

    def _end(self, attempt: _Attempt, report: Ended) -> None:
        attempt.phase, attempt.report = Phase.ENDED, report
        self._ended.add(attempt.start.token)

    def _drop(self, token: Token) -> None:
        self._attempts.pop(token, None)
        self._ended.discard(token)

    def _withdraw(self, token: Token, why: str) -> list[Action]:
        """Drop an attempt; nothing is reported. One that has ended waits for its verdict: it may be the winner."""
        attempt = self._attempts.get(token)
        if attempt is None or attempt.phase is Phase.ENDED:
            return []
        self._drop(token)
        if attempt.phase is not Phase.RUNNING:
            return [Unprepare(token)]
        slot = self._slots[attempt.slot]
        slot.token = slot.ending = None
        actions: list[Action] = [] if slot.dying else [self._kill(attempt.slot, why)]
        return [*actions, DeleteFiles(attempt.start)]

    def _forget(self, item: Forget) -> list[Action]:
        actions: list[Action] = []
        for token, attempt in list(self._attempts.items()):
            if attempt.start.attempt.job == item.job:
                actions += self._withdraw(token, "the job has ended")
                self._drop(token)  # Its report too: no verdict on it can matter any more.
        for number, slot in self._slots.items():
            if slot.job == item.job and not slot.dying:
                actions.append(self._kill(number, "the job has ended"))
        return [*actions, ForgetJob(item.job)]

    def _kill(self, number: int, why: str) -> KillSlot:
        self._slots[number].dying = True
        return KillSlot(number, why)

    def _fill(self) -> list[Action]:
        """Give what is ready a slot, oldest token first. What finds none leaves none for those after it."""
        actions: list[Action] = []
        for user, ready in self._ready.items():
            while ready:
                attempt = self._attempts.get(ready[0])
                if attempt is not None and attempt.phase is Phase.READY:
                    placed = self._place(attempt, user=user)
                    if not placed:
                        break
                    actions += placed
                heappop(ready)
        return actions

    def _place(self, attempt: _Attempt, *, user: bool) -> list[Action]:
        """Run it in an idle slot of its job, in a new slot, or in the place of an idle one of another job."""
        job = attempt.start.attempt.job if user else None
        pool = {
            number: slot for number, slot in self._slots.items() if not slot.dying and (slot.job is not None) == user
        }
        actions: list[Action] = []
        idle = [number for number, slot in pool.items() if slot.token is None]
        own = next((number for number in idle if pool[number].job == job), None)
        if own is None:
            if len(pool) >= (self.slots_max if user else self.commit_slots_max):
                if not idle:
                    return []
                actions.append(self._kill(idle[0], "its slot goes to another job"))
            self._slot_last += 1
            own = self._slot_last
            self._slots[own] = _Slot(job)
            actions.append(StartSlot(own, job))
        slot = self._slots[own]
        slot.token, slot.runs = attempt.start.token, slot.runs + 1
        attempt.phase, attempt.slot, attempt.progress_at = Phase.RUNNING, own, self._now or 0.0
        return [*actions, RunAttempt(own, attempt.start)]
