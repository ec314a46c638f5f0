"""The replicated state machine: what every master knows, changed only by the commands of the log, in their order.

    Entry ──► MasterState.apply ──► result for whoever proposed it (a value, or an error that is raised to them)

A pure function of the log: no clock, chance, environment, hash or set order. What only a leader knows (leases, what
it sent to whom) is in leader.py.
"""

from collections.abc import Callable
from typing import Any

from jobrunner.control.locks import OUTPUT_PREFIX
from jobrunner.control.messages import JobState, SubmitJob, Verdict
from jobrunner.errors import JobrunnerError, NotLeader, OutputBusy, Refused, SessionEnded, UnknownJob
from jobrunner.ids import Epoch, JobId, SessionId
from jobrunner.locks.service import LockService
from jobrunner.locks.sessions import Session, SessionTable
from jobrunner.locks.table import LockTable
from jobrunner.master import outcomes
from jobrunner.master.blobs import BlobTable
from jobrunner.master.commands import (
    Assign,
    BeginClient,
    CommitJob,
    DropAttempts,
    DropBlobs,
    EndAttempts,
    EndClient,
    EndDelay,
    EndSession,
    Entry,
    ForgetJobs,
    ForgetWorkers,
    Kill,
    LoseOutput,
    Offer,
    PutPiece,
    RaiseLevel,
    RegisterSession,
    RunOperation,
    SetLockLimits,
    Submit,
    TakeLock,
)
from jobrunner.master.jobs import Job
from jobrunner.master.tasks import Running, TaskState

Applied = object | JobrunnerError


class MasterState:
    """Jobs, workers' sessions, locks and blobs. `apply` is the only way to change any of it."""

    def __init__(self) -> None:
        self.level = 1
        self.epoch = Epoch(0)  # The highest epoch of any entry applied.
        self.jobs: dict[JobId, Job] = {}
        self.active: dict[JobId, Job] = {}  # Not tidy yet, by submission.
        self.sessions = SessionTable()
        self.locks = LockTable()
        self.service = LockService(self.locks.next_token)
        self.blobs = BlobTable()
        self.attempts: dict[SessionId, dict[int, Running]] = {}  # Assigned attempts of each live session, by token.
        self.ended_counts: dict[str, int] = {}  # Jobs by public end state, also those forgotten.
        self._handlers: dict[type, Callable[[Any, int], Applied]] = {
            RegisterSession: self._register,
            EndSession: self._end_session,
            PutPiece: self._put_piece,
            DropBlobs: self._drop_blobs,
            Submit: self._submit,
            Kill: self._kill,
            Assign: self._assign,
            EndAttempts: self._end_attempts,
            DropAttempts: self._drop_attempts,
            Offer: self._offer,
            LoseOutput: self._lose_output,
            CommitJob: self._commit_job,
            ForgetJobs: self._forget_jobs,
            ForgetWorkers: self._forget_workers,
            BeginClient: self._begin_client,
            RunOperation: self._run_operation,
            EndClient: self._end_client,
            EndDelay: self._end_delay,
            TakeLock: self._take_lock,
            SetLockLimits: self._set_lock_limits,
            RaiseLevel: self._raise_level,
        }

    def apply(self, entry: Entry) -> Applied:
        """Apply one entry; return its result, or the error that refuses it, the same on every master."""
        if entry.epoch < self.epoch:
            return NotLeader("proposed by a leader that has been replaced meanwhile", leader="")
        self.epoch = entry.epoch
        self.service.names.granted.clear()
        try:
            return self._handlers[type(entry.command)](entry.command, entry.at_ms)
        except Refused as refusal:
            return refusal

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _register(self, command: RegisterSession, at_ms: int) -> Applied:
        known = self.sessions.same_process(command.directory, command.process)
        if known is not None:
            return known.id
        session = Session(
            SessionId(self.locks.next_token()), command.directory, command.process, command.name, command.address,
            command.pid, command.host, command.slots,
        )  # fmt: skip
        replaced = self.sessions.register(session)
        if replaced is not None:
            outcomes.worker_lost(self, replaced, "its directory registered again", at_ms)
        self.attempts[session.id] = {}
        return session.id

    def _end_session(self, command: EndSession, at_ms: int) -> Applied:
        session = self.sessions.end(command.session)
        if session is None:
            return False
        outcomes.worker_lost(self, session, command.reason, at_ms)
        return True

    def _forget_workers(self, command: ForgetWorkers, at_ms: int) -> Applied:
        for directory in command.directories:
            self.sessions.forget_lost(directory)
        return None

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _put_piece(self, command: PutPiece, at_ms: int) -> Applied:
        return self.blobs.put(command.hash, command.offset, command.total, command.data)

    def _drop_blobs(self, command: DropBlobs, at_ms: int) -> Applied:
        named = self.blobs_in_use()
        for hash in command.hashes:
            if hash not in named:
                self.blobs.drop(hash)
        return None

    def blobs_in_use(self) -> set[str]:
        return {hash for job in self.active.values() for hash in (job.submit.plan, job.submit.code)}

    def _submit(self, command: Submit, at_ms: int) -> Applied:
        submit = command.job
        if submit.job in self.jobs:
            return True
        _check_submit(submit)
        missing = [hash for hash in (submit.plan, submit.code) if not self.blobs.has(hash)]
        if missing:
            raise Refused(f"job {submit.job}: blob {missing[0][:12]} is not here; send it first")
        holder = self.locks.take_path(submit.output, submit.job)
        if holder != submit.job:
            raise OutputBusy(f"job {holder} is writing {submit.output}", url=submit.output, job=holder)
        owner = self.service.names.reserve(OUTPUT_PREFIX + submit.output, submit.job)
        if owner:
            self.locks.release_path(submit.output, submit.job)
            raise OutputBusy(f"{owner} holds the lock of {submit.output}", url=submit.output, job="")
        self.jobs[submit.job] = self.active[submit.job] = Job(submit)
        return False

    def _kill(self, command: Kill, at_ms: int) -> Applied:
        job = self.job(command.job)
        if job.ended:
            return job.public
        if job.public == JobState.COMMITTING:
            raise Refused(f"job {command.job} is committing: it can no longer be killed", job=command.job)
        outcomes.kill(self, job, command.reason, at_ms)
        return job.public

    def job(self, id: JobId) -> Job:
        if id not in self.jobs:
            raise UnknownJob(f"no job {id}", job=id)
        return self.jobs[id]

    def _commit_job(self, command: CommitJob, at_ms: int) -> Applied:
        return outcomes.commit(self, self.job(command.job))

    def _forget_jobs(self, command: ForgetJobs, at_ms: int) -> Applied:
        for id in command.jobs:
            job = self.jobs.get(id)
            if job is not None and job.tidy:
                self.locks.forget(id, list(job.stages))
                del self.jobs[id]
        return None

    def _raise_level(self, command: RaiseLevel, at_ms: int) -> Applied:
        self.level = max(self.level, command.level)
        return self.level

    def release_output(self, job: Job, at_ms: int) -> None:
        """The job will never write there again."""
        self.locks.release_path(job.submit.output, job.submit.job)
        self.service.names.unreserve(OUTPUT_PREFIX + job.submit.output, job.submit.job, at_ms)

    # --- clients' sessions, locks and small values -------------------------------------------------------------------

    def _begin_client(self, command: BeginClient, at_ms: int) -> Applied:
        return self.service.open(command.key, command.owner, command.ttl_ms, at_ms)

    def _run_operation(self, command: RunOperation, at_ms: int) -> Applied:
        return self.service.run(command.client, command.sequence, command.lowest, command.operation, at_ms)

    def _end_client(self, command: EndClient, at_ms: int) -> Applied:
        return self.service.end(command.client, at_ms, failed=command.failed)

    def _end_delay(self, command: EndDelay, at_ms: int) -> Applied:
        return self.service.names.end_delay(command.token, at_ms)

    def _take_lock(self, command: TakeLock, at_ms: int) -> Applied:
        self.service.names.force(command.name, command.token, command.reason, at_ms)
        return None

    def _set_lock_limits(self, command: SetLockLimits, at_ms: int) -> Applied:
        self.service.limits = command.limits
        return None

    # --- attempts ----------------------------------------------------------------------------------------------------

    def _assign(self, command: Assign, at_ms: int) -> Applied:
        """Result: how many attempts were started."""
        started = 0
        for place in command.placements:
            job = self.active.get(place.job)
            table = job.table(place.stage) if job is not None else None
            if job is None or table is None or place.session not in self.sessions.live:
                continue
            if table not in job.open_tables() or table.state_of(place.partition) != TaskState.OPEN:
                continue
            outcomes.assign(self, job, table, place)
            started += 1
        return started

    def _end_attempts(self, command: EndAttempts, at_ms: int) -> Applied:
        live = command.session in self.sessions.live
        verdicts = [outcomes.end_attempt(self, command.session, item, at_ms) for item in command.items]
        if not live and any(verdict is None for verdict in verdicts):
            raise SessionEnded(f"session {command.session} has ended")
        return [verdict if verdict is not None else Verdict.GONE for verdict in verdicts]

    def _drop_attempts(self, command: DropAttempts, at_ms: int) -> Applied:
        for token in command.tokens:
            for attempts in self.attempts.values():
                if token in attempts:
                    outcomes.drop(self, attempts[token], command.cause, command.reason)
                    break
        return None

    def _offer(self, command: Offer, at_ms: int) -> Applied:
        if command.session not in self.sessions.live:
            raise SessionEnded(f"session {command.session} has ended")
        return [outcomes.offer(self, command.session, block, at_ms) for block in command.blocks]

    def _lose_output(self, command: LoseOutput, at_ms: int) -> Applied:
        outcomes.lose_output(self, command.reader, command.lost, command.kind, at_ms)
        return None


def _check_submit(submit: SubmitJob) -> None:
    names = [spec.name for spec in submit.stages]
    if not names or len(set(names)) != len(names) or any(spec.tasks < 1 for spec in submit.stages):
        raise Refused(f"job {submit.job}: stages need distinct names and at least one task each")
    if any(spec.reads and spec.reads not in names for spec in submit.stages):
        raise Refused(f"job {submit.job}: a stage reads one that is not there")
    if not any(spec.final for spec in submit.stages):
        raise Refused(f"job {submit.job}: no stage makes final output")
