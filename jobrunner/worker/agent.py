"""The agent: a worker's one long-lived process with a loop, between the masters and its children.

It does what `attempts` decides, and never runs user code, unpickles, or waits for any child. It serves its block files
and logs on its one port. Killed, its children die with it; stopped and woken, it hears "session ended" first, and
whatever its children finished late is answered LOST or GONE and deleted.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from jobrunner.commit.backends import PosixCommit
from jobrunner.control.messages import (
    BlockOffer,
    EndCause,
    Failed,
    GetJob,
    Instruct,
    JobStatus,
    LeaderIs,
    RegisterWorker,
    Sealable,
    Start,
    TaskKind,
    Verdict,
    message_decoder,
)
from jobrunner.errors import (
    CorruptData,
    JobEnded,
    JobrunnerError,
    Refused,
    Unavailable,
    UnknownJob,
)
from jobrunner.failpoints import failpoint
from jobrunner.hosts import this_host
from jobrunner.ids import JobId, Token
from jobrunner.planner.plan import JobPlan
from jobrunner.rpc.client import Masters
from jobrunner.rpc.connection import Connection
from jobrunner.shuffle.blocks import block_path, scan_blocks
from jobrunner.worker import attempts as core
from jobrunner.worker import wire
from jobrunner.worker.config import AgentConfig
from jobrunner.worker.files import delete_attempt, delete_leftovers, drop_job, jobs_left, open_directory
from jobrunner.worker.http import make_server
from jobrunner.worker.logs import AttemptLog, log_directory, prune_logs
from jobrunner.worker.needs import Needs
from jobrunner.worker.pool import ImportFailure, Pool
from jobrunner.worker.session import Session
from jobrunner.worker.template import TemplateHandle

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_COMMIT_TIMEOUT_S = 600.0  # At least: a user's short attempt.timeout_ms is about their functions.
_RETRY_S = 0.5  # Between tries to fetch what an attempt needs.
_LATE_S = 1.0  # Between looks at a job that has ended and is not yet cleaned up.
_EARLY_MAX = 64  # Instructions kept for a session that is about to begin; the leader sends again what is lost.
_TEMPLATES_MAX = 4  # Templates of jobs without an attempt here are ended above this.


class Agent:
    """One worker. Made inside a running loop; `run` is its life."""

    def __init__(self, config: AgentConfig, template: TemplateHandle) -> None:
        self.config = config
        self.address = ""
        self._settings = config.settings
        self._core = core.Attempts(config.slots, slot_attempts_max=config.settings.attempt.slot_attempts_max)
        self._directory = open_directory(config.directory, config.cluster_id)
        self._blocks = Path(self._directory.below("blocks"))
        self._pool = Pool(template, self)
        self._decoder = message_decoder()
        self._early: deque[Instruct] = deque(maxlen=_EARLY_MAX)
        self._stopping: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scratch: dict[int, str] = {}  # By slot, of those that ran something.
        self._preparing: dict[Token, asyncio.Task[None]] = {}
        self._fetched = False  # A reduce has all its input since the last tick.
        self._server = make_server(config, identity=self._directory.uuid, blocks=self._blocks)

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Until told to stop (0), or something fatal; returns the exit status."""
        config = self.config
        delete_leftovers(self._directory)
        self.address = await self._server.start(config.listening, config.host, config.port)
        self._masters = Masters(
            config.masters,
            cluster_id=config.cluster_id,
            cluster_token=config.cluster_token,
            role="worker",
            identity=self._directory.uuid,
            name=f"worker-{config.name}",
            decode=self._decoder.decode,
            on_push=self._pushed,
            settings=self._settings,
        )
        self._needs = Needs(self._directory, self._masters, self._settings)
        hello = RegisterWorker(
            self._directory.uuid, uuid.uuid4().hex, config.name, self.address, os.getpid(), this_host(), config.slots
        )
        self._session = Session(self, self._core, self._masters, hello, self._settings)
        logger.info("worker-%d serves at %s, %d slots", config.name, self.address, config.slots)
        self._spawn(self._session.run())
        self._spawn(self._tick())
        try:
            return await self._stopping
        finally:
            await self._shut_down()

    def stop(self, status: int = 0) -> None:
        """End `run`; a status that is already decided stays."""
        if not self._stopping.done():
            self._stopping.set_result(status)

    async def _shut_down(self) -> None:
        for task in (*self._tasks, *self._preparing.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._preparing.values(), return_exceptions=True)
        await self._pool.close(self._settings.worker.stop_timeout_ms / 1000)
        await self._masters.close()
        await self._server.stop()
        os.close(self._directory.lock)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a part of the agent whose failure is the agent's."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._part_done)

    def _part_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, JobrunnerError):
            logger.error("%s", error)
            self.stop(error.exit_status)
        elif error is not None:
            logger.error("the agent failed", exc_info=error)
            self.stop(1)

    async def _tick(self) -> None:
        while True:
            self.perform(self._core.tick(time.monotonic()))
            if self._fetched:
                self._fetched = False
                self._session.wake_beat()  # Before a worker is lost: the leader then leaves these reduces alone.
            await asyncio.sleep(_TICK_S)

    # --- from the masters --------------------------------------------------------------------------------------------

    def _pushed(self, connection: Connection, message: msgspec.Struct) -> None:
        if isinstance(message, LeaderIs):
            self._masters.leader_is(message.epoch, message.address)
            if message.address and self._core.leader(message.epoch):
                self._session.wake_beat()
        elif isinstance(message, Instruct):
            if message.session > self._core.session:
                self._early.append(message)  # It overtook the answer that gives us this session.
            else:
                self._instruct(message)
        else:
            logger.warning("%s pushes %s to a worker", connection.peer, type(message).__name__)

    def _instruct(self, message: Instruct) -> None:
        if any(isinstance(item, Start) for item in message.items):
            failpoint("worker.assigned")
        self.perform(self._core.instruct(message))

    def session_begins(self) -> None:
        early = list(self._early)
        self._early.clear()
        for message in early:
            self._instruct(message)

    # --- what the core decided ---------------------------------------------------------------------------------------

    def perform(self, actions: Sequence[core.Action]) -> None:
        """Carry out the core's actions in order. An action that fails is a bug, and leaves us wrong about what runs."""
        try:
            for action in actions:
                self._perform(action)
        except Exception:
            logger.exception("the agent failed")
            self.stop(1)
        if self._core.reporting:
            self._session.wake_report()

    def _perform(self, action: core.Action) -> None:
        match action:
            case core.Prepare(start):
                self._prepare(start)
            case core.Unprepare(token):
                if token in self._preparing:
                    self._preparing.pop(token).cancel()
            case core.StartSlot(slot, job):
                self._pool.start_slot(slot, job)
            case core.RunAttempt(slot, start):
                self._run(slot, start)
            case core.KillSlot(slot, why):
                logger.debug("slot %d ends: %s", slot, why)
                self._pool.kill_slot(slot)
            case core.Accepted(report, verdict):
                if verdict is Verdict.WON and isinstance(report, Sealable):
                    failpoint("commit.sealed")
                elif verdict is Verdict.ACCEPTED:
                    failpoint("map.reported")
            case core.DeleteFiles(start):
                self._delete(start)
            case core.ForgetJob(job):
                self._forget(job)
            case core.Refuse(why):
                logger.info("refused: %s", why)

    # --- preparing ---------------------------------------------------------------------------------------------------

    def _prepare(self, start: Start) -> None:
        """At once if all is here, so that a burst of short tasks costs no asyncio task each."""
        plan = self._needs.plan_if_here(start.plan)
        ready = start.kind not in core.USER_KINDS or self._pool.has_template(start.attempt.job)
        if plan is not None and ready and self._needs.answer_if_here(start) is not None:
            asyncio.get_running_loop().call_soon(self._prepared, start, plan)
            return
        task = asyncio.create_task(self._fetch_needs(start))
        self._preparing[start.token] = task
        task.add_done_callback(lambda done: self._preparing.pop(start.token, None))

    def _prepared(self, start: Start, plan: JobPlan) -> None:
        timeout_s = plan.attempt.timeout_ms / 1000
        if start.kind not in core.USER_KINDS:
            timeout_s = max(timeout_s, _COMMIT_TIMEOUT_S)
        self.perform(self._core.prepared(start.token, timeout_s))

    async def _fetch_needs(self, start: Start) -> None:
        """Fetch until all is here; only an answer that no repeat will change ends the attempt."""
        while True:
            try:
                plan = await self._needs.plan(start.plan)
                if start.kind in core.USER_KINDS:
                    await self._import(start, plan)
                await self._needs.answer(start)
                self._prepared(start, plan)
                return None
            except ImportFailure as failure:
                return self._failed(start, failure.cause, failure.message, failure.traceback)
            except (UnknownJob, JobEnded) as error:
                return self._failed(start, EndCause.OPERATOR, str(error))
            except (Unavailable, CorruptData, Refused) as error:  # Another master may have it, or have it whole.
                logger.warning("%s waits: %s", start.attempt, error)
                await asyncio.sleep(_RETRY_S)
            except (OSError, JobrunnerError) as error:
                return self._failed(start, EndCause.STORAGE, str(error))
            except Exception as error:  # Ours, but the attempt must end: nobody else would ever say that it cannot run.
                logger.exception("%s: preparing it failed", start.attempt)
                return self._failed(start, EndCause.STORAGE, f"{type(error).__name__}: {error}")

    async def _import(self, start: Start, plan: JobPlan) -> None:
        job = start.attempt.job
        code = await self._needs.blob(plan.code)
        if not self._pool.has_template(job):
            self._end_idle_templates()
        log = AttemptLog(
            os.path.join(self.config.cluster_dir, "jobs", job, "logs", "import", f"worker-{self.config.name}"),
            bytes_max=plan.attempt.log_bytes_max,
            tail_bytes_max=plan.attempt.tail_bytes_max,
        )
        await self._pool.template(
            job,
            code=code,
            plan=await self._needs.blob(start.plan),
            import_timeout_ms=plan.attempt.import_timeout_ms,
            log=log,
        )

    def _end_idle_templates(self) -> None:
        kept = self._pool.jobs()
        idle = [job for job in kept if job not in self._core.jobs()]
        for job in idle[: max(0, len(kept) + 1 - _TEMPLATES_MAX)]:
            self._pool.forget(job)

    def _failed(self, start: Start, cause: EndCause, message: str, traceback: str = "") -> None:
        logger.warning("%s cannot start: %s", start.attempt, message)
        self.perform(self._core.ended(Failed(start.attempt, start.token, cause, message, traceback=traceback)))

    # --- slots -------------------------------------------------------------------------------------------------------

    def _run(self, slot: int, start: Start) -> None:
        plan = self._needs.plan_if_here(start.plan)
        answer = self._needs.answer_if_here(start)
        assert plan is not None and answer is not None, start
        log = AttemptLog(
            log_directory(self.config.cluster_dir, start.attempt),
            bytes_max=plan.attempt.log_bytes_max,
            tail_bytes_max=plan.attempt.tail_bytes_max,
        )
        scratch = self._scratch[slot] = self._directory.below("scratch", start.attempt.job, f"slot-{slot}")
        run = wire.Run(
            start,
            plan=self._directory.below("blobs", start.plan),
            directory=self._directory.path,
            scratch=scratch,
            directory_id=self._directory.uuid,
            cluster_token=self.config.cluster_token,
            answer=answer,
        )
        self._pool.run(slot, run, log)

    def said(self, slot: int, message: wire.FromSlot) -> None:
        """A slot's message; what an earlier attempt of a slot says late is no matter, tokens tell."""
        if isinstance(message, wire.Progress):
            self._core.progress(message.token)
            return
        if isinstance(message, wire.Fetched):
            self._core.fetched(message.token)
            self._fetched = True
            return
        if isinstance(message, wire.LostInput):
            start = self._core.running_on(slot)
            if start is None or start.token != message.token:
                return
            self._session.report_lost(start.attempt, message.lost, message.kind)
            report = Failed(start.attempt, start.token, EndCause.LOST_INPUT, message.message)
            self.perform(self._core.ended(report))
            return
        ended = message.report
        if isinstance(ended, Failed):
            ended = msgspec.structs.replace(ended, tail=self._pool.tail(slot))
            self._keep_traceback(slot, ended)
        self.perform(self._core.ended(ended))

    def slot_exited(self, slot: int, cause: EndCause, message: str) -> None:
        start = self._core.running_on(slot)
        if start is not None:
            logger.info("%s: %s", start.attempt, message)
        scratch = self._scratch.pop(slot, None)
        if scratch is not None:
            self._spawn(asyncio.to_thread(shutil.rmtree, scratch, True))
        self.perform(self._core.slot_exited(slot, cause, message, self._pool.tail(slot)))

    def base_lost(self) -> None:
        logger.error("the template process is gone; a worker cannot go on without it")
        self.stop(1)

    def remark(self, text: str) -> None:
        logger.warning("%s", text)

    def _keep_traceback(self, slot: int, failed: Failed) -> None:
        log = self._pool.log(slot)
        if log is not None and failed.traceback:
            with contextlib.suppress(OSError):
                log.traceback(failed.traceback)

    # --- files -------------------------------------------------------------------------------------------------------

    def _delete(self, start: Start) -> None:
        """Delete what does not count, beside the loop."""
        plan = self._needs.plan_if_here(start.plan)
        self._spawn(asyncio.to_thread(delete_attempt, self._directory, start, plan))
        if start.kind is TaskKind.SETUP and plan is not None:
            self._spawn(self._clean_up_late(plan))

    async def _clean_up_late(self, plan: JobPlan) -> None:
        """A set-up that did not count may have made the stage of a job that is over and tidy: then nobody else will
        look there again."""
        while True:
            try:
                status = await self._masters.call(GetJob(plan.job))
            except UnknownJob:  # Over for so long that it is forgotten.
                break
            except (Unavailable, Refused) as error:
                logger.warning("%s: its stage may stay: %s", plan.job, error)
                return
            assert isinstance(status, JobStatus), status
            if status.tidy:
                break
            if status.finished_ms is None:
                return
            await asyncio.sleep(_LATE_S)  # Its clean-up may just have looked for the last time.
        try:
            await asyncio.to_thread(PosixCommit(plan).clean_up)
        except (JobrunnerError, OSError) as error:
            logger.warning("%s: its stage stays: %s", plan.job, error)

    def _forget(self, job: JobId) -> None:
        self._pool.forget(job)
        try:
            trash = drop_job(self._directory, job, self._needs.forget(job))
        except OSError as error:
            logger.warning("%s: its files stay: %s", job, error)
        else:
            self._spawn(asyncio.to_thread(shutil.rmtree, trash, True))
        limits = self._settings.limits
        self._spawn(
            asyncio.to_thread(prune_logs, self.config.cluster_dir, limits.jobs_kept_max + limits.jobs_running_max)
        )

    def forget_all_but(self, jobs: set[JobId]) -> None:
        for job in (jobs_left(self._directory) | set(self._pool.jobs())) - jobs - self._core.jobs():
            self._forget(job)  # Not what this session has already brought an attempt of.

    async def idle(self) -> None:
        while self._pool.slots():
            await asyncio.sleep(0.01)

    async def found_blocks(self) -> list[BlockOffer]:
        return await asyncio.to_thread(scan_blocks, self._blocks)

    async def drop_blocks(self, blocks: Sequence[BlockOffer]) -> None:
        def delete() -> None:
            for block in blocks:
                with contextlib.suppress(OSError):
                    block_path(self._blocks, block.attempt, block.token).unlink(missing_ok=True)

        await asyncio.to_thread(delete)
