"""Named locks and clients' sessions: modes, lines, tokens, delays, and requests that come twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from lock_fakes import Bench

from jobrunner.control.locks import Acquire, Busy, Granted, OperationRefused, Queued, Release, Released
from jobrunner.errors import Refused, SessionEnded
from jobrunner.ids import ClientId, Token, job_id_from_number
from jobrunner.locks.named import FORCED_KEPT_MAX

JOB, OTHER = job_id_from_number(1), job_id_from_number(2)


@pytest.fixture
def bench() -> Bench:
    return Bench(waiters_max=3, locks_max=4, sessions_max=5, unanswered_max=8)


def test_a_lock_passes_to_who_waits_longest_under_a_higher_token(bench: Bench) -> None:
    """Without order a client may wait for ever; without rising tokens a store cannot refuse the earlier holder."""
    a, b, c = bench.client("a"), bench.client("b"), bench.client("c")
    first, granted = bench.lock(a)
    assert isinstance(granted, Granted)
    second, third = bench.lock(b), bench.lock(c)
    assert [second[1], third[1]] == [Queued(0), Queued(1)]
    assert bench.unlock(a, first) == Released(True)
    assert bench.service.names.granted == [(b, second[0])]
    assert bench.token(c, third[0]) is None
    token = bench.token(b, second[0])
    assert token is not None and token > granted.token
    assert bench.unlock(b, second[0]) == Released(True)
    last = bench.token(c, third[0])
    assert last is not None and last > token


def test_a_request_that_comes_again_has_the_same_token(bench: Bench) -> None:
    """A lost reply must not leave a client waiting behind itself."""
    a = bench.client("a")
    ticket, granted = bench.lock(a)
    assert bench.ask(a, Acquire("x", False, True, 0), sequence=ticket) == granted
    assert len(bench.service.names.locks["x"].holders) == 1


def test_a_late_copy_of_a_released_request_does_not_take_the_lock_again(bench: Bench) -> None:
    """Nobody would ever release it."""
    a = bench.client("a")
    ticket, _ = bench.lock(a)
    bench.unlock(a, ticket)
    assert isinstance(bench.ask(a, Acquire("x", False, True, 0), sequence=ticket), Granted)  # What it was then.
    assert "x" not in bench.service.names.locks
    bench.ask(a, Release("x", ticket), lowest=3)
    with pytest.raises(Refused, match="given up"):
        bench.ask(a, Acquire("x", False, True, 0), sequence=ticket, lowest=1)
    assert "x" not in bench.service.names.locks


def test_two_requests_of_one_session_exclude_each_other(bench: Bench) -> None:
    """Two threads of one program are two holders."""
    a = bench.client("a")
    first, granted = bench.lock(a)
    second, outcome = bench.lock(a)
    assert isinstance(granted, Granted) and outcome == Queued(0)
    bench.unlock(a, first)
    assert bench.token(a, second) is not None


def test_a_try_says_who_holds_it_and_leaves_no_trace(bench: Bench) -> None:
    """A try that stood in line would take the lock later, for nobody."""
    a, b = bench.client("a"), bench.client("b")
    ticket, _ = bench.lock(a)
    assert bench.lock(b, wait=False)[1] == Busy("a")
    bench.unlock(a, ticket)
    assert not bench.service.names.locks


def test_readers_share_and_a_writer_in_line_holds_back_later_readers(bench: Bench) -> None:
    """Readers that keep coming would starve the writer."""
    a, b, w, c = (bench.client(name) for name in "abwc")
    one, two = bench.lock(a, shared=True), bench.lock(b, shared=True)
    assert isinstance(one[1], Granted) and isinstance(two[1], Granted) and two[1].token > one[1].token
    writer, later = bench.lock(w), bench.lock(c, shared=True)
    assert writer[1] == Queued(0) and later[1] == Queued(1)
    assert bench.lock(c, shared=True, wait=False)[1] == Busy("a")
    bench.unlock(a, one[0])
    assert bench.token(w, writer[0]) is None
    bench.unlock(b, two[0])
    assert bench.token(w, writer[0]) is not None and bench.token(c, later[0]) is None
    bench.unlock(w, writer[0])
    assert bench.token(c, later[0]) is not None


def test_a_writer_that_leaves_the_line_lets_the_readers_behind_it_in(bench: Bench) -> None:
    """They would wait for a lock that nobody holds against them."""
    a, w, c = (bench.client(name) for name in "awc")
    bench.lock(a, shared=True)
    writer, reader = bench.lock(w), bench.lock(c, shared=True)
    assert bench.unlock(w, writer[0]) == Released(False)
    assert bench.token(c, reader[0]) is not None


def test_a_lock_of_a_failed_holder_stays_closed_until_its_delay_is_over(bench: Bench) -> None:
    """A write of the old holder may still be on its way."""
    a, b = bench.client("a"), bench.client("b")
    _, granted = bench.lock(a, delay=1000)
    waiting, _ = bench.lock(b)
    assert isinstance(granted, Granted)
    bench.end(a)
    assert bench.token(b, waiting) is None
    assert bench.end_delay(Token(999)) is False
    assert bench.end_delay(granted.token) is True
    assert bench.token(b, waiting) is not None
    assert bench.end_delay(granted.token) is False


def test_a_lock_that_was_given_back_or_closed_properly_has_no_delay(bench: Bench) -> None:
    """Every orderly hand-over would cost the delay."""
    a, b = bench.client("a"), bench.client("b")
    bench.lock(a, delay=1000)
    waiting, _ = bench.lock(b, delay=1000)
    bench.end(a, failed=False)
    assert bench.token(b, waiting) is not None
    bench.unlock(b, waiting)
    assert not bench.service.names.locks


def test_a_failed_reader_holds_back_writers_only(bench: Bench) -> None:
    """Other readers cannot be harmed by a late read."""
    a, w, c = (bench.client(name) for name in "awc")
    bench.lock(a, shared=True, delay=1000)
    bench.end(a)
    assert isinstance(bench.lock(c, shared=True)[1], Granted)
    assert bench.lock(w)[1] == Queued(0)


def test_who_waits_loses_the_place_with_the_session_and_is_granted_nothing_more(bench: Bench) -> None:
    """etcd issue 11456: a waiter whose lease was over believed to hold the lock."""
    a, b, c = (bench.client(name) for name in "abc")
    held, _ = bench.lock(a)
    mine, _ = bench.lock(b)
    bench.lock(b)
    last, _ = bench.lock(c)
    bench.end(b)
    bench.unlock(a, held)
    assert bench.token(b, mine) is None
    assert bench.token(c, last) is not None
    with pytest.raises(SessionEnded):
        bench.lock(b)


def test_a_dead_client_does_not_inherit_from_itself(bench: Bench) -> None:
    """It holds the lock and waits for it as well: its own end must not grant it again."""
    a = bench.client("a")
    bench.lock(a)
    bench.lock(a)
    bench.end(a)
    assert not bench.service.names.locks


def test_an_operator_takes_a_lock_once_and_it_stays_closed_for_its_delay(bench: Bench) -> None:
    """Its holder may be alive, and learns it with the next keepalive."""
    a, b = bench.client("a"), bench.client("b")
    ticket, granted = bench.lock(a, delay=500)
    waiting, _ = bench.lock(b)
    assert isinstance(granted, Granted)
    assert bench.service.names.tokens(a) == {granted.token}
    bench.service.names.force("x", granted.token, "stuck", 7)
    bench.check()
    assert bench.service.names.tokens(a) == set()
    assert [(f.name, f.owner, f.reason) for f in bench.service.names.forced] == [("x", "a", "stuck")]
    with pytest.raises(Refused, match="not held under token"):
        bench.service.names.force("x", granted.token, "again", 8)
    assert bench.unlock(a, ticket) == Released(False)
    bench.end_delay(granted.token)
    assert bench.token(b, waiting) is not None


def test_forced_releases_are_remembered_up_to_a_limit(bench: Bench) -> None:
    """State must not grow with what operators do."""
    a = bench.client("a")
    for number in range(1, FORCED_KEPT_MAX + 10):
        outcome = bench.ask(a, Acquire("x", False, True, 0), lowest=number)
        assert isinstance(outcome, Granted)
        bench.service.names.force("x", outcome.token, str(number), 0)
    assert len(bench.service.names.forced) == FORCED_KEPT_MAX


def test_a_job_and_a_program_exclude_each_other_from_an_output(bench: Bench) -> None:
    """Two writers would mix their files in one directory."""
    a, names = bench.client("a"), bench.service.names
    assert names.reserve("output:/o", JOB) == ""
    assert names.reserve("output:/o", JOB) == ""
    assert names.reserve("output:/o", OTHER) == f"job {JOB}"
    assert bench.lock(a, "output:/o", wait=False)[1] == Busy(f"job {JOB}")
    with pytest.raises(Refused, match="kill the job"):
        names.force("output:/o", Token(1), "", 0)
    ticket, outcome = bench.lock(a, "output:/o")
    assert outcome == Queued(0)
    names.unreserve("output:/o", OTHER, 0)
    assert bench.token(a, ticket, "output:/o") is None
    names.unreserve("output:/o", JOB, 0)
    bench.check()
    assert bench.token(a, ticket, "output:/o") is not None
    assert names.reserve("output:/o", OTHER) == "a"


def test_limits_refuse_without_a_trace(bench: Bench) -> None:
    """A client in a loop must not fill the masters' memory."""
    clients = [bench.client(name) for name in "abcde"]
    with pytest.raises(Refused, match="sessions_max"):
        bench.client("f")
    for client in clients[:4]:
        bench.lock(client)
    refused = bench.lock(clients[4])[1]
    assert isinstance(refused, OperationRefused) and "waiters_max" in refused.reason
    for name in ("y", "z", "u"):
        bench.lock(clients[4], name)
    assert "locks_max" in bench.lock(clients[4], "v")[1].reason
    for name, delay in (("", 0), ("n" * 1025, 0), ("x", -1), ("x", 10**9)):
        assert isinstance(bench.lock(clients[0], name, delay=delay)[1], OperationRefused)
    for ttl_ms in (1, 10**9):
        with pytest.raises(Refused, match="ttl"):
            bench.service.open("k", "o", ttl_ms, 0)


def test_unacknowledged_answers_are_limited_and_nothing_is_carried_out_beyond(bench: Bench) -> None:
    """The table of answers is part of the state: a client that never acknowledges must be stopped."""
    a = bench.client("a")
    for _ in range(8):
        bench.ask(a, Release("x", 1))
    with pytest.raises(Refused, match="unanswered_max"):
        bench.lock(a)
    assert not bench.service.names.locks
    assert isinstance(bench.ask(a, Acquire("x", False, True, 0), lowest=9), Granted)


def test_opening_a_session_again_is_the_same_session(bench: Bench) -> None:
    """A lost reply would leave a session that holds a place among sessions_max for its ttl."""
    assert bench.client("a") == bench.client("a")
    assert bench.end(bench.client("a")) is True
    assert bench.end(ClientId(1)) is False


class LockMachine(RuleBasedStateMachine):
    """Any course of events keeps the invariants, grants in the order of the line, and raises tokens per lock."""

    @initialize()
    def begin(self) -> None:
        self.bench = Bench()
        self.clients = [self.bench.client(name) for name in "abc"]
        self.tickets: list[tuple[ClientId, int, str]] = []
        self.seen: dict[str, int] = {}
        self.known: set[int] = set()

    def look(self) -> None:
        self.bench.check()
        for name, lock in self.bench.service.names.locks.items():
            fresh = sorted(place.token for place in lock.holders.values() if place.token not in self.known)
            assert all(token > self.seen.get(name, 0) for token in fresh)
            self.known.update(fresh)
            self.seen[name] = max([self.seen.get(name, 0), *fresh])

    @rule(who=st.integers(0, 2), name=st.sampled_from("xy"), shared=st.booleans(), wait=st.booleans(),
          delay=st.sampled_from([0, 5]))  # fmt: skip
    def acquire(self, who: int, name: str, shared: bool, wait: bool, delay: int) -> None:
        client = self.clients[who]
        line = self.waiting(name)
        ticket, outcome = self.bench.lock(client, name, shared=shared, wait=wait, delay=delay)
        if isinstance(outcome, Granted):
            assert not line, "granted past the line"
        self.tickets.append((client, ticket, name))
        self.look()

    def waiting(self, name: str) -> list[tuple[ClientId, int]]:
        lock = self.bench.service.names.locks.get(name)
        return list(lock.waiters) if lock is not None else []

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client, ticket, name = data.draw(st.sampled_from(self.tickets))
        before = [place for place in self.waiting(name) if place != (client, ticket)]
        self.bench.unlock(client, ticket, name)
        after = self.waiting(name)
        assert before[len(before) - len(after) :] == after, "granted out of order"
        self.look()

    @rule(who=st.integers(0, 2), failed=st.booleans())
    def end(self, who: int, failed: bool) -> None:
        old = self.clients[who]
        self.bench.end(old, failed=failed)
        self.tickets = [ticket for ticket in self.tickets if ticket[0] != old]
        self.clients[who] = self.bench.client(f"{'abc'[who]}{old}")
        self.look()

    @precondition(lambda self: self.bench.service.names.delayed)
    @rule()
    def end_delay(self) -> None:
        self.bench.end_delay(next(iter(self.bench.service.names.delayed)))
        self.look()


LockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLockMachine = LockMachine.TestCase
