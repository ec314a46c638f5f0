"""Client: a running cluster, by the addresses of its masters or by its directory.

Every call may be repeated: it carries the job's id. Unknown means that it may or may not have been carried out.
"""

import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from jobrunner.api.handle import JobHandle
from jobrunner.api.job import Job, Urls
from jobrunner.api.prepare import Request, make_request, prepare, resolve_settings
from jobrunner.api.remote import Calls, Remote
from jobrunner.control.locks import ForceRelease, ListLocks, LockList, LockOwner
from jobrunner.control.messages import (
    Ack,
    BlobsHeld,
    ClusterInfo,
    GetCluster,
    GetJob,
    HaveBlobs,
    JobList,
    JobStatus,
    LeaderIs,
    ListJobs,
    PutBlob,
    Submitted,
    TransferLeadership,
    Transferred,
    message_decoder,
)
from jobrunner.errors import Refused, SpecError, Unknown, UnknownJob
from jobrunner.failpoints import failpoint
from jobrunner.ids import JobId, parse_job_id
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from jobrunner.api.kv import Kv
    from jobrunner.api.locks import Lock, OnDoubt
    from jobrunner.api.sessions import LockSession
    from jobrunner.planner.build import BuiltJob


class Client:
    """A running cluster. Nothing is connected before the first call. Use it in a `with`, or close it."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        token: str,
        cluster_id: str = "",
        settings: Settings | Mapping[str, object] | None = None,
    ) -> None:
        """`addresses`: "host:port,host:port" or a list. Raises SpecError."""
        self.addresses = parse_addresses(addresses)
        self.settings = resolve_settings(settings)
        self._token = token
        self._cluster_id = cluster_id
        self._remote = Remote(self._connect, self.settings.limits)
        self._sessions: dict[int, LockSession] = {}  # By ttl in milliseconds.
        self._opening = threading.Lock()

    @classmethod
    def from_dir(
        cls, directory: str | PathLike[str], *, settings: Settings | Mapping[str, object] | None = None
    ) -> "Client":
        """The cluster that `jobrunner cluster up --dir DIRECTORY` started. Raises SpecError."""
        from jobrunner.cluster.directory import ClusterDir

        found = ClusterDir.read(Path(directory))
        return cls(found.addresses, token=found.token, cluster_id=found.cluster_id, settings=settings)

    @classmethod
    def over(cls, calls: Calls, *, settings: Settings | None = None) -> "Client":
        """A client that speaks through `calls`, for tests with a fake cluster."""

        async def connect() -> Calls:
            return calls

        client = cls("fake:1", token="", settings=settings or Settings())
        client._remote = Remote(connect, client.settings.limits)
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connections. Jobs go on; locks are released, ephemeral keys deleted."""
        for session in self._sessions.values():
            session.close()
        self._remote.close()

    def submit(
        self,
        job: Job,
        *,
        input: Urls,
        output: str | PathLike[str],
        reducers: int | None = None,
        params: Mapping[str, object] | None = None,
        if_exists: Literal["error", "replace"] = "error",
        job_id: str | None = None,
        name: str = "",
    ) -> JobHandle:
        """Check, plan and submit; returns once the masters have the job for good.

        With a `job_id` this may be repeated after Unknown, and by several at once: it is one job.
        Raises SpecError before anything is sent, OutputBusy; Unknown with field `job`.
        """
        request = make_request(
            job,
            input=input,
            output=output,
            reducers=reducers,
            params=params,
            if_exists=if_exists,
            job_id=job_id,
            name=name,
        )
        return self.submit_request(job, request)

    def submit_request(self, job: Job, request: Request) -> JobHandle:
        """As submit, of a request that make_request has made."""
        if request.again and self._knows(request.job_id):
            return JobHandle(self._remote, request.job_id)  # No checks: its own output may be there by now.
        return self.submit_built(prepare(job, request, self.settings, slots=self.slots))

    def submit_built(self, built: "BuiltJob") -> JobHandle:
        """Send the blobs that the masters lack, then the job. Raises Unknown with field `job`."""
        failpoint("client.submit.before")
        self._send_missing(built)
        try:
            try:
                answer = self._remote.call(built.submit, Submitted)
            except Refused:
                if not self._send_missing(built):
                    raise
                answer = self._remote.call(built.submit, Submitted)  # A job that had the same code ended in between.
        except Unknown as error:
            job = built.submit.job
            raise Unknown(f"{error}; submitting again with job id {job} is safe", job=job) from error
        failpoint("client.submit.after")
        return JobHandle(self._remote, answer.job)

    def _send_missing(self, built: "BuiltJob") -> bool:
        """Send the blobs that the masters lack; whether there were any."""
        piece_bytes = self.settings.limits.piece_bytes
        missing = self._remote.call(HaveBlobs(list(built.blobs)), BlobsHeld).missing
        for name in missing:
            data = built.blobs[name]
            for offset in range(0, len(data), piece_bytes):
                piece = data[offset : offset + piece_bytes]
                self._remote.call(PutBlob(name, offset, len(data), piece), Ack)
        return bool(missing)

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job submitted before. Raises SpecError; the cluster is not asked."""
        try:
            return JobHandle(self._remote, parse_job_id(job_id))
        except ValueError as error:
            raise SpecError(str(error)) from error

    def jobs(self, *, stale: bool = False) -> list[JobStatus]:
        """All jobs the cluster remembers, newest first; `stale`: as whichever master is asked has them."""
        page = self._remote.call(ListJobs(stale), JobList)
        jobs = [*page.jobs]
        while page.more:
            page = self._remote.call(ListJobs(stale, after=jobs[-1].id), JobList)
            jobs += page.jobs
        return jobs

    def cluster(self, *, stale: bool = False) -> ClusterInfo:
        """Masters, workers, and how many jobs are in which state; `stale`: as whichever master is asked has it."""
        return self._remote.call(GetCluster(stale), ClusterInfo)

    def transfer(self, master: int | None = None) -> int:
        """Make the master of this slot lead, or the most complete one that does not; the slot of who leads now.

        Raises Refused; Unavailable while it does not take over.
        """
        if master is None:  # Chosen once and here: the new leader, asked again, must not hand over once more.
            info = self.cluster()
            others = [one for one in info.masters if one.id != info.leader and one.role != "down"]
            if not others:
                raise Refused("there is no other master that runs")
            master = max(others, key=lambda one: (one.commit_index, -one.id)).id
        return self._remote.call(TransferLeadership(master), Transferred).leader

    def slots(self) -> int:
        """Slots of all workers that are not lost."""
        return sum(worker.slots for worker in self.cluster().workers if worker.state in ("live", "suspect"))

    # --- locks and small values --------------------------------------------------------------------------------------

    def lock(
        self,
        name: str,
        *,
        ttl: float | None = None,
        wait: float | None = None,
        shared: bool = False,
        delay: float | None = None,
        on_doubt: "OnDoubt | None" = None,
    ) -> "Lock":
        """A named lock, to be used in a `with`, which takes it and gives it back.

        `ttl`: seconds of silence after which it is lost; `wait`: seconds to stand in line (None: as long as it takes,
        0: not at all), then LockBusy; `shared`: others may hold it shared too; `delay`: seconds for which it stays
        closed if this holder fails (not when it releases); `on_doubt(lock)` is called, from another thread, when
        the lock is in doubt or lost. The lock "output:" + the canonical URL of an output is also held by the job that
        writes there. Raises SpecError.
        """
        from jobrunner.api.locks import Lock

        section = self.settings.locks
        ttl_ms = section.ttl_ms if ttl is None else round(ttl * 1000)
        delay_ms = section.delay_ms if delay is None else round(delay * 1000)
        if not section.ttl_ms_min <= ttl_ms <= section.ttl_ms_max:
            low, high = section.ttl_ms_min / 1000, section.ttl_ms_max / 1000
            raise SpecError(f"ttl: found {ttl_ms / 1000:g}, allowed: seconds from {low:g} to {high:g}")
        if not 0 <= delay_ms <= section.delay_ms_max:
            raise SpecError(f"delay: found {delay_ms / 1000:g}, allowed: seconds to {section.delay_ms_max / 1000:g}")
        if wait is not None and not wait >= 0:
            raise SpecError(f"wait: found {wait!r}, allowed: seconds from 0, or None")
        return Lock(
            self._remote,
            lambda: self._session(ttl_ms),
            name,
            shared=shared,
            wait_s=wait,
            delay_ms=delay_ms,
            on_doubt=on_doubt,
        )

    def locks(self, prefix: str = "") -> "LockList":
        """Locks that are held, waited for or closed, by name; and those that operators released lately."""
        page = self._remote.call(ListLocks(prefix), LockList)
        locks = [*page.locks]
        while page.more:
            page = self._remote.call(ListLocks(prefix, after=locks[-1].name), LockList)
            locks += page.locks
        return LockList(locks, False, page.forced, page.now_ms)

    def release_lock(self, name: str, *, reason: str) -> "list[LockOwner]":
        """Take a lock from whoever holds it, who learns it with the next keepalive. Raises Refused if nobody does."""
        found = [info for info in self.locks(name).locks if info.name == name]
        if not found or not (found[0].holders or found[0].job):
            raise Refused(f"lock {name} is not held")
        if found[0].job:
            raise Refused(f"lock {name} is held by job {found[0].job}: kill the job")
        for holder in found[0].holders:
            self._remote.call(ForceRelease(name, holder.token, reason), Ack)
        return found[0].holders

    @property
    def kv(self) -> "Kv":
        """Small values with compare-and-set, ephemeral keys, transactions and watches."""
        from jobrunner.api.kv import Kv

        return Kv(self._remote, lambda: self._session(self.settings.locks.ttl_ms))

    def _session(self, ttl_ms: int) -> "LockSession":
        from jobrunner.api.sessions import LockSession, own_name
        from jobrunner.locks.holder import Hold

        with self._opening:
            session = self._sessions.get(ttl_ms)
            if session is None or session.state is Hold.LOST:
                session = self._sessions[ttl_ms] = LockSession(self._remote, ttl_ms=ttl_ms, owner=own_name())
            return session

    def _knows(self, job: JobId) -> bool:
        try:
            self._remote.call(GetJob(job), JobStatus)
        except UnknownJob:
            return False
        return True

    async def _connect(self) -> Calls:
        from jobrunner.rpc.client import Masters  # aiohttp: a quarter of a second, not before it is needed.

        def on_push(connection: object, message: object) -> None:
            if isinstance(message, LeaderIs):
                masters.leader_is(message.epoch, message.address)

        masters = Masters(
            self.addresses,
            cluster_id=self._cluster_id,
            cluster_token=self._token,
            role="client",
            decode=message_decoder().decode,
            on_push=on_push,
            settings=self.settings,
        )
        return masters


def parse_addresses(text: str | Sequence[str]) -> tuple[str, ...]:
    """Addresses of "host:port,host:port" or of a list. Raises SpecError naming the wrong one."""
    parts = text.split(",") if isinstance(text, str) else text
    addresses = tuple(part.strip() for part in parts if part.strip())
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise SpecError(f"cluster address: found {address!r}, allowed: host:port,host:port,...")
    if not addresses:
        raise SpecError(f"cluster address: found {text!r}, allowed: host:port,host:port,...")
    return addresses
