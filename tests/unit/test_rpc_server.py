"""The one port against everybody: handshakes refused, hostile frames, HTTP beside /rpc. Real sockets on loopback."""

import asyncio
import os
import pickle
import resource
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from rpc_fakes import CLUSTER, MEMBER, SETTINGS, TOKEN, Ask, Recorder, dial, outcome, run, serving, until

from jobrunner.errors import Denied, Refused, SpecError, Unavailable
from jobrunner.rpc.client import fetch, new_session
from jobrunner.rpc.messages import PROTOCOL, Hello, Push, Request, Turned, Welcome
from jobrunner.rpc.server import RpcServer, bind, join_address, split_address

GOOD = {"Authorization": f"Bearer {TOKEN}"}


async def status_of(address: str, headers: dict[str, str], path: str = "/rpc") -> tuple[int, str]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{address}{path}", headers=headers) as response:
            return response.status, await response.text()


async def raw_link(session: aiohttp.ClientSession, address: str, hello: Hello | bytes | None) -> Any:
    wire = await session.ws_connect(f"http://{address}/rpc", headers=GOOD, compress=0, max_msg_size=0)
    if hello is not None:
        await wire.send_bytes(hello if isinstance(hello, bytes) else msgspec.msgpack.encode(hello))
    return wire


def client_hello(**changes: Any) -> Hello:
    given = {"protocol": PROTOCOL, "cluster_id": CLUSTER, "role": "client", "identity": "", "name": "c"}
    return Hello(**(given | changes))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_caller_with_the_right_words_is_let_in(loop: str) -> None:
    """The way in; on both loops, because uvloop is not everywhere."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler, name="master-0") as server:
            connection = await dial(server.address, role="worker", identity="b" * 32, name="worker-1")
            assert (connection.role, connection.identity, connection.name) == ("master", MEMBER, "master-0")
            reply = await connection.call(Ask("hello"), 5)
            assert reply.text == "HELLO"  # type: ignore[attr-defined]
            (peer,) = handler.opened
            assert (peer.role, peer.identity, peer.name) == ("worker", "b" * 32, "worker-1")
            await connection.close()
            await until(lambda: handler.closed == [peer] and not server.connections)

    run(main, loop=loop)


def test_every_path_wants_the_token_and_says_nothing_else() -> None:
    """A port on loopback is open to every user of the machine."""

    async def main() -> None:
        server = RpcServer(cluster_id=CLUSTER, cluster_token=TOKEN, settings=SETTINGS, handler=Recorder())

        async def blob(request: web.Request) -> web.Response:
            return web.Response(body=b"secret")

        server.add_get("/blobs/{hash}", blob)
        address = await server.start()
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer \xff"},
        ):
            for path in ("/rpc", "/blobs/x", "/nothing"):
                assert await status_of(address, headers, path) == (401, "")
        assert await status_of(address, GOOD, "/blobs/x") == (200, "secret")
        assert (await status_of(address, GOOD, "/nothing"))[0] == 404
        assert isinstance(await outcome(dial(address, cluster_token="wrong")), Denied)
        await server.stop()

    run(main)


def test_what_a_browser_could_be_made_to_send_is_refused() -> None:
    """A web page can reach loopback ports: by Origin it is known, by a foreign Host name its DNS trick."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler, host_names=["master.example"]) as server:
            address = server.address
            port = address.rpartition(":")[2]
            assert (await status_of(address, GOOD | {"Origin": f"http://{address}"}))[0] == 403
            for host in ("evil.example", f"evil.example:{port}", "[::2]", "127.0.0.1.evil.example"):
                assert (await status_of(address, GOOD | {"Host": host}))[0] == 403, host
            for host in ("localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "master.example", address):
                assert (await status_of(address, GOOD | {"Host": host}))[0] == 400, host  # No WebSocket, but let in.
            assert not handler.opened

    run(main)


def test_a_client_that_knows_only_addresses_and_token_is_let_in() -> None:
    """`--cluster ADDR --token-file FILE` names no cluster id; the token proves that the client belongs here."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server, aiohttp.ClientSession() as session:
            wire = await raw_link(session, server.address, client_hello(cluster_id=""))
            msgspec.msgpack.decode((await wire.receive()).data, type=Welcome)
            await wire.close()

    run(main)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": PROTOCOL + 1}, "protocol"),
        ({"cluster_id": "d" * 32}, "cluster"),
        ({"cluster_id": "", "role": "worker", "identity": "a" * 32}, "cluster"),
        ({"role": "king"}, "role"),
        ({"role": "master", "identity": ""}, "uuid"),
        ({"role": "worker", "identity": "../etc"}, "uuid"),
        ({"expects": "e" * 32}, "expect"),
        ({"name": "removed"}, "not a member"),
    ],
)
def test_a_wrong_handshake_is_turned_away_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    """A daemon of another cluster, version or directory must stop by itself, not be half connected."""

    async def main() -> None:
        handler = Recorder()

        def admit(hello: Hello) -> str:
            return "not a member" if hello.name == "removed" else ""

        async with serving(handler, admit=admit) as server, aiohttp.ClientSession() as session:
            wire = await raw_link(session, server.address, client_hello(**changes))
            answer = msgspec.msgpack.decode((await wire.receive()).data, type=Turned)
            assert reason in answer.reason
            assert (await wire.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            assert not handler.opened and not server.connections

    run(main)


def test_the_caller_sees_denied_for_a_wrong_cluster_identity_or_name() -> None:
    """Denied ends a daemon with its reason; Unavailable would make it try for ever."""

    async def main() -> None:
        async with serving(Recorder()) as server:
            for options in ({"cluster_id": "d" * 32}, {"expects": "e" * 32}, {"role": "worker", "identity": "x"}):
                assert isinstance(await outcome(dial(server.address, **options)), Denied)
        assert isinstance(await outcome(dial(server.address)), Unavailable)

    run(main)


def test_a_hello_with_fields_of_the_future_gets_a_clear_answer() -> None:
    """An upgrade in progress must say `protocol`, not look like a broken network."""

    async def main() -> None:
        async with serving(Recorder()) as server, aiohttp.ClientSession() as session:
            fields = msgspec.to_builtins(client_hello(protocol=PROTOCOL + 1)) | {"type": "hello", "moon": "full"}
            wire = await raw_link(session, server.address, msgspec.msgpack.encode(fields))
            assert "protocol" in msgspec.msgpack.decode((await wire.receive()).data, type=Turned).reason

    run(main)


def test_who_says_nothing_is_dropped() -> None:
    """Silent connections would be kept for ever, one file descriptor each."""

    async def main() -> None:
        settings = msgspec.structs.replace(
            SETTINGS, limits=msgspec.structs.replace(SETTINGS.limits, call_timeout_ms=100)
        )
        async with serving(Recorder(), settings=settings) as server, aiohttp.ClientSession() as session:
            wire = await raw_link(session, server.address, None)
            message = await wire.receive(timeout=5)
            assert message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)

    run(main)


_WORD = msgspec.msgpack.encode(Ask("x"))
_UNKNOWN = msgspec.msgpack.encode({"type": "Launch", "missiles": 3})

HOSTILE = {
    "random bytes": os.urandom(200),
    "empty": b"",
    "pickle": pickle.dumps({"__reduce__": os.system}),
    "envelope of unknown kind": b"\x91\x92\x63\x01",
    "unknown message": msgspec.msgpack.encode([Push(msgspec.Raw(_UNKNOWN))]),
    "unknown request": msgspec.msgpack.encode([Request(1, 1000, msgspec.Raw(_UNKNOWN))]),
    "pickle in a push": msgspec.msgpack.encode([[3, pickle.dumps(os.system)]]),
    "nested a million deep": b"\x91\x92\x03" + b"\x91" * 60_000 + b"\x01",
    "a list of four billion": b"\x91\x92\x03\xdd\xff\xff\xff\xff",
    "oversized": bytes(65_537),
    "far too large": bytes(20_000_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_frame_ends_its_connection_and_nothing_else(what: str) -> None:
    """One broken or malicious peer must cost one connection: not the process, not the others, not memory."""

    async def main() -> None:
        handler = Recorder()
        async with serving(handler) as server, aiohttp.ClientSession() as session:
            other = await dial(server.address)
            wire = await raw_link(session, server.address, client_hello())
            await wire.receive()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                await wire.send_bytes(HOSTILE[what])
                while (await wire.receive(timeout=5)).type is aiohttp.WSMsgType.BINARY:
                    pass
            except (aiohttp.ClientError, OSError):
                pass  # Dropped while still sending.
            await until(lambda: len(server.connections) == 1)
            assert (await other.call(Ask("still here"), 5)).text == "STILL HERE"  # type: ignore[attr-defined]
            assert handler.asked == ["still here"] and not handler.pushed
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown_kib < 65_536 + len(HOSTILE[what]) // 256  # The test's own copies of it, masked and not.
            await other.close()

    run(main)


def test_a_text_frame_and_a_ping_end_the_connection() -> None:
    """rpc sends neither; answering pings would make the reader write."""

    async def main() -> None:
        async with serving(Recorder()) as server, aiohttp.ClientSession() as session:
            for send in ("text", "ping"):
                wire = await raw_link(session, server.address, client_hello())
                await wire.receive()
                await (wire.send_str("hello") if send == "text" else wire.ping())
                assert (await wire.receive(timeout=5)).type is not aiohttp.WSMsgType.BINARY
            await until(lambda: not server.connections)

    run(main)


def test_fetch_returns_bodies_and_tells_refusals_from_trouble() -> None:
    """Trouble is tried at the next master; a blob that is not there, or too large, is not."""

    async def main() -> None:
        async def blob(request: web.Request) -> web.StreamResponse:
            name = request.match_info["hash"]
            if name == "missing":
                raise web.HTTPNotFound
            if name == "broken":
                raise web.HTTPServiceUnavailable
            if name == "slow":
                await asyncio.sleep(20)
            return web.Response(body=b"x" * 100_000)

        server = RpcServer(cluster_id=CLUSTER, cluster_token=TOKEN, settings=SETTINGS, handler=Recorder())
        server.add_get("/blobs/{hash}", blob)
        address = await server.start()
        session, stranger = new_session(TOKEN), new_session("wrong")
        assert await fetch(session, address, "/blobs/x", bytes_max=100_000, timeout_s=5) == b"x" * 100_000
        for name, kind in (("missing", Refused), ("broken", Unavailable)):
            error = await outcome(fetch(session, address, f"/blobs/{name}", bytes_max=10, timeout_s=5))
            assert type(error) is kind
        assert "larger" in str(await outcome(fetch(session, address, "/blobs/x", bytes_max=99_999, timeout_s=5)))
        assert "longer" in str(await outcome(fetch(session, address, "/blobs/slow", bytes_max=9, timeout_s=0.05)))
        assert isinstance(await outcome(fetch(stranger, address, "/blobs/x", bytes_max=9, timeout_s=5)), Denied)
        await server.stop()
        assert type(await outcome(fetch(session, address, "/blobs/x", bytes_max=9, timeout_s=5))) is Unavailable
        await session.close()
        await stranger.close()

    run(main)


def test_a_port_in_use_is_the_users_error_by_name() -> None:
    """Exit status 2 with the address, instead of a traceback."""
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(SpecError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)


def test_addresses_are_written_and_read_alike() -> None:
    """An IPv6 host without brackets would lose its last group as the port."""
    for host, port in (("127.0.0.1", 80), ("::1", 8080), ("master-1.example", 7000)):
        assert split_address(join_address(host, port)) == (host, port)
    assert split_address("[::1]") == ("::1", 0) and split_address("h:x") == ("h", 0) and split_address("") == ("", 0)


def test_a_server_started_on_a_bound_socket_serves_there() -> None:
    """Ports are chosen before the processes exist; binding again would race with everybody."""

    async def main() -> None:
        sock = bind("127.0.0.1", 0)
        server = RpcServer(cluster_id=CLUSTER, cluster_token=TOKEN, settings=SETTINGS, handler=Recorder())
        address = await server.start(sock)
        assert address == f"127.0.0.1:{sock.getsockname()[1]}"
        connection = await dial(address)
        await server.stop()
        await connection.closed.wait()

    run(main)
