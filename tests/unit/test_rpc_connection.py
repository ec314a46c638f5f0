"""Connections over real sockets: calls and their ends, pushes, slow readers, dead peers."""

import asyncio
import time
from typing import Any

import aiohttp
import msgspec
import pytest
from rpc_fakes import (
    CLUSTER,
    SETTINGS,
    TOKEN,
    Answer,
    Ask,
    Recorder,
    decode,
    dial,
    outcome,
    run,
    serving,
    until,
)

from jobrunner.errors import NotLeader, SpecError, Unavailable, Unknown
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.dialing import new_session
from jobrunner.rpc.messages import PROTOCOL, Hello

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


def texts(replies: list[Any]) -> list[str]:
    return [reply.text for reply in replies]


@LOOPS
def test_requests_of_one_connection_run_beside_each_other(loop: str) -> None:
    """One long wait (a client waiting for its job) would hold up every other call of that client."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            waiting = asyncio.ensure_future(connection.call(Ask("wait"), 10))
            replies = await asyncio.gather(*(connection.call(Ask(f"a{n}"), 10) for n in range(50)))
            assert texts(replies) == [f"A{n}" for n in range(50)] and not waiting.done()
            handler.gate.set()
            assert (await waiting).text == "WAIT"  # type: ignore[attr-defined]
            await connection.close()

    run(main, loop=loop)


@LOOPS
def test_pushes_arrive_in_order_from_both_ends(loop: str) -> None:
    """Raft and instructions rely on order within a connection; a frame at once must not overtake queued ones."""

    async def main() -> None:
        handler, got = Recorder(), list[msgspec.Struct]()
        async with serving(handler) as server:
            connection = await dial(server.address, on_push=lambda peer, message: got.append(message))
            for number in range(300):
                assert connection.push(Ask(str(number), bytes(number * 7)))
                if number % 50 == 49:
                    await asyncio.sleep(0)
            await until(lambda: len(handler.pushed) == 300)
            assert [message.text for _, message in handler.pushed] == [str(n) for n in range(300)]  # type: ignore[attr-defined]
            for number in range(300):
                assert handler.opened[0].push(msgspec.msgpack.encode(Ask(str(number), bytes(number))))
            await until(lambda: len(got) == 300)
            assert got == [Ask(str(n), bytes(n)) for n in range(300)]
            await connection.close()

    run(main, loop=loop)


def test_a_call_that_is_not_answered_in_time_is_unknown_and_is_cancelled_there() -> None:
    """The caller must not hear "not done" of what may be done, and the server must not keep the task for ever."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            error = await outcome(connection.call(Ask("wait"), 0.05))
            assert type(error) is Unknown and "in time" in str(error)
            await until(lambda: handler.cancelled == ["wait"])
            assert (await connection.call(Ask("next"), 5)).text == "NEXT"  # type: ignore[attr-defined]
            await connection.close()

    run(main)


def test_a_lost_connection_makes_sent_calls_unknown_and_later_ones_unavailable() -> None:
    """What was never sent may be sent again by anybody; what was sent only under the same id."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            sent = asyncio.ensure_future(outcome(connection.call(Ask("wait"), 10)))
            await until(lambda: handler.asked == ["wait"])
            unsent = asyncio.ensure_future(outcome(connection.call(Ask("never sent"), 10)))
            queued = asyncio.ensure_future(outcome(connection.call(Ask("queued", bytes(60_000)), 10)))
            await asyncio.sleep(0)  # Both have asked: the small one at once, the large one waits for the writer.
            connection.abort()
            assert type(await sent) is Unknown
            assert type(await queued) is Unavailable
            assert type(await unsent) is Unknown
            assert type(await outcome(connection.call(Ask("late"), 10))) is Unavailable
            assert not connection.push(Ask("late"))
            await until(lambda: handler.cancelled == ["wait"] and handler.closed == handler.opened)
            assert "late" not in handler.asked

    run(main)


def test_errors_of_the_handler_reach_the_caller_as_they_were_raised() -> None:
    """A bug in one handler is one failed request: logged there, Unavailable here, and the connection lives."""

    async def main() -> None:
        class Refusing(Recorder):
            async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
                if message == Ask("who leads?"):
                    raise NotLeader("not me", leader="127.0.0.1:9")
                return await super().on_request(peer, message)

        async with serving(Refusing()) as server:
            connection = await dial(server.address)
            error = await outcome(connection.call(Ask("who leads?"), 5))
            assert type(error) is NotLeader and error.leader == "127.0.0.1:9"
            error = await outcome(connection.call(Ask("bug"), 5))
            assert type(error) is Unavailable and "ZeroDivision" not in str(error)
            error = await outcome(connection.call(Ask("large"), 5))
            assert type(error) is SpecError and "does not fit a frame" in str(error)
            assert (await connection.call(Ask("fine"), 5)).text == "FINE"  # type: ignore[attr-defined]
            await connection.close()

    run(main)


def test_a_message_too_long_for_a_frame_fails_alone() -> None:
    """The sender checks: the receiver could only drop the connection."""

    async def main() -> None:
        async with serving(Recorder()) as server:
            connection = await dial(server.address)
            assert type(await outcome(connection.call(Ask("x", bytes(70_000)), 5))) is SpecError
            with pytest.raises(SpecError):
                connection.push(Ask("x", bytes(70_000)))
            assert len((await connection.call(Ask("x", bytes(65_000)), 5)).data) == 65_000  # type: ignore[attr-defined]
            await connection.close()

    run(main)


def test_a_cancelled_caller_leaves_the_connection_in_order() -> None:
    """A reply that nobody waits for must be dropped, not given to the next caller."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            waiting = asyncio.ensure_future(connection.call(Ask("wait"), 10))
            await until(lambda: handler.asked == ["wait"])
            waiting.cancel()
            handler.gate.set()
            for number in range(5):
                assert (await connection.call(Ask(f"n{number}"), 5)).text == f"N{number}"  # type: ignore[attr-defined]
            await connection.close()

    run(main)


def test_calls_beyond_the_limit_are_refused_and_the_rest_is_served() -> None:
    """calls_max (64 here) bounds what one peer may have running."""

    async def main() -> None:
        handler = Recorder()
        roomy = msgspec.structs.replace(SETTINGS, limits=msgspec.structs.replace(SETTINGS.limits, calls_max=200))
        async with serving(handler) as server:
            connection = await dial(server.address, settings=roomy)
            calls = [asyncio.ensure_future(connection.call(Ask("wait"), 10)) for _ in range(100)]
            await until(lambda: len(handler.asked) == 64 and sum(call.done() for call in calls) == 36)
            assert all(type(call.exception()) is Unavailable for call in calls if call.done())
            handler.gate.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(each, Answer) for each in results) == 64
            await connection.close()

    run(main)


async def deaf_link(address: str) -> tuple[aiohttp.ClientSession, Any]:
    """A connection whose other end never reads after the handshake; keep what is returned, or it is collected."""
    session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
    wire = await session.ws_connect(f"http://{address}/rpc", compress=0)
    await wire.send_bytes(msgspec.msgpack.encode(Hello(PROTOCOL, CLUSTER, "client", "", "deaf")))
    await wire.receive()
    transport = wire._writer.transport  # type: ignore[union-attr]
    transport.pause_reading()
    return session, wire


@LOOPS
def test_a_peer_that_does_not_read_delays_nobody_else(loop: str) -> None:
    """With one `await send` in a loop over peers, a stopped client would stop the masters' beacons to all."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            session, _wire = await deaf_link(server.address)
            await until(lambda: handler.opened)
            deaf, other = handler.opened[0], await dial(server.address)
            accepted = 0
            while deaf.push(Ask("x", bytes(50_000))):
                accepted += 1
                if accepted % 20 == 0:
                    assert (await other.call(Ask("quick"), 5)).text == "QUICK"  # type: ignore[attr-defined]
                assert accepted < 2_000, "memory is not bounded"
            start = time.monotonic()
            for _ in range(200):
                assert not deaf.push(Ask("x", bytes(50_000)))
            assert time.monotonic() - start < 1, "a refused push must cost nothing"
            assert (await other.call(Ask("quick"), 5)).text == "QUICK"  # type: ignore[attr-defined]
            assert not deaf.closed.is_set()
            deaf.abort()
            await until(lambda: handler.closed == [deaf])
            await other.close()
            await session.close()

    run(main, loop=loop)


def test_a_full_queue_that_does_not_move_for_the_session_ttl_is_a_dead_peer() -> None:
    """A host that vanished keeps its connection for a quarter of an hour; aborting it lets the redial find the new."""

    class Jumping:
        offset = 0.0

        def now(self) -> float:
            return time.monotonic() + self.offset

        def wall(self) -> float:
            return 0.0

    async def main() -> None:
        handler, clock = Recorder(), Jumping()
        async with serving(handler, clock=clock) as server:
            session, _wire = await deaf_link(server.address)
            await until(lambda: handler.opened)
            (deaf,) = handler.opened
            async with asyncio.timeout(10):
                while deaf.push(Ask("x", bytes(50_000))):
                    await asyncio.sleep(0)
            assert not deaf.closed.is_set()
            clock.offset = SETTINGS.session.ttl_ms / 1000 + 1
            assert not deaf.push(Ask("x", bytes(50_000)))
            assert deaf.closed.is_set()
            await session.close()

    run(main)


def test_a_peer_that_asks_and_never_reads_the_replies_is_aborted() -> None:
    """Replies cannot be dropped (the caller waits), so its queue would grow without end."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            session, wire = await deaf_link(server.address)
            await until(lambda: handler.opened)
            body = msgspec.msgpack.encode(Ask("fill"))
            for number in range(1, 2_000):
                if handler.opened[0].closed.is_set():
                    break
                frame = msgspec.msgpack.encode([[0, number, 60_000, msgspec.Raw(body)]])
                try:
                    await wire.send_bytes(frame)
                except (aiohttp.ClientError, OSError):
                    break
                await asyncio.sleep(0)
            await until(lambda: handler.closed == handler.opened)
            assert len(handler.asked) < 500
            await session.close()

    run(main)


def test_abort_ends_the_other_side_at_once() -> None:
    """A closing handshake would wait for a peer that is dead."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            await until(lambda: handler.opened)
            closed = list[Connection]()
            other = await dial(server.address, on_close=closed.append)
            start = time.monotonic()
            connection.abort()
            await until(lambda: handler.closed == handler.opened[:1])
            handler.opened[1].abort()
            await other.closed.wait()
            await until(lambda: closed == [other])
            assert time.monotonic() - start < 2

    run(main)


def test_what_is_queued_before_close_still_arrives() -> None:
    """A server that stops would else lose the replies it has just given, and make them Unknown."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            for number in range(100):
                connection.push(Ask(str(number), bytes(2_000)))
            await connection.close()
            await until(lambda: len(handler.pushed) == 100)

    run(main)


def test_callbacks_that_raise_end_nothing() -> None:
    """A bug in one callback must not take the connection, and its other calls, with it."""

    async def main() -> None:
        class Clumsy(Recorder):
            def on_open(self, peer: Connection) -> None:
                raise KeyError("on_open")

            def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
                super().on_push(peer, message)
                raise KeyError("on_push")

        handler = Clumsy()
        async with serving(handler) as server:
            connection = await dial(server.address)
            connection.push(Ask("x"))
            assert (await connection.call(Ask("fine"), 5)).text == "FINE"  # type: ignore[attr-defined]
            assert len(handler.pushed) == 1
            await connection.close()

    run(main)


def test_a_dialled_connection_takes_no_requests() -> None:
    """A worker or client that would serve masters' calls has no handler to do it; the master must hear so."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server:
            connection = await dial(server.address)
            await until(lambda: handler.opened)
            error = await outcome(handler.opened[0].call(Ask("serve me"), 5))
            assert "take no requests" in str(error) and not connection.closed.is_set()
            await connection.close()

    run(main)


def test_a_reply_that_cannot_be_read_closes_the_connection() -> None:
    """A peer whose words we do not know is no peer; the call is Unknown."""

    async def main() -> None:
        async with serving(Recorder()) as server:

            def strict(body: bytes) -> msgspec.Struct:
                return msgspec.msgpack.decode(body, type=Ask)

            connection = await dial(server.address, decode=strict)
            assert type(await outcome(connection.call(Ask("x"), 5))) is Unknown
            assert connection.closed.is_set()

    run(main)


def test_a_shared_session_survives_its_connections() -> None:
    """Redials use one session: one closed with the first connection would end them all."""

    async def main() -> None:
        async with serving(Recorder()) as server:
            session = new_session(TOKEN)
            for _ in range(3):
                connection = await dial(server.address, session=session, decode=decode)
                await connection.close()
            assert not session.closed
            await session.close()

    run(main)
