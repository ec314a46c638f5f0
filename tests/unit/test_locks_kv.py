"""Small values: revisions, transactions, ephemeral keys, changes to watch."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lock_fakes import Bench

from jobrunner.control.locks import (
    Compare,
    Delete,
    Get,
    KeyChange,
    KeyStep,
    KeyValue,
    OperationRefused,
    Put,
    Transact,
    Transacted,
)
from jobrunner.errors import Compacted, SessionEnded
from jobrunner.ids import ClientId
from jobrunner.locks.kv import CHANGE_BYTES

BIG = 1 << 20


@pytest.fixture
def bench() -> Bench:
    return Bench(value_bytes_max=100, kv_bytes_max=400, name_bytes_max=20, steps_max=4)


def transact(
    bench: Bench, client: ClientId, *then: KeyStep, compares: Sequence[Compare] = (), otherwise: Sequence[KeyStep] = ()
) -> Transacted:
    outcome = bench.ask(client, Transact([*compares], [*then], [*otherwise]))
    assert isinstance(outcome, Transacted), outcome
    return outcome


def refused(bench: Bench, client: ClientId, *then: KeyStep) -> str:
    before = dict(bench.service.keys.items)
    outcome = bench.ask(client, Transact([], list(then), []))
    assert isinstance(outcome, OperationRefused), outcome
    assert bench.service.keys.items == before
    return outcome.reason


def changes(bench: Bench, revision: int, prefix: str = "", bytes_max: int = BIG) -> tuple[list[KeyChange], int]:
    return bench.service.keys.changes(prefix, revision, bytes_max=bytes_max)


def test_a_key_keeps_its_first_revision_until_it_is_deleted(bench: Bench) -> None:
    """Whoever compares `created` would take a new key for the old one."""
    a = bench.client()
    assert transact(bench, a, Put("k", b"1")).found == [KeyValue("k", b"1", 1, 1)]
    assert transact(bench, a, Put("k", b"2")).found == [KeyValue("k", b"2", 1, 2)]
    assert transact(bench, a, Delete("k")).found == [KeyValue("k", b"2", 1, 2)]
    assert transact(bench, a, Put("k", b"3")).found == [KeyValue("k", b"3", 4, 4)]


def test_compare_and_set_lets_one_of_two_writers_win(bench: Bench) -> None:
    """Both would believe that theirs is the value."""
    a, b = bench.client("a"), bench.client("b")
    absent = [Compare("k", modified=0)]
    assert transact(bench, a, Put("k", b"a"), compares=absent).succeeded
    lost = transact(bench, b, Put("k", b"b"), compares=absent, otherwise=[Get("k")])
    assert not lost.succeeded
    assert lost.found == [KeyValue("k", b"a", 1, 1)]
    assert lost.revision == 1


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare("k"), True),
        (Compare("k", modified=2), True),
        (Compare("k", modified=1), False),
        (Compare("k", created=1), True),
        (Compare("k", created=0), False),
        (Compare("k", value=b"2"), True),
        (Compare("k", value=b""), False),
        (Compare("k", modified=2, value=b"1"), False),
        (Compare("absent", created=0, modified=0), True),
        (Compare("absent", value=b""), False),
    ],
)
def test_every_comparison(bench: Bench, compare: Compare, holds: bool) -> None:
    """A comparison that is wrong in one case is a lock that opens in that case."""
    a = bench.client()
    transact(bench, a, Put("k", b"1"))
    transact(bench, a, Put("k", b"2"))
    assert transact(bench, a, compares=[compare]).succeeded is holds


def test_a_transaction_is_one_revision_and_its_steps_see_each_other(bench: Bench) -> None:
    """Half of a transaction must never be seen."""
    a = bench.client()
    done = transact(bench, a, Put("x", b"1"), Put("y", b"1"), Delete("x"), Get("y"))
    assert done.revision == 1
    assert done.found[3] == KeyValue("y", b"1", 1, 1)
    assert changes(bench, 1) == ([KeyChange(1, "y", b"1")], 2)
    assert transact(bench, a, Get("x"), Delete("x")).revision == 1


def test_a_write_that_comes_again_is_not_made_again(bench: Bench) -> None:
    """A counter would count twice."""
    a = bench.client()
    request = Transact([], [Put("k", b"1")], [])
    assert bench.ask(a, request, sequence=5) == bench.ask(a, request, sequence=5)
    assert bench.service.keys.revision == 1


def test_ephemeral_keys_go_with_their_session_in_one_revision(bench: Bench) -> None:
    """They say who is alive."""
    a, b = bench.client("a"), bench.client("b")
    transact(bench, a, Put("a1", b"", ephemeral=True), Put("a2", b"", ephemeral=True), Put("stays", b""))
    transact(bench, b, Put("b1", b"", ephemeral=True), Put("a2", b"", ephemeral=True))
    bench.end(a)
    assert sorted(bench.service.keys.items) == ["a2", "b1", "stays"]
    assert changes(bench, 3) == ([KeyChange(3, "a1", None)], 4)
    transact(bench, b, Put("b1", b""))
    bench.end(b, failed=False)
    assert sorted(bench.service.keys.items) == ["b1", "stays"]
    with pytest.raises(SessionEnded):
        bench.ask(b, Transact([], [Put("k", b"", True)], []))


def test_limits_refuse_the_whole_transaction(bench: Bench) -> None:
    """Masters hold every value in memory."""
    a = bench.client()
    assert "value_bytes_max" in refused(bench, a, Put("x", b""), Put("k", b"v" * 101))
    assert "key" in refused(bench, a, Put("", b""))
    assert "key" in refused(bench, a, Get("k" * 21))
    assert "steps_max" in refused(bench, a, *[Get("k")] * 5)
    for number in range(3):
        transact(bench, a, Put(f"k{number}", b"v" * 100))
    assert "kv_bytes_max" in refused(bench, a, Put("k3", b"v" * 100))
    transact(bench, a, Delete("k0"), Put("k3", b"v" * 100))
    bench.service.limits = type(bench.service.limits)(kv_bytes_max=10)
    transact(bench, a, Put("k3", b""))  # Less than before is always allowed.


def test_reading_pages_through_a_prefix_in_order(bench: Bench) -> None:
    """A reply has to fit into a message."""
    a = bench.client()
    for key in ("b2", "a1", "b1", "c1"):
        transact(bench, a, Put(key, b"v" * 50))
    read = bench.service.keys.read
    page = read("b", exact=False, after="", bytes_max=1)
    assert ([item.key for item in page.items], page.more) == (["b1"], True)
    page = read("b", exact=False, after="b1", bytes_max=BIG)
    assert ([item.key for item in page.items], page.more) == (["b2"], False)
    assert [item.key for item in read("b1", exact=True, after="", bytes_max=BIG).items] == ["b1"]
    assert read("b", exact=True, after="", bytes_max=BIG).items == []
    transact(bench, a, Delete("b1"))
    assert [item.key for item in read("", exact=False, after="", bytes_max=BIG).items] == ["a1", "b2", "c1"]


def test_who_watches_gets_each_change_once_and_learns_when_some_are_gone(bench: Bench) -> None:
    """A gap that is not told is a cache that is wrong for ever."""
    bench.service.limits = type(bench.service.limits)(history_bytes_max=3 * (CHANGE_BYTES + 2))
    a = bench.client()
    for number in range(4):
        transact(bench, a, Put(f"k{number}", b""))
    with pytest.raises(Compacted) as caught:
        changes(bench, 1)
    assert caught.value.fields["compacted"] == 1
    assert changes(bench, 2) == ([KeyChange(n + 1, f"k{n}", b"") for n in (1, 2, 3)], 5)
    assert changes(bench, 2, "k2") == ([KeyChange(3, "k2", b"")], 5)
    assert changes(bench, 5) == ([], 5)
    assert changes(bench, 9) == ([], 9)
    assert changes(bench, 2, bytes_max=1) == ([KeyChange(2, "k1", b"")], 3)


def test_a_page_of_changes_never_ends_within_a_revision(bench: Bench) -> None:
    """Who goes on from the next revision would miss the other half."""
    a = bench.client()
    transact(bench, a, Put("x", b""), Put("y", b""))
    transact(bench, a, Put("z", b""))
    found, after = changes(bench, 1, bytes_max=1)
    assert [change.key for change in found] == ["x", "y"]
    assert after == 2


STEPS = st.one_of(
    st.builds(Put, st.sampled_from("abc"), st.binary(max_size=3), st.booleans()),
    st.builds(Delete, st.sampled_from("abc")),
    st.builds(Get, st.sampled_from("abc")),
)
REQUESTS = st.tuples(
    st.integers(0, 1),
    st.lists(st.builds(Compare, st.sampled_from("abc"), modified=st.none() | st.integers(0, 4)), max_size=2),
    st.lists(STEPS, max_size=3),
    st.lists(STEPS, max_size=1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(REQUESTS, st.just(None)), max_size=12))
def test_it_behaves_as_a_plain_dict_and_its_changes_replay_to_it(requests: list[object]) -> None:
    """Against a model: values and revisions of a dict. Who applies all changes has the same keys."""
    bench = Bench()
    clients = [bench.client("a"), bench.client("b")]
    model: dict[str, tuple[bytes, int, ClientId]] = {}
    revision = 0
    for request in requests:
        before = dict(model)
        if request is None:
            bench.end(clients[0])
            model = {key: entry for key, entry in model.items() if entry[2] != clients[0]}
            revision += model != before
            clients[0] = bench.client(f"a{clients[0]}")
            continue
        who, compares, then, otherwise = request  # type: ignore[misc]
        succeeded = all(c.modified in (None, model.get(c.key, (b"", 0, 0))[1]) for c in compares)
        for step in then if succeeded else otherwise:
            if isinstance(step, Put):
                model[step.key] = (step.value, revision + 1, clients[who] if step.ephemeral else ClientId(0))
            elif isinstance(step, Delete):
                model.pop(step.key, None)
        changed = model != before
        revision += changed
        done = bench.ask(clients[who], Transact(compares, then, otherwise))
        assert isinstance(done, Transacted)
        assert (done.succeeded, done.revision) == (succeeded, revision)
        items = bench.service.keys.items
        assert {key: (item.value, item.modified, item.client) for key, item in items.items()} == model
    replayed: dict[str, bytes] = {}
    for change in changes(bench, 1)[0]:
        if change.value is None:
            del replayed[change.key]
        else:
            replayed[change.key] = change.value
    assert replayed == {key: entry[0] for key, entry in model.items()}
