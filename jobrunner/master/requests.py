"""What a master answers: one method a request. Only the leader answers what is about jobs and workers.

A leader that was stopped, or is cut off, does not know that another leads: reads wait for a quorum to confirm it (the
barrier). `stale` reads do not, and any master answers them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jobrunner.control.messages import (
    Ack,
    AttemptList,
    Beat,
    BeatAck,
    BlobsHeld,
    GetAttempts,
    GetCluster,
    GetJob,
    GetMapOutputs,
    GetMember,
    GetWinners,
    HaveBlobs,
    JobList,
    JobStatus,
    KillJob,
    ListJobs,
    LossKind,
    MapOutputs,
    MemberInfo,
    OfferBlocks,
    Offered,
    PutBlob,
    Registered,
    RegisterWorker,
    Report,
    Reported,
    ReportLostOutput,
    SubmitJob,
    Submitted,
    TransferLeadership,
    Transferred,
    WaitJob,
    Winners,
)
from jobrunner.errors import NotLeader, Refused, SessionEnded
from jobrunner.ids import AttemptId, JobId, SessionId
from jobrunner.master import views
from jobrunner.master.commands import (
    AnyCommand,
    EndAttempts,
    Kill,
    LoseOutput,
    Offer,
    PutPiece,
    RegisterSession,
    Submit,
)
from jobrunner.master.leader import Leader
from jobrunner.master.lock_requests import LockRequests
from jobrunner.master.state import MasterState
from jobrunner.spec.settings import Settings


class Master(Protocol):
    """What requests need of the process around them."""

    state: MasterState
    settings: Settings

    def now(self) -> float: ...
    def wall_ms(self) -> int:
        """Unix milliseconds; for display."""
        ...

    def leading(self) -> Leader:
        """Raises NotLeader, with the leader's address if it is known."""
        ...

    async def propose(self, command: AnyCommand) -> Any:
        """Result of the command when applied; raises what refuses it, NotLeader, or Unknown."""
        ...

    async def barrier(self) -> None:
        """Return when this master leads, led after the call, and has applied all that was committed before it.

        Raises NotLeader.
        """
        ...

    async def transfer(self, slot: int) -> int:
        """Make the master of this slot lead; who leads then. Raises NotLeader, Refused, Unavailable."""
        ...

    def wake(self) -> None:
        """Run the leader's tick soon."""
        ...

    async def member_info(self) -> MemberInfo: ...
    async def cluster_info(self) -> msgspec.Struct: ...


@dataclass(eq=False, slots=True)
class _Waiter:
    job: JobId
    version: int
    tidy: bool
    future: asyncio.Future[None]


class Requests:
    """Dispatches requests of workers and clients."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._waiters: set[_Waiter] = set()
        self._locks = LockRequests(master)
        self._page_bytes = master.settings.limits.frame_bytes_max // 2
        self._handlers: dict[type, Callable[[Any], Awaitable[msgspec.Struct]]] = {
            RegisterWorker: self._register,
            Beat: self._beat,
            Report: self._report,
            OfferBlocks: self._offer,
            ReportLostOutput: self._lost_output,
            GetMapOutputs: self._map_outputs,
            GetWinners: self._winners,
            HaveBlobs: self._have_blobs,
            PutBlob: self._put_blob,
            SubmitJob: self._submit,
            KillJob: self._kill,
            GetJob: self._get_job,
            WaitJob: self._wait_job,
            ListJobs: self._list_jobs,
            GetAttempts: self._get_attempts,
            GetCluster: self._get_cluster,
            GetMember: self._get_member,
            TransferLeadership: self._transfer,
            **self._locks.handlers,
        }

    async def answer(self, message: msgspec.Struct) -> msgspec.Struct:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(f"{type(message).__name__} is not a request to a master")
        return await handler(message)

    # --- workers -----------------------------------------------------------------------------------------------------

    async def _register(self, message: RegisterWorker) -> Registered:
        leader = self._master.leading()
        session: SessionId = await self._master.propose(
            RegisterSession(message.directory, message.process, message.name, message.address, message.pid,
                            message.host, message.slots)
        )  # fmt: skip
        leader.leases.renew(session, self._master.now())  # Who asks again, for a lost reply, has not beaten yet.
        times = self._master.settings.session
        return Registered(session, leader.epoch, times.ttl_ms, times.beat_ms)

    async def _beat(self, message: Beat) -> BeatAck:
        leader = self._master.leading()
        await self._check_session(message.session)
        leader.beat(message, self._master.now())
        self._master.wake()
        await self._master.barrier()  # A deposed leader keeps no lease alive: the worker must look for the new one.
        return BeatAck(leader.epoch)

    async def _check_session(self, session: SessionId) -> None:
        """Raises SessionEnded, which costs a worker all that it runs: not by a leader that has been replaced."""
        if session not in self._master.state.sessions.live:
            await self._master.barrier()
        if session not in self._master.state.sessions.live:
            raise SessionEnded(f"session {session} has ended")

    async def _report(self, message: Report) -> Reported:
        leader = self._master.leading()
        verdicts = await self._master.propose(EndAttempts(message.session, message.items))
        leader.reported(message.session, len(message.items), self._master.now())
        return Reported(verdicts)

    async def _offer(self, message: OfferBlocks) -> Offered:
        self._master.leading()
        return Offered(await self._master.propose(Offer(message.session, message.blocks)))

    async def _lost_output(self, message: ReportLostOutput) -> Ack:
        """Missing and damaged output is believed at once; that of a worker that lives, on the second report."""
        leader = self._master.leading()
        await self._check_session(message.session)
        lost = message.lost
        if message.kind == LossKind.UNREACHABLE:
            sources = self._sources(message)
            believed = {source for source in sources.values() if leader.unreachable(source, message.session)}
            lost = [attempt for attempt, source in sources.items() if source in believed]
        await self._master.propose(LoseOutput(message.reader, lost, message.kind))
        return Ack()

    def _sources(self, message: ReportLostOutput) -> dict[AttemptId, SessionId]:
        """Where the outputs lie that are called lost."""
        job = self._master.state.job(message.reader.job)
        sources = {}
        for attempt in message.lost:
            table = job.stages.get(attempt.stage)
            if table is not None and attempt.partition < len(table.owner):
                sources[attempt] = SessionId(table.owner[attempt.partition])
        return sources

    async def _map_outputs(self, message: GetMapOutputs) -> MapOutputs:
        await self._master.barrier()
        return views.map_outputs(
            self._master.state, message.job, message.stage, message.version, message.offset, bytes_max=self._page_bytes
        )

    async def _winners(self, message: GetWinners) -> Winners:
        await self._master.barrier()
        return views.winners(self._master.state, message.job, message.offset, bytes_max=self._page_bytes)

    # --- clients -----------------------------------------------------------------------------------------------------

    async def _have_blobs(self, message: HaveBlobs) -> BlobsHeld:
        self._master.leading().blobs_asked(message.hashes, self._master.now())
        return BlobsHeld([hash for hash in message.hashes if not self._master.state.blobs.has(hash)])

    async def _put_blob(self, message: PutBlob) -> Ack:
        self._master.leading()
        limits = self._master.settings.limits
        if message.total > limits.job_bytes_max or len(message.data) > limits.frame_bytes_max:
            raise Refused(f"a blob of {message.total} bytes: limits.job_bytes_max is {limits.job_bytes_max}")
        await self._master.propose(PutPiece(message.hash, message.offset, message.total, message.data))
        return Ack()

    async def _submit(self, message: SubmitJob) -> Submitted:
        self._master.leading()
        limits = self._master.settings.limits
        for spec in message.stages:
            if spec.tasks > limits.tasks_max:
                raise Refused(f"stage {spec.name} has {spec.tasks} tasks: limits.tasks_max is {limits.tasks_max}")
        active = len(self._master.state.active)
        if active >= limits.jobs_running_max and message.job not in self._master.state.jobs:
            raise Refused(f"{active} jobs run already: limits.jobs_running_max")
        existing: bool = await self._master.propose(Submit(message))
        return Submitted(message.job, existing)

    async def _kill(self, message: KillJob) -> JobStatus:
        self._master.leading()
        await self._master.propose(Kill(message.job, message.reason))
        return self._status(message.job)

    async def _get_job(self, message: GetJob) -> JobStatus:
        if not message.stale:
            await self._master.barrier()
        return self._status(message.job)

    def _status(self, job: JobId) -> JobStatus:
        return views.job_status(self._master.state, self._master.state.job(job))

    async def _wait_job(self, message: WaitJob) -> JobStatus:
        self._master.leading()
        if message.job not in self._master.state.jobs:
            await self._master.barrier()  # Perhaps only this leader, replaced by now, does not know it.
        waiter = _Waiter(message.job, message.version, message.tidy, asyncio.get_running_loop().create_future())
        if not self._is_due(waiter):
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout(message.timeout_ms / 1000):
                    await waiter.future
            except TimeoutError:
                self._master.leading()
            finally:
                self._waiters.discard(waiter)
        return self._status(message.job)

    def _is_due(self, waiter: _Waiter) -> bool:
        job = self._master.state.jobs.get(waiter.job)
        if job is None:
            return True
        return job.version > waiter.version or (job.tidy if waiter.tidy else job.ended)

    def applied(self) -> None:
        """An entry was applied, just now."""
        self._locks.applied()

    def changed(self) -> None:
        """The state has changed: answer whoever waits for that."""
        for waiter in list(self._waiters):
            if not waiter.future.done() and self._is_due(waiter):
                waiter.future.set_result(None)

    def not_leading(self, leader: str) -> None:
        """Leadership is lost: who waits must ask the new leader."""
        self._locks.not_leading(leader)
        for waiter in list(self._waiters):
            if not waiter.future.done():
                waiter.future.set_exception(NotLeader("this master no longer leads", leader=leader))

    async def _list_jobs(self, message: ListJobs) -> JobList:
        if not message.stale:
            await self._master.barrier()
        return views.job_list(self._master.state, message.after, bytes_max=self._page_bytes)

    async def _get_attempts(self, message: GetAttempts) -> AttemptList:
        await self._master.barrier()
        return views.attempt_list(self._master.state, message, bytes_max=self._page_bytes)

    async def _get_cluster(self, message: GetCluster) -> msgspec.Struct:
        if not message.stale:
            await self._master.barrier()
        return await self._master.cluster_info()

    async def _get_member(self, message: GetMember) -> MemberInfo:
        return await self._master.member_info()

    async def _transfer(self, message: TransferLeadership) -> Transferred:
        return Transferred(await self._master.transfer(message.master))
