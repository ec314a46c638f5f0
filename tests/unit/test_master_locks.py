"""Locks in the masters: expiry by the leader's clock and the log's word, jobs' outputs, limits, requests that wait."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from test_master_state import JOB, FakeCluster

from jobrunner.control.locks import (
    Acquire,
    Answered,
    Ask,
    AwaitGrant,
    CloseClient,
    ForceRelease,
    Granted,
    KeepAlive,
    KeptAlive,
    ListLocks,
    OpenClient,
    Put,
    Queued,
    ReadKeys,
    Release,
    Released,
    Transact,
    WatchKeys,
)
from jobrunner.control.messages import StepDone
from jobrunner.errors import JobrunnerError, NotLeader, OutputBusy, Refused, SessionEnded, Unavailable
from jobrunner.ids import ClientId, Epoch, Token
from jobrunner.locks.limits import LockLimits, limits_of
from jobrunner.master.commands import BeginClient, EndAttempts, EndClient, Kill, RunOperation
from jobrunner.master.leader import Leader, LeaderLimits
from jobrunner.master.requests import Requests
from jobrunner.spec.settings import LocksSection, Settings


class LockCluster(FakeCluster):
    """Adds clients, and time that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.leads = True
        self.barriers = 0

    def open(self, key: str = "a", ttl_ms: int = 1000) -> ClientId:
        return ClientId(self.propose(BeginClient(key, key, ttl_ms)))  # type: ignore[call-overload]

    def acquire(self, client: ClientId, sequence: int = 1, name: str = "x", *, delay: int = 0) -> Any:
        return self.propose(RunOperation(client, sequence, 1, Acquire(name, False, True, delay)))

    def ticks(self, seconds: float, *, beat: ClientId | None = None) -> None:
        """Time passes in ticks; what the leader proposes is applied."""
        end = self.now + seconds
        while self.now < end:
            self.now = round(self.now + 0.1, 3)
            if beat is not None:
                self.leader.lock_timers.renew(self.state.service, beat, self.now)
            for proposal in self.leader.tick(self.state, self.now)[0]:
                self.propose(proposal.command)
                self.leader.settled(proposal.key)

    def lives(self, client: ClientId) -> bool:
        return client in self.state.service.clients.live


class Front:
    """The master of Requests, over a LockCluster."""

    def __init__(self, cluster: LockCluster) -> None:
        self.cluster, self.state, self.settings = cluster, cluster.state, Settings()
        self.requests = Requests(self)  # type: ignore[arg-type]

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return 5

    def leading(self) -> Leader:
        if not self.cluster.leads:
            raise NotLeader("not here", leader="")
        return self.cluster.leader

    async def propose(self, command: Any) -> Any:
        self.leading()
        try:
            return self.cluster.propose(command)
        finally:
            self.requests.applied()

    async def barrier(self) -> None:
        self.leading()
        self.cluster.barriers += 1

    def wake(self) -> None:
        pass

    async def ask(self, message: Any) -> Any:
        return await self.requests.answer(message)


@pytest.fixture
def cluster() -> LockCluster:
    return LockCluster()


@pytest.fixture
def front(cluster: LockCluster) -> Front:
    return Front(cluster)


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 5)

    return asyncio.run(bounded())


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_silent_client_is_ended_after_its_own_ttl_and_its_lock_after_the_delay(cluster: LockCluster) -> None:
    """Too early: two holders. Never: nobody gets the lock again."""
    a, b = cluster.open("a", 1000), cluster.open("b", 60_000)
    cluster.acquire(a, delay=500)
    cluster.acquire(b)
    cluster.ticks(0.9)
    assert cluster.lives(a)
    cluster.ticks(0.3)
    assert not cluster.lives(a) and cluster.lives(b)
    assert isinstance(cluster.state.service.names.outcome(b, "x", 1), Queued)
    cluster.ticks(0.6)
    assert isinstance(cluster.state.service.names.outcome(b, "x", 1), Granted)


def test_a_client_that_is_heard_lives_on(cluster: LockCluster) -> None:
    """Keepalives are not in the log: only the leader's memory says it."""
    a = cluster.open("a", 1000)
    cluster.ticks(5, beat=a)
    assert cluster.lives(a)


def test_a_new_leader_gives_sessions_and_delays_their_full_time(cluster: LockCluster) -> None:
    """An earlier leader may have heard the client just before it died."""
    a = cluster.open("a", 1000)
    cluster.ticks(0.9)
    cluster.new_leader()
    cluster.ticks(0.9)
    assert cluster.lives(a)
    cluster.ticks(0.3)
    assert not cluster.lives(a)


def test_time_in_which_the_leader_did_not_run_counts_for_nobody(cluster: LockCluster) -> None:
    """A leader that was stopped would end everybody when it wakes."""
    a = cluster.open("a", 1000)
    cluster.ticks(0.5)
    cluster.now += 100
    cluster.ticks(0.4)
    assert cluster.lives(a)
    cluster.ticks(0.4)
    assert not cluster.lives(a)


def test_the_verdict_of_a_deposed_leader_does_not_count(cluster: LockCluster) -> None:
    """It has not heard the keepalives that the new leader has."""
    a = cluster.open()
    cluster.new_leader()
    cluster.ticks(0.1)
    cluster.open("b")
    with pytest.raises(NotLeader):
        cluster.propose(EndClient(a, True, "silent"), epoch=cluster.epoch - 1)
    assert cluster.lives(a)


def test_limits_of_the_leaders_settings_become_those_of_the_state(cluster: LockCluster) -> None:
    """Masters with different settings would refuse different requests, and part for ever."""
    cluster.leader = Leader(
        Epoch(cluster.epoch), 0.0, LeaderLimits(5, 4, 3, locks=limits_of(LocksSection(sessions_max=1)))
    )
    cluster.open("a")
    cluster.ticks(0.1)
    assert cluster.state.service.limits == LockLimits(sessions_max=1)
    with pytest.raises(Refused, match="sessions_max"):
        cluster.open("b")
    assert not [p for p in cluster.leader.tick(cluster.state, cluster.now)[0] if p.key == "lock limits"]


# --- outputs of jobs -------------------------------------------------------------------------------------------------


def test_a_program_that_holds_an_outputs_lock_keeps_jobs_out(cluster: LockCluster) -> None:
    """Both would write one directory."""
    a = cluster.open()
    cluster.acquire(a, 1, "output:/out")
    with pytest.raises(OutputBusy, match="holds the lock"):
        cluster.submit()
    assert not cluster.state.locks.paths
    cluster.propose(RunOperation(a, 2, 1, Release("output:/out", 1)))
    cluster.submit()


def test_a_job_keeps_programs_out_of_its_output_until_it_is_tidy(cluster: LockCluster) -> None:
    """A job that has ended may still have files to delete there."""
    cluster.submit()
    worker = cluster.register(1)
    cluster.tick()
    a = cluster.open()
    assert cluster.acquire(a, 1, "output:/out") == Queued(0)
    cluster.propose(Kill(JOB, "enough"))
    for _ in range(5):
        for session, start in cluster.running("cleanup"):
            assert session == worker
            cluster.propose(EndAttempts(session, [StepDone(start.attempt, start.token, "done")]))
        assert (
            isinstance(cluster.state.service.names.outcome(a, "output:/out", 1), Granted)
            == cluster.state.jobs[JOB].tidy
        )
        cluster.tick()
    assert cluster.state.jobs[JOB].tidy


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_keepalive_is_answered_after_the_barrier_and_names_what_is_gone(cluster: LockCluster, front: Front) -> None:
    """A deposed leader would keep a lease alive that the new one has ended."""
    a = cluster.open()
    held = cluster.acquire(a)
    cluster.ticks(0.1)
    assert run(front.ask(KeepAlive(a, [held.token, Token(77)]))) == KeptAlive([Token(77)])
    assert cluster.barriers == 1
    run(front.ask(ForceRelease("x", held.token, "stuck")))
    assert run(front.ask(KeepAlive(a, [held.token]))) == KeptAlive([held.token])
    run(front.ask(CloseClient(a)))
    with pytest.raises(SessionEnded):
        run(front.ask(KeepAlive(a, [])))


def test_a_keepalive_is_not_confirmed_while_the_end_is_being_decided(cluster: LockCluster, front: Front) -> None:
    """The client would go on for a ttl after the entry that ends it."""
    a = cluster.open("a", 1000)
    cluster.ticks(0.1)
    cluster.now += 0.4
    cluster.leader.tick(cluster.state, cluster.now)
    cluster.now += 0.4
    cluster.leader.tick(cluster.state, cluster.now)
    cluster.now += 0.4
    assert cluster.leader.tick(cluster.state, cluster.now)[0]  # Proposed, and not applied.
    with pytest.raises(Unavailable, match="being decided"):
        run(front.ask(KeepAlive(a, [])))


def test_a_keepalive_that_saw_two_leaderships_is_not_confirmed(cluster: LockCluster, front: Front) -> None:
    """The later leader does not know of the renewal."""
    a = cluster.open()

    async def barrier() -> None:
        cluster.new_leader()

    front.barrier = barrier  # type: ignore[method-assign]
    with pytest.raises(NotLeader):
        run(front.ask(KeepAlive(a, [])))


def test_who_waits_is_told_at_once_when_granted(cluster: LockCluster, front: Front) -> None:
    """Polling would cost every hand-over its interval."""
    a, b = cluster.open("a"), cluster.open("b")
    cluster.acquire(a)

    async def course() -> None:
        queued = await front.ask(Ask(b, 1, 1, Acquire("x", False, True, 0)))
        assert queued == Answered(Queued(0))
        waiting = asyncio.ensure_future(front.ask(AwaitGrant(b, "x", 1, 4_000)))
        await asyncio.sleep(0)
        await front.ask(Ask(a, 2, 1, Release("x", 1)))
        granted = (await waiting).outcome
        assert isinstance(granted, Granted)
        assert (await front.ask(AwaitGrant(b, "x", 1, 0))).outcome == granted
        assert (await front.ask(AwaitGrant(a, "x", 1, 0))).outcome == Released(False)

    run(course())


def test_who_waits_in_vain_is_told_so(cluster: LockCluster, front: Front) -> None:
    """After the time, when the session ends, and when the leadership ends."""
    a, b = cluster.open("a"), cluster.open("b")
    cluster.acquire(a)
    cluster.acquire(b)

    async def course() -> None:
        assert (await front.ask(AwaitGrant(b, "x", 1, 1))).outcome == Queued(0)
        first = asyncio.ensure_future(front.ask(AwaitGrant(b, "x", 1, 4_000)))
        await asyncio.sleep(0)
        await front.propose(EndClient(b, True, "silent"))
        with pytest.raises(SessionEnded):
            await first
        c = cluster.open("c")
        cluster.acquire(c)
        second = asyncio.ensure_future(front.ask(AwaitGrant(c, "x", 1, 4_000)))
        await asyncio.sleep(0)
        front.requests.not_leading("b:1")
        with pytest.raises(NotLeader):
            await second

    run(course())


def test_refusals_reach_whoever_asked_and_again_the_same(cluster: LockCluster, front: Front) -> None:
    """A refusal that is retried and then carried out is neither."""
    a = cluster.open()
    message = Ask(a, 1, 1, Acquire("", False, True, 0))
    for _ in range(2):
        with pytest.raises(Refused, match="name"):
            run(front.ask(message))


def test_locks_are_listed_and_taken_with_a_reason(cluster: LockCluster, front: Front) -> None:
    """The operator must see who holds what, and later who took it and why."""
    a, b = cluster.open("a"), cluster.open("b")
    held = cluster.acquire(a)
    cluster.acquire(b)
    found = run(front.ask(ListLocks()))
    (info,) = found.locks
    assert (info.name, info.holders[0].owner, info.holders[0].token, info.waiting) == ("x", "a", held.token, 1)
    with pytest.raises(Refused, match="reason"):
        run(front.ask(ForceRelease("x", held.token, " ")))
    run(front.ask(ForceRelease("x", held.token, "stuck")))
    after = run(front.ask(ListLocks("x")))
    assert after.forced[0].reason == "stuck" and after.locks[0].holders[0].owner == "b"


def test_a_watch_is_answered_by_the_next_change_of_its_prefix(cluster: LockCluster, front: Front) -> None:
    """A change of other keys must not end it, nor one be missed between two watches."""
    opened = run(front.ask(OpenClient("a", "a", 1000)))
    a = opened.client

    async def put(sequence: int, key: str) -> None:
        await front.ask(Ask(a, sequence, 1, Transact([], [Put(key, b"v")], [])))

    async def course() -> None:
        watching = asyncio.ensure_future(front.ask(WatchKeys("p/", 1, 4_000)))
        await asyncio.sleep(0)
        await put(1, "other")
        await asyncio.sleep(0)
        assert not watching.done()
        await put(2, "p/1")
        found = await watching
        assert ([change.key for change in found.changes], found.next) == (["p/1"], 3)
        assert (await front.ask(WatchKeys("p/", 3, 1))).changes == []
        keys = await front.ask(ReadKeys("p/"))
        assert [item.key for item in keys.items] == ["p/1"]

    run(course())


def test_only_a_leader_answers(cluster: LockCluster, front: Front) -> None:
    """A follower's view of a lock is old."""
    a = cluster.open()
    cluster.leads = False
    for message in (OpenClient("b", "b", 1000), KeepAlive(a, []), CloseClient(a), AwaitGrant(a, "x", 1, 1),
                    ListLocks(), ForceRelease("x", Token(1), "r"), ReadKeys(""), WatchKeys("", 1, 1),
                    Ask(a, 1, 1, Release("x", 1))):  # fmt: skip
        with pytest.raises(JobrunnerError, match="not here"):
            run(front.ask(message))
