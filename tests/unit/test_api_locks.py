"""Locks and small values as a program sees them, against masters in memory."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from jobrunner import Client, LockBusy, LockInDoubt, LockLost, Refused, SpecError, Unavailable
from jobrunner.cli.app import app
from jobrunner.cli.present_locks import change_object, locks_object, locks_text
from jobrunner.control.locks import (
    Acquire,
    Ask,
    Compare,
    Get,
    KeepAlive,
    KeyChange,
    LockInfo,
    LockList,
    LockOwner,
    OpenClient,
    Put,
    Release,
)
from jobrunner.ids import ClientId, Epoch, Token
from jobrunner.locks.holder import Hold
from jobrunner.master.commands import EndClient, Entry
from jobrunner.master.invariants import check_state
from jobrunner.master.leader import Leader, LeaderLimits
from jobrunner.master.requests import Requests
from jobrunner.master.state import MasterState
from jobrunner.spec.settings import Settings

TTL = 0.5  # The shortest that is allowed.


class FakeMasters:
    """One master that always leads; `silent` answers nothing, `doubled` carries every request out twice."""

    settings = Settings()

    def __init__(self) -> None:
        self.state = MasterState()
        self.leader = Leader(Epoch(1), 0.0, LeaderLimits(5, 4, 3))
        self.requests = Requests(self)  # type: ignore[arg-type]
        self.silent = self.doubled = False
        self.asked: list[Any] = []

    def now(self) -> float:
        return 0.0

    def wall_ms(self) -> int:
        return 90_000

    def leading(self) -> Leader:
        return self.leader

    async def barrier(self) -> None:
        pass

    async def propose(self, command: Any) -> Any:
        return self.apply(command)

    def apply(self, command: Any) -> Any:
        result = self.state.apply(Entry(1, 1000, Epoch(1), command))
        check_state(self.state)
        self.requests.applied()
        if isinstance(result, Exception):
            raise result
        return result

    async def call(self, message: Any, *, deadline_s: float, timeout_s: float) -> Any:
        if self.silent:
            raise Unavailable("nobody answers")
        self.asked.append(message)
        if self.doubled:
            await self.requests.answer(message)
        return await self.requests.answer(message)

    async def close(self) -> None:
        pass

    def sent(self, kind: type) -> list[Any]:
        return [each.operation for each in self.asked if isinstance(each, Ask) and isinstance(each.operation, kind)]

    def end_all(self) -> None:
        for client in list(self.state.service.clients.live):
            self.apply(EndClient(client, True, "silent"))


@pytest.fixture
def masters() -> FakeMasters:
    return FakeMasters()


@pytest.fixture
def client(masters: FakeMasters) -> Iterator[Client]:
    with Client.over(masters) as made:
        yield made


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lock_is_held_in_the_body_and_free_after_it(masters: FakeMasters, client: Client) -> None:
    """And one session serves all locks of one ttl."""
    with client.lock("x") as lock:
        assert lock.state is Hold.HELD
        lock.check()
        first = lock.token
        assert [info.holders[0].token for info in client.locks().locks] == [first]
    assert client.locks().locks == []
    with client.lock("x") as again:
        assert again.token > first
    assert len([each for each in masters.asked if isinstance(each, OpenClient)]) == 1
    assert not lock.release()


def test_requests_that_arrive_twice_count_once(masters: FakeMasters, client: Client) -> None:
    """A lost reply is answered by the same request again."""
    masters.doubled = True
    with client.lock("x", wait=0):
        assert len(masters.state.service.names.locks["x"].holders) == 1
    assert client.kv.put("k", "v")
    assert masters.state.service.keys.revision == 1


def test_a_try_is_refused_at_once_and_leaves_nothing(masters: FakeMasters, client: Client) -> None:
    """`wait=0` must cost one request."""
    with client.lock("x"):
        with pytest.raises(LockBusy, match="not free") as caught:
            client.lock("x", wait=0).acquire()
        assert caught.value.fields["owner"]
        assert not masters.sent(Release)
        with pytest.raises(LockBusy, match=r"after 0\.01 s"):
            client.lock("x", wait=0.01).acquire()
        assert not masters.state.service.names.locks["x"].waiters


def test_one_lock_object_has_one_holder(client: Client) -> None:
    """Two threads that share one would both be inside."""
    lock = client.lock("x")
    with pytest.raises(LockLost):
        lock.token  # noqa: B018
    with lock, pytest.raises(Refused, match="in use"):
        lock.acquire()


def test_readers_share(client: Client) -> None:
    with client.lock("x", shared=True), client.lock("x", shared=True, wait=0):
        with pytest.raises(LockBusy):
            client.lock("x", wait=0).acquire()


def test_silence_of_the_masters_means_doubt_and_then_loss(masters: FakeMasters, client: Client) -> None:
    """A program that cannot hear must stop before the masters give the lock away."""
    seen: list[Hold] = []
    lock = client.lock("x", ttl=TTL, delay=0, on_doubt=lambda lock: seen.append(lock.state))
    with pytest.raises(LockLost, match="while it was used"), lock:  # noqa: PT012
        masters.silent = True
        wait_for(lambda: lock.state is Hold.IN_DOUBT)
        with pytest.raises(LockInDoubt):
            lock.check()
        wait_for(lambda: seen == [Hold.IN_DOUBT, Hold.LOST])
        with pytest.raises(LockLost):
            lock.check()
    masters.silent = False
    masters.end_all()
    with client.lock("x", ttl=TTL):  # In a session of its own.
        pass


def test_doubt_ends_when_the_masters_answer_again(masters: FakeMasters, client: Client) -> None:
    """An election must not cost every lock."""
    with client.lock("x", ttl=TTL) as lock:
        masters.silent = True
        wait_for(lambda: lock.state is Hold.IN_DOUBT)
        masters.silent = False
        wait_for(lambda: lock.state is Hold.HELD)


def test_the_body_hears_of_a_session_that_the_masters_ended(masters: FakeMasters, client: Client) -> None:
    """At once, not when the ttl is over; and an error of the body itself is not hidden."""
    with pytest.raises(ZeroDivisionError), client.lock("x", ttl=TTL) as lock:  # noqa: PT012
        masters.end_all()
        wait_for(lambda: lock.state is Hold.LOST)
        _ = 1 / 0


def test_the_holder_hears_of_a_lock_that_an_operator_took(masters: FakeMasters, client: Client) -> None:
    """Its other locks stay."""
    calls: list[str] = []
    with client.lock("other", ttl=TTL) as other:
        lock = client.lock("x", ttl=TTL, on_doubt=lambda lock: calls.append(lock.name))
        lock.acquire()
        assert [holder.token for holder in client.release_lock("x", reason="stuck")] == [lock.token]
        wait_for(lambda: calls == ["x"])
        assert lock.state is Hold.LOST
        assert lock.release() is False
        other.check()
        with pytest.raises(Refused, match="not held"):
            client.release_lock("x", reason="again")
    assert client.locks().forced[0].reason == "stuck"


def test_closing_the_client_gives_everything_back(masters: FakeMasters) -> None:
    """Without delay: it is no failure."""
    with Client.over(masters) as client:
        client.lock("x", delay=5).acquire()
        client.kv.put("k", b"", ephemeral=True)
    assert not masters.state.service.clients.live
    assert not masters.state.service.names.locks
    assert not masters.state.service.keys.items


def test_every_request_acknowledges_those_before(masters: FakeMasters, client: Client) -> None:
    """Otherwise answers pile up in the masters."""
    for _ in range(5):
        with client.lock("x"):
            pass
    (session,) = masters.state.service.clients.live.values()
    assert len(session.answers) == 1
    assert [each.sequence for each in masters.asked if isinstance(each, Ask)] == list(range(1, 11))
    assert all(each.lowest == each.sequence for each in masters.asked if isinstance(each, Ask))


@pytest.mark.parametrize("options", [{"ttl": 0.1}, {"ttl": 1e9}, {"delay": -1}, {"delay": 1e9}, {"wait": -1.0}])
def test_wrong_times_are_refused_before_anything_is_sent(
    masters: FakeMasters, client: Client, options: dict[str, float]
) -> None:
    with pytest.raises(SpecError, match="allowed"):
        client.lock("x", **options)  # type: ignore[arg-type]
    assert not masters.asked


def test_small_values(masters: FakeMasters, client: Client) -> None:
    """What the README shows."""
    kv = client.kv
    first = kv.put("a/1", "one", if_modified=0)
    assert first is not None and first.value == b"one"
    assert kv.put("a/1", "two", if_modified=0) is None
    assert kv.get("a/1") == first and kv.get("a") is None
    kv.put("a/2", b"two")
    kv.put("b", b"")
    assert [item.key for item in kv.list("a/")] == ["a/1", "a/2"]
    done = kv.transact([Compare("a/1", value=b"one")], [Put("a/1", b"1")], [Get("a/1")])
    assert done.succeeded
    assert kv.delete("a/2", if_modified=1) is False
    assert kv.delete("a/2") is True and kv.delete("a/2") is False
    changes = kv.watch("a/", revision=1)
    assert [next(changes).value for _ in range(4)] == [b"one", b"two", b"1", None]
    later = kv.watch("b")
    kv.put("b", b"new")
    assert next(later).value == b"new"


def test_keepalives_name_what_is_held(masters: FakeMasters, client: Client) -> None:
    """Only so a lock that was taken away is noticed."""
    with client.lock("x", ttl=TTL) as lock:
        wait_for(lambda: KeepAlive(ClientId(1), [lock.token]) in masters.asked)
    assert masters.sent(Acquire)


def test_locks_are_shown_with_owner_age_and_line() -> None:
    """What an operator looks for when something waits."""
    owner = LockOwner("me@here:1", ClientId(1), Token(7), False, 30_000)
    infos = [
        LockInfo("held", [owner], [owner], 3, []),
        LockInfo("closed", [], [], 0, [owner]),
        LockInfo("output:/o", [], [], 0, [], "j-1"),
    ]
    found = LockList(infos, False, [], 90_000)
    held, closed, output = locks_text(found).splitlines()[1:]
    assert held.split() == ["held", "exclusive", "7", "60", "s", "me@here:1", "3"]
    assert closed.split()[1] == "closed"
    assert "job j-1" in output
    shown: Any = locks_object(found)
    assert shown["locks"][0]["holders"][0]["age_s"] == 60.0
    assert shown["locks"][2]["job"] == "j-1"
    assert locks_text(LockList([], False, [], 0)) == "no locks"


def kv(masters: FakeMasters, monkeypatch: pytest.MonkeyPatch, *words: str, status: int = 0, stdin: bytes = b"") -> str:
    monkeypatch.setattr("jobrunner.cli.kv.open_client", lambda *_: Client.over(masters))
    result = CliRunner().invoke(app, ["kv", *words], input=stdin)
    assert result.exit_code == status, result.output
    return result.stdout


def test_small_values_from_the_command_line(masters: FakeMasters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts go by revisions and exit statuses."""
    assert kv(masters, monkeypatch, "put", "a", "1", "--if-modified", "0") == "1\n"
    kv(masters, monkeypatch, "put", "a", "2", "--if-modified", "0", status=2)
    assert kv(masters, monkeypatch, "put", "b", "-", stdin=b"two") == "2\n"
    assert kv(masters, monkeypatch, "get", "b") == "two"
    assert '"modified": 2' in kv(masters, monkeypatch, "get", "b", "--json")
    assert kv(masters, monkeypatch, "list") == "a\nb\n"
    assert '"value": "two"' in kv(masters, monkeypatch, "list", "b", "--json")
    kv(masters, monkeypatch, "delete", "a", "--if-modified", "7", status=2)
    kv(masters, monkeypatch, "delete", "a")
    kv(masters, monkeypatch, "get", "a", status=2)


def test_changes_are_shown_as_text_where_they_are_text() -> None:
    """Values are bytes; JSON has none."""
    assert change_object(KeyChange(1, "k", b"v")) == {"revision": 1, "key": "k", "value": "v"}
    assert change_object(KeyChange(2, "k", None))["value"] is None
    assert change_object(KeyChange(3, "k", b"\xff")) == {"revision": 3, "key": "k", "value_base64": "/w=="}
