"""The state machine and the leader's tick, driven by a small fake cluster: no process, no socket, time that jumps."""

import pytest

from jobrunner.control.messages import (
    Beat,
    BlockOffer,
    EndCause,
    Failed,
    Forget,
    GetAttempts,
    Held,
    HostInfo,
    Instruct,
    JobState,
    LossKind,
    MapDone,
    OutputFile,
    Sealable,
    StageSpec,
    Start,
    StepDone,
    Stop,
    SubmitJob,
    TaskKind,
    Verdict,
)
from jobrunner.errors import NotLeader, OutputBusy, Refused, SessionEnded, UnknownJob
from jobrunner.ids import Epoch, Hash, JobId, SessionId, StageName, job_id_from_number
from jobrunner.master.commands import (
    Command,
    EndAttempts,
    EndSession,
    Entry,
    Kill,
    LoseOutput,
    Offer,
    PutPiece,
    RegisterSession,
    Submit,
    decode_entry,
    encode_entry,
)
from jobrunner.master.invariants import check_state
from jobrunner.master.leader import Leader, LeaderLimits
from jobrunner.master.state import MasterState
from jobrunner.master.views import attempt_list, job_list, map_outputs, winners
from jobrunner.planner.plan import blob_hash
from jobrunner.worker.attempts import Attempts

HOST = HostInfo("h", "b", "n")
JOB = job_id_from_number(7)
MAP, REDUCE = StageName("map"), StageName("reduce")


class FakeCluster:
    """One state, one leader, fake workers that hold what they are told to."""

    def __init__(self) -> None:
        self.state = MasterState()
        self.now = 0.0
        self.epoch = 1
        self.held: dict[SessionId, dict[int, Start]] = {}
        self.sequence: dict[SessionId, int] = {}
        self.ready: set[int] = set()
        self.forgotten: list[JobId] = []
        self.new_leader()

    def new_leader(self) -> None:
        self.epoch += 1
        self.leader = Leader(Epoch(self.epoch), self.now, LeaderLimits(ttl_s=5, queue_max=4, jobs_kept_max=3))
        self.sequence = dict.fromkeys(self.sequence, 0)

    def propose(self, command: Command, epoch: int | None = None) -> object:
        entry = Entry(1, 1000, Epoch(epoch or self.epoch), command)
        result = self.state.apply(decode_entry(encode_entry(entry)))
        check_state(self.state)
        if isinstance(result, Exception):
            raise result
        return result

    def register(self, name: int, slots: int = 2, process: str = "p") -> SessionId:
        id = self.propose(RegisterSession(f"dir{name}", process, name, f"w{name}", 1, HOST, slots))
        assert isinstance(id, int)
        self.held.setdefault(SessionId(id), {})
        self.sequence[SessionId(id)] = 0
        return SessionId(id)

    def submit(self, maps: int = 2, reduces: int = 2, job: JobId = JOB, output: str = "/out", **more: int) -> object:
        for data in (b"plan" + job.encode(), b"code"):
            self.propose(PutPiece(blob_hash(data), 0, len(data), data))
        stages = [StageSpec(MAP, TaskKind.MAP, maps, final=not reduces)]
        if reduces:
            stages.append(StageSpec(REDUCE, TaskKind.REDUCE, reduces, final=True, reads=MAP))
        plan, code = blob_hash(b"plan" + job.encode()), blob_hash(b"code")
        return self.propose(Submit(SubmitJob(job, "wc", output, plan, code, stages, more.get("faults_max", 4), 1)))

    def beat(self, session: SessionId) -> None:
        held = [Held(t, True, t in self.ready) for t in self.held[session]]  # type: ignore[arg-type]
        self.leader.beat(Beat(session, Epoch(self.epoch), self.sequence[session], held), self.now)

    def tick(self, *, beats: bool = True) -> None:
        """One round: beats, the leader's tick, its proposals applied, its instructions delivered."""
        if beats:
            for session in list(self.held):
                if session in self.state.sessions.live:
                    self.beat(session)
        proposals, instructs = self.leader.tick(self.state, self.now)
        for proposal in proposals:
            self.propose(proposal.command)
            self.leader.settled(proposal.key)
        for instruct in instructs:
            self.sequence[instruct.session] = instruct.sequence
            for item in instruct.items:
                if isinstance(item, Start):
                    self.held[instruct.session][item.token] = item
                elif isinstance(item, Stop):
                    self.held[instruct.session].pop(item.token, None)
                elif isinstance(item, Forget):
                    self.forgotten.append(item.job)

    def listen(self, seconds: float) -> None:
        """Time passes in steps of a real leader's ticks, and no worker says anything."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.tick(beats=False)

    def running(self, stage: str) -> list[tuple[SessionId, Start]]:
        live = self.state.sessions.live
        return [(s, h) for s, held in self.held.items() if s in live for h in held.values() if h.attempt.stage == stage]

    def finish(self, session: SessionId, start: Start, digest: int | None = None) -> Verdict:
        attempt, token = start.attempt, start.token
        item: MapDone | Sealable | StepDone
        if start.kind == TaskKind.MAP and not self.state.jobs[attempt.job].stages[MAP].spec.final:
            item = MapDone(attempt, token, attempt.partition + 10 if digest is None else digest, 1, 1, {"m": 1})
        elif start.kind in (TaskKind.REDUCE, TaskKind.MAP):
            table = self.state.jobs[attempt.job].stages[MAP]
            consumed = table.digest_sum if start.kind == TaskKind.REDUCE else 0
            files = [OutputFile("main", f"part-{attempt.partition}", 1, 1, "crc32:0")]
            item = Sealable(attempt, token, files, consumed, {"r": 1})
        else:
            item = StepDone(attempt, token, "withdrawn" if start.kind == TaskKind.RETRACT else "done")
        self.held.get(session, {}).pop(token, None)
        return self.report(session, item)

    def report(self, session: SessionId, item: MapDone | Sealable | StepDone | Failed) -> Verdict:
        verdicts = self.propose(EndAttempts(session, [item]))
        assert isinstance(verdicts, list)
        return Verdict(verdicts[0])

    def fail(self, session: SessionId, start: Start, cause: EndCause) -> Verdict:
        self.held[session].pop(start.token, None)
        return self.report(session, Failed(start.attempt, start.token, cause, "boom", "tb"))

    def finish_all(self, stage: str) -> list[Verdict]:
        return [self.finish(s, h) for s, h in self.running(stage)]

    def run_stage(self, stage: str) -> None:
        for _ in range(20):
            self.tick()
            self.finish_all(stage)

    def run(self) -> None:
        for _ in range(100):
            self.tick()
            for stage in ("setup", "map", "reduce"):
                self.finish_all(stage)
        self.end()

    def end(self) -> None:
        for _ in range(20):
            self.tick()
            for stage in ("publish", "retract", "cleanup"):
                self.finish_all(stage)

    @property
    def job(self) -> JobState:
        return self.state.jobs[JOB].public


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


def start_job(cluster: FakeCluster, workers: int = 2, **more: int) -> list[SessionId]:
    sessions = [cluster.register(n) for n in range(workers)]
    cluster.submit(**more)
    cluster.tick()
    cluster.tick()
    cluster.finish_all("setup")
    cluster.tick()
    cluster.tick()
    return sessions


def finish_maps(cluster: FakeCluster) -> None:
    cluster.finish_all("map")
    cluster.tick()
    cluster.tick()


def test_an_undisturbed_job_runs_every_task_once_and_ends_tidy(cluster: FakeCluster) -> None:
    """The road itself."""
    start_job(cluster, maps=5, reduces=3)
    cluster.run()
    job = cluster.state.jobs[JOB]
    assert job.public == JobState.COMMITTED and job.tidy
    assert (job.stages[MAP].started, job.stages[REDUCE].started) == (5, 3)
    assert job.counters == {"m": 5, "r": 3}
    assert cluster.state.locks.paths == {}
    assert cluster.forgotten


def test_a_map_only_job_seals_its_maps(cluster: FakeCluster) -> None:
    """A job without a reduce would otherwise leave blocks nobody reads."""
    start_job(cluster, maps=3, reduces=0)
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_reduces_wait_for_all_maps(cluster: FakeCluster) -> None:
    """A reduce that holds a slot while its maps wait for one is a deadlock."""
    start_job(cluster, maps=3, reduces=2)
    session, start = cluster.running("map")[0]
    cluster.finish(session, start)
    cluster.tick()
    cluster.tick()
    assert not cluster.running("reduce")


def test_the_same_submission_is_answered_as_the_first(cluster: FakeCluster) -> None:
    """A client that lost the reply asks again."""
    assert cluster.submit() is False
    assert cluster.submit() is True
    assert len(cluster.state.jobs) == 1


def test_two_live_jobs_never_share_an_output(cluster: FakeCluster) -> None:
    """Two jobs would mix their files."""
    cluster.submit()
    with pytest.raises(OutputBusy):
        cluster.submit(job=job_id_from_number(8))


def test_a_job_whose_blobs_are_missing_is_refused(cluster: FakeCluster) -> None:
    """Workers could never run it."""
    stages = [StageSpec(MAP, TaskKind.MAP, 1, final=True)]
    with pytest.raises(Refused):
        cluster.propose(Submit(SubmitJob(JOB, "x", "/o", Hash("a" * 64), Hash("b" * 64), stages, 4, 1)))


def test_a_lost_worker_costs_its_tasks_no_fault(cluster: FakeCluster) -> None:
    """Crashing machines would otherwise use up the budget of a healthy task."""
    sessions = start_job(cluster, maps=4)
    cluster.propose(EndSession(sessions[0], "gone"))
    table = cluster.state.jobs[JOB].stages[MAP]
    assert table.ends == {EndCause.LOST_WORKER: 2}
    assert not table.faults
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_a_silent_worker_is_ended_after_its_lease(cluster: FakeCluster) -> None:
    """Its tasks would wait for ever."""
    sessions = start_job(cluster, maps=4)
    cluster.listen(4.9)
    cluster.beat(sessions[1])
    cluster.listen(0.2)
    assert list(cluster.state.sessions.live) == [sessions[1]]


def test_a_new_leader_gives_every_lease_its_full_time(cluster: FakeCluster) -> None:
    """A worker that renewed with the old leader would be ended for its leader's death."""
    sessions = start_job(cluster)
    cluster.now = 100.0
    cluster.new_leader()
    cluster.tick(beats=False)
    cluster.listen(4.0)
    assert list(cluster.state.sessions.live) == sessions


def test_a_gap_in_which_the_leader_slept_expires_nobody(cluster: FakeCluster) -> None:
    """Ctrl-Z and fg of a whole cluster would lose all workers: a tick may be the first thing that runs after it."""
    sessions = start_job(cluster)
    cluster.now = 60.0
    cluster.tick(beats=False)
    assert list(cluster.state.sessions.live) == sessions
    cluster.listen(6.0)
    assert not cluster.state.sessions.live


def test_map_output_of_a_lost_worker_runs_again_only_while_needed(cluster: FakeCluster) -> None:
    """Reducers could never fetch it; but sealed partitions need nothing."""
    sessions = start_job(cluster, maps=4, reduces=2)
    finish_maps(cluster)
    lost = cluster.state.jobs[JOB].stages[MAP].owner.tolist().count(sessions[0])
    cluster.propose(EndSession(sessions[0], "gone"))
    assert cluster.state.jobs[JOB].stages[MAP].done == 4 - lost
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_output_of_a_lost_worker_is_not_made_again_when_all_is_sealed(cluster: FakeCluster) -> None:
    """Work for nothing, and the job would end later."""
    sessions = start_job(cluster, maps=4, reduces=2)
    finish_maps(cluster)
    cluster.finish_all("reduce")
    cluster.propose(EndSession(sessions[0], "gone"))
    assert cluster.state.jobs[JOB].stages[MAP].complete


def test_what_fits_no_frame_comes_in_pages(cluster: FakeCluster) -> None:
    """Where 30,000 maps are, or a thousand jobs, is more than a frame: the answer would never leave the master."""
    start_job(cluster, maps=3, reduces=3)
    finish_maps(cluster)
    whole = map_outputs(cluster.state, JOB, MAP, 0)
    pages = [map_outputs(cluster.state, JOB, MAP, 0, offset, bytes_max=66) for offset in (0, 2)]
    assert [page.more for page in pages] == [True, False] and not whole.more
    assert [token for page in pages for token in page.token] == whole.token
    assert [digest for page in pages for digest in page.digest] == whole.digest
    cluster.finish_all("reduce")
    won = [winners(cluster.state, JOB, offset, bytes_max=1) for offset in range(3)]
    assert [page.more for page in won] == [True, True, False]
    assert [row for page in won for row in page.winners] == winners(cluster.state, JOB).winners
    asked = GetAttempts(JOB)
    attempts = attempt_list(cluster.state, asked).attempts
    found = attempt_list(cluster.state, asked, bytes_max=1)
    assert found.more and found.attempts == attempts[:1]
    rest = attempt_list(cluster.state, GetAttempts(JOB, after=found.attempts[0].token))
    assert rest.attempts == attempts[1:] and not rest.more
    cluster.submit(job=job_id_from_number(8), output="/other")
    jobs = job_list(cluster.state, bytes_max=1)
    assert jobs.more and [job.id for job in jobs.jobs] == [job_id_from_number(8)]
    assert [job.id for job in job_list(cluster.state, job_id_from_number(8)).jobs] == [JOB]


def test_who_asks_late_for_map_output_that_is_gone_is_refused(cluster: FakeCluster) -> None:
    """A reduce that was paused asks when all is sealed and the maps' worker is lost: the master must not fail on it."""
    sessions = start_job(cluster, maps=4, reduces=2)
    finish_maps(cluster)
    cluster.finish_all("reduce")
    assert map_outputs(cluster.state, JOB, MAP, 0).owner
    cluster.propose(EndSession(sessions[0], "gone"))
    with pytest.raises(Refused):
        map_outputs(cluster.state, JOB, MAP, 0)


def test_what_was_said_in_an_instruction_that_did_not_arrive_is_said_again(cluster: FakeCluster) -> None:
    """A later one that did arrive hid it: the worker would keep the blocks of a job that is over until it restarts."""
    session = start_job(cluster)[0]
    cluster.run()
    assert cluster.state.jobs[JOB].tidy
    core, view = Attempts(2), cluster.leader.views[session]
    core.registered(session, Epoch(cluster.epoch))
    view.forgotten.clear()
    view.sequence = view.void = view.beats_unreceived = 0
    _, lost = cluster.leader.tick(cluster.state, cluster.now)
    assert Forget(JOB) in lost[0].items
    view.sequence += 1
    core.instruct(Instruct(Epoch(cluster.epoch), session, view.sequence, []))
    for _ in range(2):
        cluster.leader.beat(Beat(session, core.epoch, core.sequence, []), cluster.now)
    _, again = cluster.leader.tick(cluster.state, cluster.now)
    assert Forget(JOB) in again[0].items
    core.instruct(again[0])
    assert core.sequence == view.sequence


def test_no_deadlock_when_reduces_fill_all_slots_and_maps_are_needed_again(cluster: FakeCluster) -> None:
    """Reduces that wait for maps that wait for their slots."""
    sessions = start_job(cluster, maps=4, reduces=8)
    finish_maps(cluster)
    assert len(cluster.running("reduce")) == 4
    del cluster.held[sessions[0]]
    cluster.propose(EndSession(sessions[0], "gone"))
    for _ in range(4):
        cluster.tick()
    assert cluster.running("map") and not cluster.running("reduce")
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_a_reduce_that_has_read_its_input_goes_on_when_maps_are_lost(cluster: FakeCluster) -> None:
    """It needs nothing more: starting it again would throw work away."""
    sessions = start_job(cluster, maps=4, reduces=2)
    finish_maps(cluster)
    survivor = next((s, h) for s, h in cluster.running("reduce") if s == sessions[1])
    cluster.ready.add(survivor[1].token)
    cluster.propose(EndSession(sessions[0], "gone"))
    cluster.tick()
    assert cluster.finish(*survivor) == Verdict.WON


def test_a_sealed_partition_keeps_its_winner(cluster: FakeCluster) -> None:
    """A paused attempt that wakes would replace what readers have seen."""
    sessions = start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    zombie_session, zombie = cluster.running("reduce")[0]
    del cluster.held[zombie_session]
    cluster.propose(EndSession(zombie_session, "paused"))
    cluster.run_stage("map")
    other = next(s for s in sessions if s != zombie_session)
    cluster.tick()
    cluster.tick()
    cluster.run_stage("reduce")
    winner = cluster.state.locks.winner(JOB, REDUCE, 0)
    assert winner is not None and winner.session == other
    assert cluster.finish(zombie_session, zombie) == Verdict.LOST
    assert cluster.state.locks.winner(JOB, REDUCE, 0) == winner


def test_an_attempt_called_lost_may_still_win(cluster: FakeCluster) -> None:
    """Its work is as good as any: a worker cut off for a while would otherwise work for nothing."""
    start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    session, start = cluster.running("reduce")[0]
    cluster.propose(EndSession(session, "cut off"))
    assert cluster.finish(session, start) == Verdict.WON
    assert cluster.state.jobs[JOB].all_sealed()


def test_the_same_seal_again_is_won_and_another_descriptor_is_refused(cluster: FakeCluster) -> None:
    """A lost reply is repeated; a token never seals twice."""
    start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    session, start = cluster.running("reduce")[0]
    assert cluster.finish(session, start) == Verdict.WON
    assert cluster.finish(session, start) == Verdict.WON
    other = Sealable(start.attempt, start.token, [], 1, {})
    assert cluster.report(session, other) == Verdict.REFUSED


def test_a_reduce_that_read_outdated_map_output_does_not_win(cluster: FakeCluster) -> None:
    """It would mix rows of two runs of a map."""
    start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    session, start = cluster.running("reduce")[0]
    stale = Sealable(start.attempt, start.token, [], 12345, {})
    assert cluster.report(session, stale) == Verdict.LOST
    assert cluster.state.jobs[JOB].stages[REDUCE].faults == {}
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_a_map_that_runs_again_differently_fails_the_job_once_something_is_sealed(cluster: FakeCluster) -> None:
    """Rows would be lost or doubled without anybody knowing."""
    sessions = start_job(cluster, maps=4, reduces=2)
    finish_maps(cluster)
    sealed = cluster.running("reduce")[0]
    cluster.finish(*sealed)
    cluster.propose(EndSession(sessions[0], "gone"))
    cluster.held.pop(sessions[0])
    cluster.tick()
    cluster.tick()
    session, start = cluster.running("map")[0]
    cluster.finish(session, start, digest=999)
    assert cluster.job == JobState.FAILED
    error = cluster.state.jobs[JOB].error
    assert error is not None and error.kind == "not_deterministic" and error.task == str(start.attempt.task)


def test_a_result_that_was_refused_for_its_input_never_wins_later(cluster: FakeCluster) -> None:
    """Its worker deletes the files at once: a copy of the report that comes late, when the maps have made again what
    it had read, would make a winner that has none."""
    sessions = start_job(cluster, workers=3, maps=2, reduces=1)
    finish_maps(cluster)
    _, reduce = cluster.running("reduce")[0]
    digests = cluster.state.jobs[JOB].stages[MAP].digest.tolist()
    stale = Sealable(reduce.attempt, reduce.token, [], sum(digests), {})
    for digest, verdict in ((999, Verdict.LOST), (digests[0], Verdict.GONE)):
        owner = SessionId(cluster.state.jobs[JOB].stages[MAP].owner[0])
        cluster.propose(EndSession(owner, "gone"))
        cluster.held.pop(owner)
        for _ in range(3):
            cluster.tick()
        for worker, start in cluster.running("map"):
            cluster.finish(worker, start, digest if start.attempt.partition == 0 else digests[1])
        assert cluster.report(sessions[2], stale) is verdict
    assert cluster.state.locks.winner(JOB, REDUCE, 0) is None


def test_a_map_that_runs_again_differently_restarts_readers_while_nothing_is_sealed(cluster: FakeCluster) -> None:
    """Nobody has seen anything yet, so the new output may simply count."""
    sessions = start_job(cluster, maps=4, reduces=1)
    finish_maps(cluster)
    cluster.propose(EndSession(sessions[0], "gone"))
    cluster.held.pop(sessions[0])
    cluster.tick()
    cluster.tick()
    session, start = cluster.running("map")[0]
    cluster.finish(session, start, digest=999)
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_a_restarted_worker_offers_its_blocks_and_nothing_runs_again(cluster: FakeCluster) -> None:
    """A process crash would cost all finished maps of the machine."""
    sessions = start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    table = cluster.state.jobs[JOB].stages[MAP]
    mine = list(table.outputs_of(sessions[0]))
    again = cluster.register(0, process="p2")
    assert not table.complete
    blocks = [
        BlockOffer(
            _attempt(p, table.done_attempt[p]),
            table.done_token[p],
            table.digest[p],
            1,
            1,  # type: ignore[arg-type]
        )
        for p in mine
    ]
    assert cluster.propose(Offer(again, blocks)) == [True] * len(mine)
    assert table.complete and table.started == 2


def _attempt(partition: int, attempt: int):  # type: ignore[no-untyped-def]
    from jobrunner.ids import AttemptId

    return AttemptId(JOB, MAP, partition, attempt)


def test_an_offered_block_with_another_digest_is_not_taken(cluster: FakeCluster) -> None:
    """It is not the output that others may have read."""
    sessions = start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    table = cluster.state.jobs[JOB].stages[MAP]
    p = next(iter(table.outputs_of(sessions[0])))
    again = cluster.register(0, process="p2")
    wrong = BlockOffer(_attempt(p, table.done_attempt[p]), table.done_token[p], 1, 1, 1)  # type: ignore[arg-type]
    assert cluster.propose(Offer(again, [wrong])) == [False]


def test_a_task_that_keeps_failing_fails_the_job_after_its_budget(cluster: FakeCluster) -> None:
    """It would run for ever; and the error must name task, attempt and traceback."""
    start_job(cluster, maps=1, reduces=1, faults_max=2)
    for _ in range(2):
        cluster.tick()
        cluster.tick()
        session, start = cluster.running("map")[0]
        cluster.fail(session, start, EndCause.EXCEPTION)
    job = cluster.state.jobs[JOB]
    assert job.public == JobState.FAILED
    assert job.error is not None
    assert (job.error.kind, job.error.attempt, job.error.traceback) == ("exception", f"{JOB}/map/0/1", "tb")
    cluster.end()
    assert job.tidy


def test_fatal_fails_the_job_at_once(cluster: FakeCluster) -> None:
    """The user said that retries are pointless."""
    start_job(cluster, maps=2)
    cluster.fail(*cluster.running("map")[0], EndCause.FATAL)
    assert cluster.job == JobState.FAILED


def test_lost_input_costs_the_reader_nothing_and_damage_is_limited(cluster: FakeCluster) -> None:
    """A bad disk is not the reducer's fault, but four damaged outputs of one map are somebody's."""
    start_job(cluster, maps=1, reduces=1)
    for round in range(4):
        cluster.run_stage("map") if not cluster.running("reduce") else None
        finish_maps(cluster)
        cluster.tick()
        session, start = cluster.running("reduce")[0]
        cluster.held[session].pop(start.token)
        lost = _attempt(0, cluster.state.jobs[JOB].stages[MAP].done_attempt[0])
        cluster.propose(LoseOutput(start.attempt, [lost], LossKind.CORRUPT))
        assert cluster.job == (JobState.FAILED if round == 3 else JobState.RUNNING)
        cluster.tick()
        cluster.tick()
    assert cluster.state.jobs[JOB].stages[REDUCE].faults == {}


def test_a_killed_job_publishes_nothing_and_a_committing_one_cannot_be_killed(cluster: FakeCluster) -> None:
    """Log order decides between kill and commit."""
    start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    cluster.finish_all("reduce")
    cluster.tick()
    assert cluster.job == JobState.COMMITTING
    with pytest.raises(Refused):
        cluster.propose(Kill(JOB, "too late"))
    other = job_id_from_number(9)
    cluster.submit(job=other, output="/other")
    assert cluster.propose(Kill(other, "enough")) == JobState.KILLED
    cluster.end()
    assert cluster.state.jobs[other].tidy and cluster.job == JobState.COMMITTED
    assert cluster.propose(Kill(other, "again")) == JobState.KILLED


def test_a_set_up_that_comes_after_the_end_does_not_count(cluster: FakeCluster) -> None:
    """It may have made the stage again after its clean-up; only GONE makes its worker look after that."""
    cluster.submit()
    cluster.register(1)
    cluster.register(2)
    cluster.tick()
    cluster.tick()
    ((worker, late),) = cluster.running("setup")
    cluster.propose(EndSession(worker, "silent"))
    cluster.propose(Kill(JOB, "enough"))
    assert cluster.finish(worker, late) == Verdict.GONE
    cluster.end()
    assert cluster.state.jobs[JOB].tidy
    assert cluster.finish(worker, late) == Verdict.GONE
    assert cluster.job == JobState.KILLED


def test_a_refused_publication_is_retracted_and_the_job_fails_with_its_reason(cluster: FakeCluster) -> None:
    """A foreign directory in the way must not cost data, nor hang the job."""
    start_job(cluster, maps=2, reduces=1)
    finish_maps(cluster)
    cluster.finish_all("reduce")
    for _ in range(3):
        cluster.tick()
    session, start = cluster.running("publish")[0]
    cluster.held[session].pop(start.token)
    assert cluster.report(session, StepDone(start.attempt, start.token, "refused", "foreign")) == Verdict.ACCEPTED
    cluster.end()
    job = cluster.state.jobs[JOB]
    assert job.public == JobState.FAILED and job.tidy
    assert job.error is not None and job.error.message == "foreign"


def test_a_report_from_an_ended_session_is_told_so(cluster: FakeCluster) -> None:
    """The agent must kill its slots and register anew."""
    start_job(cluster)
    session, start = cluster.running("map")[0]
    cluster.propose(EndSession(session, "gone"))
    with pytest.raises(SessionEnded):
        cluster.finish(session, start)


def test_commands_of_a_replaced_leader_are_refused(cluster: FakeCluster) -> None:
    """A leader that slept would assign by an outdated view."""
    cluster.submit()
    with pytest.raises(NotLeader):
        cluster.propose(Kill(JOB, ""), epoch=1)


def test_an_unknown_job_is_named(cluster: FakeCluster) -> None:
    """`kill` of a typo must not look like success."""
    with pytest.raises(UnknownJob, match=str(JOB)):
        cluster.propose(Kill(JOB, ""))


def test_an_instruction_that_never_arrived_is_sent_again(cluster: FakeCluster) -> None:
    """A cut connection would leave the task assigned to nobody for ever."""
    session = cluster.register(0)
    cluster.submit(maps=1)
    cluster.beat(session)
    proposals, _ = cluster.leader.tick(cluster.state, 0.0)
    for proposal in proposals:
        cluster.propose(proposal.command)
        cluster.leader.settled(proposal.key)
    _, lost = cluster.leader.tick(cluster.state, 0.0)
    assert lost and lost[0].items
    cluster.beat(session)
    cluster.beat(session)
    _, again = cluster.leader.tick(cluster.state, 0.0)
    assert [item for i in again for item in i.items] == [item for i in lost for item in i.items]


def test_an_attempt_that_its_worker_does_not_have_is_taken_back(cluster: FakeCluster) -> None:
    """A worker that refused or forgot a start would hold the task for ever."""
    start_job(cluster, workers=1, maps=1)
    session, start = cluster.running("map")[0]
    cluster.held[session].clear()
    cluster.tick()
    cluster.tick()
    cluster.tick()
    assert cluster.running("map")[0][1].token > start.token
    assert cluster.state.jobs[JOB].stages[MAP].ends == {EndCause.PREEMPTED: 1}


def test_a_new_leader_resends_only_what_the_worker_does_not_hold(cluster: FakeCluster) -> None:
    """Running tasks must survive a change of leader."""
    start_job(cluster, maps=4)
    before = {h.token for _, h in cluster.running("map")}
    cluster.new_leader()
    cluster.tick()
    cluster.tick()
    assert {h.token for _, h in cluster.running("map")} == before
    assert cluster.state.jobs[JOB].stages[MAP].started == 4
    cluster.run()
    assert cluster.job == JobState.COMMITTED


def test_old_ended_jobs_are_forgotten(cluster: FakeCluster) -> None:
    """A cluster that runs for years must not grow."""
    cluster.register(0)
    for number in range(6):
        cluster.submit(job=job_id_from_number(100 + number), output=f"/o{number}", maps=1, reduces=0)
        for _ in range(12):
            cluster.tick()
            for stage in ("setup", "map", "publish", "cleanup"):
                cluster.finish_all(stage)
    cluster.tick()
    assert len(cluster.state.jobs) <= 4
    assert cluster.state.ended_counts == {"committed": 6}
    assert not cluster.state.blobs.names()
