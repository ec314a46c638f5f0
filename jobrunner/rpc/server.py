"""The one port of a process: `/rpc` for connections, and whatever routes its owner adds.

Every HTTP request, whatever its path, needs the cluster's token; one that a browser could have been made to send (an
Origin, or a Host that is not ours) is refused even with it. Connections live in `connections` until they are closed.
"""

import asyncio
import hmac
import logging
import socket as sockets
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from aiohttp import WSMsgType, web

from jobrunner.clock import Clock
from jobrunner.errors import SpecError
from jobrunner.rpc.connection import Connection, Handler, Peer, transport_of
from jobrunner.rpc.messages import PROTOCOL, ROLES, Hello, Role, Turned, Welcome
from jobrunner.spec.settings import Settings

logger = logging.getLogger(__name__)

HttpHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_CLOSE_S = 0.1  # Wait for a refused peer's half of the closing handshake.
_BACKLOG = 1024  # Hundreds of workers may dial a restarted master at once.
_HEX = frozenset("0123456789abcdef")


class RpcServer:
    """Serves one handler. `admit` may turn a well-formed caller away by the text it returns (say, a removed member)."""

    def __init__(
        self,
        *,
        cluster_id: str,
        cluster_token: str,
        settings: Settings,
        handler: Handler,
        role: Role = "master",
        identity: str = "",
        name: str = "",
        host_names: Iterable[str] = (),
        admit: Callable[[Hello], str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.connections: set[Connection] = set()
        self.address = ""
        self._welcome = Welcome(PROTOCOL, cluster_id, role, identity, name)
        self._authorization = f"Bearer {cluster_token}".encode()
        self._settings = settings
        self._handler = handler
        self._host_names = {*_LOOPBACK, settings.cluster.host, *host_names}
        self._admit = admit
        self._clock = clock
        self._app = web.Application(middlewares=[self._guard])
        self._app.router.add_get("/rpc", self._rpc)
        self._runner: web.AppRunner | None = None

    def add_get(self, path: str, handler: HttpHandler) -> None:
        """Serve GET (and HEAD) at an aiohttp path pattern. Before `start`."""
        self._app.router.add_get(path, handler)

    def add_post(self, path: str, handler: HttpHandler) -> None:
        """Serve POST at an aiohttp path pattern. Before `start`."""
        self._app.router.add_post(path, handler)

    async def start(self, sock: sockets.socket | None = None, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen on a bound socket, else on (host, port; 0 lets the system choose). Returns "host:port".

        Raises SpecError if the address is in use or not of this machine.
        """
        self._runner = web.AppRunner(self._app, access_log=None, handle_signals=False, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        if sock is None:
            sock = bind(host, port)
        await web.SockSite(self._runner, sock, backlog=_BACKLOG).start()
        bound, port = sock.getsockname()[:2]
        self._host_names.add(bound)
        self.address = join_address(bound, port)
        return self.address

    async def stop(self) -> None:
        """Stop listening, write out what is queued (a moment at most), end all connections."""
        if self._runner is None:
            return
        for site in list(self._runner.sites):
            await site.stop()
        await asyncio.gather(*(connection.close() for connection in list(self.connections)))
        await self._runner.cleanup()
        self._runner = None

    # --- HTTP ---

    @web.middleware
    async def _guard(self, request: web.Request, handler: HttpHandler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            return web.Response(status=401)
        if "Origin" in request.headers:
            return web.Response(status=403, text="requests of web pages are refused (Origin)\n")
        if split_address(request.headers.get("Host", ""))[0] not in self._host_names:
            return web.Response(status=403, text="that is not my name (Host)\n")
        return await handler(request)

    # --- /rpc ---

    async def _rpc(self, request: web.Request) -> web.StreamResponse:
        limits = self._settings.limits
        wire = web.WebSocketResponse(
            compress=False,
            autoping=False,  # A pong would be written by the reader.
            autoclose=False,
            timeout=_CLOSE_S,
            max_msg_size=limits.frame_bytes_max + 1,  # aiohttp refuses from this size on, by the frame's header.
        )
        await wire.prepare(request)
        try:
            async with asyncio.timeout(limits.call_timeout_ms / 1000):
                peer = await self._handshake(wire, _peer_address(request))
        except TimeoutError:
            peer = None
        if peer is None:
            if transport := transport_of(wire):
                transport.close()
            return wire
        connection = Connection(wire, peer, handler=self._handler, settings=self._settings, clock=self._clock)
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
        return wire

    async def _handshake(self, wire: web.WebSocketResponse, address: str) -> Peer | None:
        message = await wire.receive()
        if message.type is not WSMsgType.BINARY:
            return None
        try:
            hello = msgspec.msgpack.decode(message.data, type=Hello)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            logger.warning("%s sent no handshake: %s", address, error)
            return None
        if reason := self._objection(hello):
            logger.warning("%s (%s) at %s turned away: %s", hello.name or hello.role, hello.identity, address, reason)
            await wire.send_bytes(msgspec.msgpack.encode(Turned(reason)))
            await wire.close()
            return None
        await wire.send_bytes(msgspec.msgpack.encode(self._welcome))
        return Peer(hello.role, hello.identity, hello.name, address)

    def _objection(self, hello: Hello) -> str:
        """Why this caller is not let in; "" if it is."""
        own = self._welcome
        if hello.protocol != own.protocol:
            return f"protocol {own.protocol} is spoken here, you speak {hello.protocol}"
        # A client that was given only addresses and the token proves by the token that it belongs here.
        if hello.cluster_id != own.cluster_id and (hello.cluster_id or hello.role != "client"):
            return f"this is cluster {own.cluster_id}, you belong to {hello.cluster_id or 'none'}"
        if hello.role not in ROLES:
            return f"no role {hello.role!r} (one of {', '.join(sorted(ROLES))})"
        if hello.role != "client" and not (len(hello.identity) == 32 and _HEX.issuperset(hello.identity)):
            return f"a {hello.role} needs its directory's uuid (32 hex digits), not {hello.identity!r}"
        if hello.expects and hello.expects != own.identity:
            return f"this is {own.identity or 'nobody'}, you expect {hello.expects}"
        return self._admit(hello) if self._admit else ""


def bind(host: str, port: int) -> sockets.socket:
    """A TCP socket bound to (host, port), not yet listening. Raises SpecError."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    sock = sockets.socket(family, sockets.SOCK_STREAM)
    try:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise SpecError(f"cannot listen on {join_address(host, port)}: {error}", address=host, port=port) from None
    return sock


def join_address(host: str, port: int) -> str:
    """ "host:port", an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port"; port 0 if there is none."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    return host.lower(), int(port) if port.isdecimal() else 0


def _peer_address(request: web.Request) -> str:
    name = request.transport.get_extra_info("peername") if request.transport else None
    return join_address(name[0], name[1]) if name else "?"
