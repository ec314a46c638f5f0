"""The agent's side of its session: registered, kept alive by beats, told what ended; and anew when it is over.

A beat never waits for anything but the leader, and says all that the worker holds. Reports are repeated until there is
a verdict; without a leader they wait, and attempts go on. Only a master's "session ended" stops them.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from jobrunner.control.messages import (
    Ack,
    Beat,
    BeatAck,
    BlockOffer,
    Ended,
    LossKind,
    OfferBlocks,
    Offered,
    Registered,
    RegisterWorker,
    Report,
    Reported,
    ReportLostOutput,
)
from jobrunner.errors import Denied, Refused, SessionEnded, Unavailable
from jobrunner.failpoints import failpoint
from jobrunner.ids import AttemptId, JobId
from jobrunner.rpc.client import Masters
from jobrunner.spec.settings import Settings
from jobrunner.worker.attempts import Action, Attempts

logger = logging.getLogger(__name__)

_PAUSE_S = 0.2  # After an answer that is neither a result nor the end of the session.
_REPORT_COUNT_MAX = 2_000
_OFFER_COUNT_MAX = 2_000
_Reply = TypeVar("_Reply", bound=msgspec.Struct)
_Row = TypeVar("_Row", Ended, BlockOffer, AttemptId)


class SessionOwner(Protocol):
    """The agent."""

    def perform(self, actions: Sequence[Action]) -> None: ...

    def session_begins(self) -> None:
        """There is a session: follow what was said in it before."""
        ...

    async def idle(self) -> None:
        """Wait until no slot is left."""
        ...

    async def found_blocks(self) -> list[BlockOffer]:
        """Block files on disk; nothing runs meanwhile."""
        ...

    async def drop_blocks(self, blocks: Sequence[BlockOffer]) -> None: ...

    def forget_all_but(self, jobs: set[JobId]) -> None:
        """Forget every other job that left something here: no master remembers that we had any of it."""
        ...


class Session:
    """One worker's sessions, one after another. All of it runs in the agent's loop."""

    def __init__(
        self, owner: SessionOwner, core: Attempts, masters: Masters, hello: RegisterWorker, settings: Settings
    ) -> None:
        self._owner = owner
        self._core = core
        self._masters = masters
        self._hello = hello
        self._bytes_max = settings.limits.frame_bytes_max // 2
        self._beat_s = settings.session.beat_ms / 1000
        self._beat_due = asyncio.Event()
        self._report_due = asyncio.Event()
        self._lost: deque[tuple[AttemptId, list[AttemptId], LossKind]] = deque()

    def wake_beat(self) -> None:
        """A new leader is known: it has heard nothing of us yet."""
        self._beat_due.set()

    def wake_report(self) -> None:
        """Something ended."""
        self._report_due.set()

    def report_lost(self, reader: AttemptId, lost: list[AttemptId], kind: LossKind) -> None:
        """Tell the masters, before the reader's own end, what it could not read. Of what is too much for one message,
        the first part: the next reader finds the rest."""
        self._lost.append((reader, self._fitting(lost), kind))
        self._report_due.set()

    async def run(self) -> None:
        """For ever. Raises Denied if the masters will not have this worker."""
        while True:
            blocks = await self._owner.found_blocks()
            registered = await self._ask(self._hello, Registered)
            self._core.registered(registered.session, registered.epoch)
            self._beat_s = registered.beat_ms / 1000
            logger.info("session %d of epoch %d", registered.session, registered.epoch)
            failpoint("worker.registered")
            self._owner.session_begins()
            await self._live(blocks)
            logger.warning("session %d is over: its attempts end here", registered.session)
            self._lost.clear()
            self._owner.perform(self._core.session_ended())
            await self._owner.idle()

    async def _live(self, blocks: list[BlockOffer]) -> None:
        """Until the session is over."""
        try:
            await self._settle(blocks)
        except SessionEnded:
            return
        tasks = [asyncio.create_task(part) for part in (self._beat(), self._report_all())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            error = task.exception() if not task.cancelled() else None
            if error is not None and not isinstance(error, SessionEnded):
                raise error

    async def _beat(self) -> None:
        while True:
            self._beat_due.clear()
            core = self._core
            beat = Beat(core.session, core.epoch, core.sequence, core.held())
            try:
                answer = await self._masters.call(beat, deadline_s=self._beat_s, timeout_s=self._beat_s)
            except (SessionEnded, Denied):
                raise
            except (Unavailable, Refused) as error:
                logger.debug("beat: %s", error)
            else:
                assert isinstance(answer, BeatAck), answer
                core.leader(answer.epoch)
            try:
                await asyncio.wait_for(self._beat_due.wait(), self._beat_s)
            except TimeoutError:
                continue

    async def _settle(self, blocks: list[BlockOffer]) -> None:
        """What is left of an earlier session counts or goes. Before the first beat: that brings work, and what is
        offered here need not run again."""
        kept: set[JobId] = set()
        session = self._core.session
        while blocks:
            some = self._fitting(blocks[:_OFFER_COUNT_MAX])
            blocks = blocks[len(some) :]
            offered = await self._ask(OfferBlocks(session, some), Offered)
            await self._owner.drop_blocks([block for block, keep in zip(some, offered.keep, strict=True) if not keep])
            kept |= {block.attempt.job for block, keep in zip(some, offered.keep, strict=True) if keep}
        while self._core.reporting:
            await self._report()
        self._owner.forget_all_but(kept)

    async def _report_all(self) -> None:
        self._report_due.set()
        while True:
            await self._report_due.wait()
            self._report_due.clear()
            while self._lost or self._core.reporting:
                await self._report()

    async def _report(self) -> None:
        while self._lost:
            reader, lost, kind = self._lost[0]
            await self._ask(ReportLostOutput(self._core.session, reader, lost, kind), Ack)
            self._lost.popleft()
        reports = self._fitting(self._core.reports(_REPORT_COUNT_MAX))
        if reports:
            answer = await self._ask(Report(self._core.session, reports), Reported)
            self._owner.perform(self._core.verdicts(reports, answer.verdicts))

    def _fitting(self, rows: list[_Row]) -> list[_Row]:
        """The first of `rows` that fit one frame; one at least."""
        size = 0
        for count, row in enumerate(rows):
            size += len(msgspec.msgpack.encode(row))
            if size > self._bytes_max and count:
                return rows[:count]
        return rows

    async def _ask(self, message: msgspec.Struct, kind: type[_Reply]) -> _Reply:
        """The leader's answer, however long there is none. Raises SessionEnded, Denied."""
        while True:
            try:
                answer = await self._masters.call(message)
            except (SessionEnded, Denied):
                raise
            except (Unavailable, Refused) as error:
                logger.warning("%s: %s", type(message).__name__, error)
                await asyncio.sleep(_PAUSE_S)
            else:
                assert isinstance(answer, kind), answer
                return answer
