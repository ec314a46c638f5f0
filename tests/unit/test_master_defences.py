"""What comes late, from a leader that was replaced, or for ever: no master may stop, grow or say what is not so."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_master_locks import Front, LockCluster, run
from test_master_state import JOB, MAP, FakeCluster, cluster, start_job  # noqa: F401 - a fixture

from jobrunner.control.messages import (
    Ack,
    Beat,
    BlockOffer,
    EndCause,
    Failed,
    JobState,
    JobStatus,
    LossKind,
    ReportLostOutput,
    StepDone,
    Verdict,
    WaitJob,
)
from jobrunner.errors import NotLeader, SessionEnded, UnknownJob
from jobrunner.ids import AttemptId, Epoch, MemberId, SessionId, Token
from jobrunner.master.commands import EndAttempts, EndSession, Offer, PutPiece
from jobrunner.master.leader import LOST_KEPT_MAX, ORPHAN_BLOB_S
from jobrunner.master.server import MasterServer
from jobrunner.planner.plan import blob_hash
from jobrunner.raft.files import File, RealFiles
from jobrunner.raft.messages import Member
from jobrunner.raft.ready import HardState, Save
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Snapshot
from jobrunner.raft.store import Store, init_store


def test_a_report_about_a_forgotten_job_does_not_stop_the_leader() -> None:
    """Its worker would say it again to the next leader, and that one would stop too."""
    item = Failed(AttemptId(JOB, MAP, 0, 0), Token(5), EndCause.EXITED, "")
    server: Any = SimpleNamespace(state=FakeCluster().state)
    MasterServer._pass_failpoints(server, EndAttempts(SessionId(1), [item]), [Verdict.GONE])


# --- a leader that was replaced, and does not know it ----------------------------------------------------------------


class Replaced(Front):
    """It lags behind the others, and learns so from the barrier."""

    async def barrier(self) -> None:
        raise NotLeader("another leads", leader="")


LATE = SessionId(77)  # It registered with the new leader.


@pytest.mark.parametrize(
    "message",
    [
        Beat(LATE, Epoch(9), 0, []),
        ReportLostOutput(LATE, AttemptId(JOB, MAP, 0, 0), [], LossKind.MISSING),
        WaitJob(JOB, 0, 0),
    ],
)
def test_a_replaced_leader_denies_nobody(message: Any) -> None:
    """A worker told "session ended" kills all that it runs; a client told "no such job" gives up."""
    with pytest.raises(NotLeader):
        run(Replaced(LockCluster()).ask(message))


def test_a_leader_that_still_leads_says_what_is_not_there() -> None:
    """Who waited for the new leader must be told in the end."""
    front = Front(LockCluster())
    with pytest.raises(SessionEnded):
        run(front.ask(Beat(LATE, Epoch(9), 0, [])))
    with pytest.raises(UnknownJob):
        run(front.ask(WaitJob(JOB, 0, 0)))


def test_what_was_applied_while_the_barrier_was_awaited_counts() -> None:
    """The barrier is there to bring what this master lacks."""
    lagging = LockCluster()
    front = Front(lagging)

    async def barrier() -> None:
        if not lagging.state.sessions.live:
            lagging.register(1)
            lagging.submit()

    front.barrier = barrier  # type: ignore[method-assign]
    assert isinstance(run(front.ask(WaitJob(JOB, -1, 0))), JobStatus)
    session = next(iter(lagging.state.sessions.live))
    lost = ReportLostOutput(session, AttemptId(JOB, MAP, 0, 0), [], LossKind.MISSING)
    assert isinstance(run(front.ask(lost)), Ack)


# --- late, and for ever ----------------------------------------------------------------------------------------------


def test_a_publisher_that_reports_after_the_end_changes_nothing(cluster: FakeCluster) -> None:  # noqa: F811
    """A committed job would show the error of a publication that another worker completed."""
    start_job(cluster, faults_max=1)
    for stage in ("map", "reduce"):
        cluster.run_stage(stage)
    cluster.tick()
    session, late = cluster.running("publish")[0]
    cluster.fail(session, late, EndCause.STORAGE)
    cluster.tick()
    cluster.tick()
    session, retract = cluster.running("retract")[0]
    cluster.held[session].pop(retract.token)
    cluster.report(session, StepDone(retract.attempt, retract.token, "published"))
    cluster.end()
    job = cluster.state.jobs[JOB]
    assert job.tidy and job.public == JobState.COMMITTED and job.error is None
    version = job.version
    refused = StepDone(late.attempt, late.token, "refused", "a foreign output")
    assert cluster.report(session, refused) is Verdict.GONE
    assert job.error is None and job.version == version


def test_workers_lost_long_ago_are_forgotten(cluster: FakeCluster) -> None:  # noqa: F811
    """Where each restart brings a new directory, the state would grow for ever."""
    for name in range(LOST_KEPT_MAX + 3):
        cluster.propose(EndSession(cluster.register(name), "gone"))
    cluster.tick()
    assert list(cluster.state.sessions.lost) == [f"dir{name}" for name in range(3, LOST_KEPT_MAX + 3)]


# --- snapshots -------------------------------------------------------------------------------------------------------

ME = MemberId("m1")
MEMBERS = (Member(ME, 1, "h1:1"),)


class Meddling(RealFiles):
    """While a member's own snapshot is about to be opened, `meanwhile` runs in another thread."""

    meanwhile: Any = None

    def open(self, path: str) -> File:  # type: ignore[override]
        if self.meanwhile is not None and path.endswith("20.snapshot"):
            thread = threading.Thread(target=self.meanwhile)
            self.meanwhile = None
            self.thread = thread
            thread.start()
            thread.join(0.05)  # In vain, if it has to wait for this one.
        return super().open(path)


def test_a_snapshot_that_arrives_while_one_is_taken_harms_neither(tmp_path: Path) -> None:
    """A follower that catches up does both: one would remove the file of the other, and the master stop."""
    files, directory = Meddling(), str(tmp_path / "d")
    init_store(directory, cluster_id="c", member=ME, slot=1, members=MEMBERS, files=files)
    store = Store.open(directory, RaftSettings(), files)
    installed = []
    arrived = Save(HardState(2, None, 90), (), Snapshot(90, 2, MEMBERS, b"theirs"))
    files.meanwhile = lambda: installed.append(store.install(arrived))
    own = store.save_snapshot(Snapshot(20, 1, MEMBERS, b"ours"))
    files.thread.join(5)
    assert own.data() == b"ours" and installed[0].data() == b"theirs"
    store.close()
    found = Store.open(directory, RaftSettings(), files)
    assert found.snapshot is not None and found.snapshot.index == 90
    found.close()


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_a_blob_that_a_client_was_told_of_stays_for_its_job(cluster: FakeCluster) -> None:  # noqa: F811
    """It would be dropped just before the job that names it arrives."""
    code = blob_hash(b"code")
    cluster.propose(PutPiece(code, 0, 4, b"code"))
    cluster.tick()
    cluster.now += ORPHAN_BLOB_S - 1
    cluster.leader.blobs_asked([code], cluster.now)
    cluster.now += 2
    cluster.tick()
    assert cluster.state.blobs.has(code)
    cluster.now += ORPHAN_BLOB_S
    cluster.tick()
    assert not cluster.state.blobs.names()


def test_an_offered_block_counts_what_its_map_counted_once(cluster: FakeCluster) -> None:  # noqa: F811
    """A map whose end its worker could not report any more would be missing in the job's counters for ever."""
    sessions = start_job(cluster, maps=2, reduces=1)
    _, start = next(found for found in cluster.running("map") if found[0] == sessions[0])
    again = cluster.register(0, process="p2")
    block = BlockOffer(start.attempt, start.token, 10, 1, 1, {"m": 3})
    assert cluster.propose(Offer(again, [block])) == [True]
    assert cluster.propose(Offer(again, [block])) == [True]
    assert cluster.state.jobs[JOB].counters == {"m": 3}
    third = cluster.register(0, process="p3")
    assert cluster.propose(Offer(third, [block])) == [True]
    assert cluster.state.jobs[JOB].counters == {"m": 3}
