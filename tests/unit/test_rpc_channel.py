"""The channel: ids, deadlines, limits and frames, without a socket."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.errors import JobrunnerError, NotLeader, OutputBusy, SpecError, Unavailable
from jobrunner.rpc.channel import BadFrame, Channel, Deadlines, raised_there
from jobrunner.rpc.messages import Failure, Push, Reply, Request

FRAME = 65_536


class Word(msgspec.Struct, frozen=True, tag=True):
    text: str
    data: bytes = b""


def channel(**changes: Any) -> Channel:
    return Channel(**({"frame_bytes_max": FRAME, "queue_bytes_max": 4 * FRAME, "calls_max": 16} | changes))


def carry(sender: Channel, receiver: Channel, now: float = 0.0) -> list[Any]:
    """Move all that waits from one end to the other."""
    envelopes: list[Any] = []
    while frame := sender.take():
        envelopes += receiver.receive(frame, now=now)
    return envelopes


def test_a_call_travels_and_its_reply_comes_back() -> None:
    """The basic exchange; without it nothing else means anything."""
    here, there = channel(), channel()
    call = here.call(Word("ping"), now=0, timeout_s=1)
    (request,) = carry(here, there)
    assert isinstance(request, Request) and request.deadline_ms == 1000
    assert msgspec.msgpack.decode(request.body, type=Word) == Word("ping")
    assert there.answer(request.id, Word("pong"))
    (reply,) = carry(there, here)
    assert isinstance(reply, Reply) and reply.id == call
    assert here.close() == {} and there.close() == {}


def test_an_error_arrives_as_the_same_class_with_its_fields() -> None:
    """A caller catches `NotLeader` and reads `leader`; as plain text it could only give up."""
    here, there = channel(), channel()
    here.call(Word("x"), now=0, timeout_s=1)
    (request,) = carry(here, there)
    there.fail(request.id, NotLeader("ask another", leader="127.0.0.1:7"))
    (failure,) = carry(there, here)
    error = raised_there(failure)
    assert type(error) is NotLeader and error.leader == "127.0.0.1:7" and str(error) == "ask another"


def test_an_error_whose_fields_cannot_travel_goes_without_them() -> None:
    """Else the answer is never sent, and the caller waits for its whole deadline."""
    loop: list[Any] = []
    loop.append(loop)
    for error in (
        OutputBusy("busy", url=1 << 70),
        OutputBusy("busy", url=loop),
        OutputBusy("lone \udc80", url="x"),
        OutputBusy("b" * 3 * FRAME, url="x"),
    ):
        here, there = channel(), channel()
        here.call(Word("x"), now=0, timeout_s=1)
        (request,) = carry(here, there)
        assert there.fail(request.id, error)
        (failure,) = carry(there, here)
        assert failure.kind == "OutputBusy" and failure.fields == {}


def test_fields_of_a_failure_that_would_break_an_error_are_left_out() -> None:
    """A field named `message` or `__class__` would raise in the reader, or change what the error is."""
    fields = {"message": 1, "self": 2, "__class__": 3, "exit_status": 4, "not a name": 5, "job": "j"}
    error = raised_there(Failure(1, "JobrunnerError", "text", fields))
    assert type(error) is JobrunnerError and error.fields == {"job": "j"} and str(error) == "text"


def test_an_unknown_error_class_reads_as_unavailable() -> None:
    """A newer peer may raise what this version does not know; asking again is the safe reading."""
    assert type(raised_there(Failure(1, "FromTheFuture", "text", {}))) is Unavailable


def test_a_burst_shares_one_frame() -> None:
    """A frame each would cost a write and a wake-up each: half the throughput."""
    here, there = channel(), channel()
    for number in range(40):
        assert here.push(Word(str(number)))
    frame = here.take()
    assert frame is not None and here.take() is None and here.queue_bytes == 0
    bodies = [msgspec.msgpack.decode(each.body, type=Word) for each in there.receive(frame, now=0)]  # type: ignore[union-attr]
    assert bodies == [Word(str(number)) for number in range(40)]


def test_a_message_that_fits_no_frame_is_refused_here() -> None:
    """The receiver would drop the connection, and with it everybody else's calls."""
    here = channel()
    for send in (here.push, lambda message: here.call(message, now=0, timeout_s=1)):
        with pytest.raises(SpecError, match="does not fit a frame"):
            send(Word("x", bytes(FRAME)))
    assert here.take() is None and here.close() == {}


def test_the_largest_message_that_is_accepted_fits_a_frame() -> None:
    """An off-by-one between the sender's check and the receiver's would cut connections on rare sizes only."""
    here, there = channel(), channel()
    for size in range(FRAME - 80, FRAME):
        try:
            here.push(Word("", bytes(size)))
            here.call(Word("", bytes(size)), now=0, timeout_s=86_400)
        except SpecError:
            break
        (request,) = [each for each in carry(here, there) if isinstance(each, Request)]
        there.answer(request.id, Word("", bytes(size)))
        assert len(carry(there, here)) == 1
    else:
        pytest.fail("no size was refused")


def test_an_oversized_frame_is_refused_before_it_is_decoded() -> None:
    """Decoding first would let a peer choose how much memory we use."""
    with pytest.raises(BadFrame, match="frame_bytes_max"):
        channel().receive(b"\x91" * (FRAME + 1), now=0)


def test_a_full_queue_refuses_pushes_and_calls_and_keeps_what_it_has() -> None:
    """A peer that does not read may cost its bound, not more."""
    here = channel(queue_bytes_max=10_000)
    sent = 0
    while here.push(Word("", bytes(1000))):
        sent += 1
    assert 5 < sent < 10 and here.queue_bytes <= 10_000
    with pytest.raises(Unavailable, match="queue_bytes_max"):
        here.call(Word("", bytes(1000)), now=0, timeout_s=1)
    assert len(carry(here, channel())) == sent
    assert here.push(Word("again")) and here.close() == {}


def test_a_message_larger_than_the_queue_passes_when_it_is_alone() -> None:
    """Limits set against each other would otherwise block that message for ever."""
    here = channel(queue_bytes_max=1000)
    assert here.push(Word("", bytes(5000))) and not here.push(Word("no"))


def test_too_many_open_calls_are_refused_here() -> None:
    """calls_max bounds the memory of callers that never give up."""
    here = channel(calls_max=3)
    for _ in range(3):
        here.call(Word("x"), now=0, timeout_s=1)
    with pytest.raises(Unavailable, match="calls_max"):
        here.call(Word("x"), now=0, timeout_s=1)


def test_requests_over_the_limit_are_answered_unavailable_and_not_handed_over() -> None:
    """calls_max bounds the tasks that one peer can start here."""
    here, there = channel(), channel(calls_max=3)
    calls = [here.call(Word("x"), now=0, timeout_s=1) for _ in range(5)]
    requests = carry(here, there)
    assert [each.id for each in requests] == calls[:3]
    refused = carry(there, here)
    assert [(each.id, each.kind) for each in refused] == [(call, "Unavailable") for call in calls[3:]]
    there.answer(calls[0], Word("done"))
    here.call(Word("x"), now=0, timeout_s=1)
    assert len(carry(here, there)) == 1


def test_a_peer_that_floods_requests_and_reads_nothing_is_a_bad_peer() -> None:
    """The refusals themselves would fill memory."""
    here = channel(calls_max=1, queue_bytes_max=1000)
    body = msgspec.Raw(msgspec.msgpack.encode(Word("x")))
    flood = msgspec.msgpack.encode([Request(number, 10, body) for number in range(1, 100)])
    with pytest.raises(BadFrame, match="without reading"):
        here.receive(flood, now=0)


def test_a_request_id_used_twice_is_a_bad_frame() -> None:
    """The answer to one would be taken for the answer to the other."""
    body = msgspec.Raw(b"\x01")
    frame = msgspec.msgpack.encode([Request(1, 10, body), Request(1, 10, body)])
    with pytest.raises(BadFrame, match="open already"):
        channel().receive(frame, now=0)


def test_an_expired_call_that_was_not_sent_is_never_sent() -> None:
    """It was reported as not carried out; sending it later would make that a lie."""
    here, there = channel(), channel()
    early = here.call(Word("early"), now=0, timeout_s=1)
    late = here.call(Word("late"), now=0, timeout_s=5)
    assert here.expire(0.999) == ({}, []) and here.earliest == 1
    assert here.expire(1.0) == ({early: False}, [])
    assert [each.id for each in carry(here, there)] == [late]
    assert here.expire(9.0) == ({late: True}, [])
    assert there.answer(late, Word("too late"))
    assert carry(there, here) == []


def test_requests_expire_where_they_are_served_too() -> None:
    """Requests of callers that gave up would use up calls_max for ever."""
    here, there = channel(), channel()
    call = here.call(Word("x"), now=0, timeout_s=1)
    carry(here, there, now=100.0)
    assert there.earliest == 101 and there.expire(101) == ({}, [call])
    assert there.answer(call, Word("late")) and there.take() is None


def test_at_the_end_every_open_call_is_told_whether_it_was_sent() -> None:
    """Not sent is safe to repeat by anyone; sent is not known: the two must not be confused."""
    here, there = channel(), channel()
    sent = here.call(Word("a"), now=0, timeout_s=1)
    carry(here, there)
    unsent = here.call(Word("b"), now=0, timeout_s=1)
    assert here.close() == {sent: True, unsent: False}
    assert here.take() is None and here.close() == {}


def test_a_forgotten_call_is_not_sent_and_its_reply_is_dropped() -> None:
    """A cancelled caller must not leave work behind that nobody waits for."""
    here, there = channel(), channel()
    assert here.forget(here.call(Word("x"), now=0, timeout_s=1)) is False
    assert here.take() is None
    call = here.call(Word("y"), now=0, timeout_s=1)
    carry(here, there)
    assert here.forget(call) is True
    there.answer(call, Word("z"))
    assert carry(there, here) == []


def test_deadlines_stay_small_when_most_are_removed() -> None:
    """At 60,000 calls a second with deadlines of 10 s a heap without this holds 600,000 dead entries."""
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(number, number + 10.0)
        if number >= 5:
            assert deadlines.remove(number)
    assert len(deadlines._heap) < 200
    assert deadlines.first() == 10.0 and deadlines.passed(12.0) == [0, 1, 2] and not deadlines.remove(0)


NOT_FRAMES = (
    b"",
    b"\xc1",
    b"\x90\x90",
    b"\x01",
    b"\x91" * 5000,
    b"\xdd\xff\xff\xff\xff",
    b"\x91\x94\x00\x00\x0a\x01",  # Request id 0.
    b"\x91\x94\x00\x01\xff\x01",  # Negative deadline.
    b"\x91\x92\x09\x01",  # Unknown tag.
    b"\x91\x93\x03\x01\x01",  # A push with a field too many.
    b"\x91\x93\x01\xa1\xff\x01",  # Not UTF-8.
    b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
)


@pytest.mark.parametrize("frame", NOT_FRAMES, ids=range(len(NOT_FRAMES)))
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    """Anything but BadFrame would end the reader with a traceback, or worse."""
    with pytest.raises(BadFrame):
        channel().receive(frame, now=0)


@given(st.binary(max_size=300))
def test_random_bytes_are_a_frame_or_a_bad_frame(frame: bytes) -> None:
    """No input of a peer may raise anything else."""
    try:
        envelopes = channel().receive(frame, now=0)
    except BadFrame:
        return
    assert all(isinstance(each, Request | Push) for each in envelopes)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("call", "push", "carry", "back", "answer", "fail", "forget", "tick")), st.integers(0, 9)
    ),
    max_size=60,
)


@given(STEPS)
def test_every_call_has_exactly_one_end(steps: list[tuple[str, int]]) -> None:
    """Calls, losses of interest, expiry and answers in any order: none ends twice, none is forgotten."""
    here, there = channel(calls_max=4, queue_bytes_max=600), channel(calls_max=3, queue_bytes_max=600)
    now = 0.0
    open_, ended, served, seen = set[int](), list[int](), list[int](), list[int]()
    for what, number in steps:
        if what == "call":
            try:
                open_.add(here.call(Word("x", bytes(number * 20)), now=now, timeout_s=1 + number))
            except Unavailable:
                pass
        elif what == "push":
            here.push(Word("p", bytes(number * 20)))
        elif what == "carry":
            arrived = [each.id for each in carry(here, there, now) if isinstance(each, Request)]
            served += arrived
            seen += arrived
        elif what == "back":
            ended += [each.id for each in carry(there, here, now)]
        elif what in ("answer", "fail") and served:
            request = served.pop(number % len(served))
            there.answer(request, Word("r")) if what == "answer" else there.fail(request, Unavailable("no"))
        elif what == "forget" and open_ - set(ended):
            ended.append(call := min(open_ - set(ended)))
            here.forget(call)
        elif what == "tick":
            now += number / 3
            expired = here.expire(now)
            ended += expired.calls
            assert all(sent for call, sent in expired.calls.items() if call in seen)
            there.expire(now)
        assert here.queue_bytes <= 600 and there.queue_bytes <= 600
    ended += here.close()
    assert sorted(ended) == sorted(open_)
    assert len(seen) == len(set(seen))
