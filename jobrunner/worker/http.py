"""What an agent serves on its one port: block files to reducers, logs of attempts to people. It takes no requests over
/rpc: instructions come on the connections that the agent itself opened to the masters.

    POST /blocks      partitions of map outputs, see shuffle.exchange
    GET /logs/JOB/STAGE/17/2?stream=stdout|stderr|traceback&offset=0     up to 1 MiB from there; empty at the end
"""

import asyncio
import re
from pathlib import Path

import msgspec
from aiohttp import web

from jobrunner.errors import Refused
from jobrunner.ids import AttemptId, parse_path
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.server import RpcServer
from jobrunner.shuffle.exchange import PATH
from jobrunner.shuffle.server import blocks_handler
from jobrunner.worker.config import AgentConfig
from jobrunner.worker.logs import STREAMS, read_log

_BYTES_MAX = 1_048_576
_STAGE = re.compile(r"[\w-]+")


class _TakesNothing:
    """The handler of /rpc."""

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        raise Refused("a worker takes no requests")

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        raise Refused("a worker takes no requests")

    def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
        pass

    def on_open(self, peer: Connection) -> None:
        pass

    def on_close(self, peer: Connection) -> None:
        pass


def make_server(config: AgentConfig, *, identity: str, blocks: Path) -> RpcServer:
    """The agent's server, not started."""
    server = RpcServer(
        cluster_id=config.cluster_id,
        cluster_token=config.cluster_token,
        settings=config.settings,
        handler=_TakesNothing(),
        role="worker",
        identity=identity,
        name=f"worker-{config.name}",
        host_names=[config.host],
    )

    async def logs(request: web.Request) -> web.StreamResponse:
        return await _serve_log(request, config.cluster_dir)

    server.add_post(PATH, blocks_handler(blocks))
    server.add_get("/logs/{job}/{stage}/{partition}/{attempt}", logs)
    return server


async def _serve_log(request: web.Request, cluster_dir: str) -> web.StreamResponse:
    found = request.match_info
    stream = request.query.get("stream", "stdout")
    offset = request.query.get("offset", "0")
    try:
        attempt = parse_path("/".join(found[name] for name in ("job", "stage", "partition", "attempt")))
    except ValueError as error:
        return web.Response(status=400, text=f"{error}\n")
    if stream not in STREAMS or not offset.isdecimal() or not _STAGE.fullmatch(found["stage"]):
        return web.Response(status=400, text=f"stream is one of {', '.join(STREAMS)}; offset counts from 0\n")
    assert isinstance(attempt, AttemptId)
    data = await asyncio.to_thread(
        read_log, cluster_dir, attempt, stream=stream, offset=int(offset), bytes_max=_BYTES_MAX
    )
    if data is None:
        return web.Response(status=404)
    return web.Response(body=data, content_type="application/octet-stream")
