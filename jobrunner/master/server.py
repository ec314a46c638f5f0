"""The master process: one Raft member, the state machine on it, and the port that workers and clients speak to.

The only file here that does I/O. While this member leads, a tick compares state and workers and proposes what is
missing: at once after every change, and every TICK_S for what only time brings.
"""

import asyncio
import json
import logging
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import msgspec
from aiohttp import web

from jobrunner.clock import SystemClock
from jobrunner.control.messages import (
    ClusterInfo,
    Instruct,
    LeaderIs,
    MasterInfo,
    MemberInfo,
    StepDone,
    TaskKind,
    message_decoder,
)
from jobrunner.errors import JobrunnerError, NotLeader, Refused
from jobrunner.failpoints import failpoint
from jobrunner.hosts import process_alive, same_pid_space
from jobrunner.ids import Epoch, Hash, MemberId
from jobrunner.locks.limits import limits_of
from jobrunner.locks.sessions import Session
from jobrunner.master import views
from jobrunner.master.commands import (
    LEVEL,
    AnyCommand,
    Assign,
    CommitJob,
    EndAttempts,
    Entry,
    Submit,
    decode_entry,
    encode_entry,
)
from jobrunner.master.leader import GAP_S, Leader, LeaderLimits, Proposal
from jobrunner.master.requests import Requests
from jobrunner.master.snapshot import SnapshotEncoder, decode_state
from jobrunner.master.state import MasterState
from jobrunner.raft.driver import Driver
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.store import Store
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.dialing import fetch, new_session
from jobrunner.rpc.peers import PeerLinks
from jobrunner.rpc.server import RpcServer
from jobrunner.spec.settings import Settings

logger = logging.getLogger(__name__)

TICK_S = 0.05
_PROBES_S = (0.0, 0.02, 0.1, 0.5)  # A killed process may be seen alive for a moment after its sockets are gone.
_MEMBER_S = 0.5


@dataclass(frozen=True, slots=True)
class MasterConfig:
    """`members`: slot and address of every master, this one included."""

    cluster_id: str
    cluster_token: str
    directory: Path
    slot: int
    member: MemberId
    members: dict[MemberId, tuple[int, str]]
    settings: Settings


class RaftFrame(msgspec.Struct, frozen=True):
    """A Raft message as it came from a peer."""

    data: bytes


class _Machine:
    """What the Raft driver calls: the server's methods under the driver's names."""

    def __init__(self, server: "MasterServer") -> None:
        self.apply = server.apply
        self.snapshot = server.snapshot
        self.restore = server.restore
        self.leading = server.leading_from
        self.following = server.following


class MasterServer:
    """Wires driver, state, leader and rpc. Made inside a running loop."""

    def __init__(self, config: MasterConfig, store: Store) -> None:
        self.settings = config.settings
        self.state = MasterState()
        self._snapshots = SnapshotEncoder()
        self.stopped: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._config = config
        self._clock = SystemClock()
        self._loop = asyncio.get_running_loop()
        self._decoder = message_decoder()
        self._requests = Requests(self)
        self._fresh = store.log.last_index == 1
        self._leader: Leader | None = None
        self._leader_address = ""
        self._epoch = 0
        self._awake = False
        self._ticked_at = self._clock.now()
        self._timer: asyncio.TimerHandle | None = None
        self._beacon_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers: dict[str, Connection] = {}  # By directory: the connection that instructions take.
        self._infos: dict[int, MasterInfo] = {}  # What other masters last said of themselves.
        self._links = self._make_links()
        self._server = RpcServer(
            cluster_id=config.cluster_id, cluster_token=config.cluster_token, settings=config.settings, handler=self,
            role="master", identity=config.member, name=f"master-{config.slot}",
        )  # fmt: skip
        self._server.add_get("/blobs/{hash}", self._get_blob)
        self._server.add_get("/member", self._get_member)
        self._http = new_session(config.cluster_token)
        self._driver = Driver(
            store=store, machine=_Machine(self), transport=self._links, settings=raft_settings(config.settings),
            clock=self._clock, rng=random.Random(), on_fatal=self._fatal,
        )  # fmt: skip

    def _make_links(self) -> PeerLinks:
        return PeerLinks(
            member=self._config.member, name=f"master-{self._config.slot}", cluster_id=self._config.cluster_id,
            cluster_token=self._config.cluster_token, settings=self.settings,
            on_unreachable=lambda member: self._driver.report_unreachable(member),  # noqa: PLW0108 - made after the links
            on_lost=lambda member: self._driver.peer_disconnected(member),  # noqa: PLW0108
            on_up=lambda member: self._driver.peer_connected(member),  # noqa: PLW0108
        )  # fmt: skip

    async def start(self, sock: socket | None, host: str, port: int) -> str:
        address = await self._server.start(sock, host, port)
        self._links.set_members({member: address for member, (_, address) in self._config.members.items()})
        # The first master of a fresh group need not wait for an election time-out.
        await self._driver.start(campaign=self._fresh and self._config.slot == 0)
        self._timer = self._loop.call_later(TICK_S, self._on_timer)
        return address

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stop_leading()
        for task in list(self._tasks):
            task.cancel()
        await self._driver.stop()
        await self._links.close()
        await self._server.stop()
        await self._http.close()

    async def hand_over(self) -> None:
        """Before a stop: let another master lead, so that nobody waits for an election. Bounded by its time-out."""
        if self._leader is not None and len(self._config.members) > 1:
            try:
                await self._driver.transfer()
            except JobrunnerError as error:
                logger.info("stops while it leads: %s", error)

    def ask_to_stop(self) -> None:
        """End `serve_master` with status 0."""
        if not self.stopped.done():
            self.stopped.set_result(None)

    def _fatal(self, error: BaseException) -> None:
        if not self.stopped.done():
            self.stopped.set_result(error)

    # --- the log's machine -------------------------------------------------------------------------------------------

    def apply(self, index: int, epoch: int, data: bytes) -> object:
        entry = decode_entry(data)
        result = self.state.apply(entry)
        self._requests.applied()
        if self._leader is not None:
            self._pass_failpoints(entry.command, result)
            self.wake()
        return result

    def snapshot(self) -> bytes:
        return self._snapshots.encode(self.state)

    def restore(self, data: bytes) -> None:
        self.state = decode_state(data)
        self._snapshots = SnapshotEncoder()

    def _pass_failpoints(self, command: AnyCommand, result: object) -> None:
        if isinstance(result, JobrunnerError):
            return
        if isinstance(command, Submit):
            failpoint("master.submit.applied")
        elif isinstance(command, Assign):
            failpoint("master.assign.applied")
        elif isinstance(command, CommitJob):
            failpoint("master.commit.applied")
        elif isinstance(command, EndAttempts):
            for item in command.items:
                job = self.state.jobs.get(item.attempt.job)  # None: forgotten before its worker could report.
                table = job.table(item.attempt.stage) if job is not None else None
                if table is None:
                    continue
                if table.spec.final:
                    failpoint("master.seal.applied")
                elif isinstance(item, StepDone) and table.spec.kind == TaskKind.PUBLISH:
                    failpoint("master.committed.applied")
                elif isinstance(item, StepDone) and table.spec.kind == TaskKind.CLEANUP:
                    failpoint("master.cleaned.applied")

    def leading_from(self, epoch: int) -> None:
        limits = self.settings.limits
        self._leader = Leader(
            Epoch(epoch),
            self.now(),
            LeaderLimits(self.settings.session.ttl_ms / 1000, self.settings.worker.queue_max, limits.jobs_kept_max,
                         locks=limits_of(self.settings.locks)),
        )  # fmt: skip
        logger.info("leads from epoch %d", epoch)
        self._announce(epoch, self._config.members[self._config.member][1])
        for session in self.state.sessions.live.values():
            self._start_task(self._probe(session))
        self.wake()

    def following(self, epoch: int, leader: MemberId | None) -> None:
        self._stop_leading()
        known = self._config.members.get(leader) if leader is not None else None
        self._announce(epoch, known[1] if known is not None else "")

    def _stop_leading(self) -> None:
        if self._leader is not None:
            logger.info("leads no longer")
            self._leader = None
            self._requests.not_leading("")

    def _announce(self, epoch: int, address: str) -> None:
        """Tell every connected agent and client who leads."""
        self._epoch, self._leader_address = epoch, address
        message = LeaderIs(Epoch(epoch), address)
        for connection in list(self._server.connections):
            if connection.peer.role in ("worker", "client"):
                connection.push(message)

    # --- the leader's tick -------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock.now()

    def wall_ms(self) -> int:
        return int(self._clock.wall() * 1000)

    def leading(self) -> Leader:
        if self._leader is None:
            raise NotLeader("this master does not lead", leader=self._leader_address)
        return self._leader

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self._tick)

    def _on_timer(self) -> None:
        now = self.now()
        elapsed = now - self._ticked_at
        self._ticked_at = now
        if elapsed > GAP_S and self._leader is not None:
            logger.warning("did not run for %.1f s: leases are prolonged by that", elapsed)
        if self._leader is not None and now - self._beacon_at >= self.settings.session.beacon_ms / 1000:
            self._beacon_at = now
            self._announce(self._leader.epoch, self._leader_address)
        self._timer = self._loop.call_later(TICK_S, self._on_timer)
        self.wake()

    def _tick(self) -> None:
        self._awake = False
        self._requests.changed()
        leader = self._leader
        if leader is None:
            return
        proposals, instructs = leader.tick(self.state, self.now())
        for proposal in proposals:
            self._start_task(self._propose_for(leader, proposal))
        for instruct in instructs:
            self._instruct(instruct)

    def _instruct(self, instruct: Instruct) -> None:
        """Push an instruction; one that is lost is seen in the worker's beats and sent again."""
        session = self.state.sessions.live[instruct.session]
        connection = self._workers.get(session.directory)
        if connection is not None:
            connection.push(instruct)

    async def _propose_for(self, leader: Leader, proposal: Proposal) -> None:
        try:
            await self.propose(proposal.command)
        except JobrunnerError as error:
            logger.info("%s: %s", proposal.key, error)
        finally:
            leader.settled(proposal.key)
            self.wake()

    async def propose(self, command: AnyCommand) -> Any:
        leader = self.leading()
        entry = Entry(min(LEVEL, self.state.level), self.wall_ms(), leader.epoch, command)
        return await self._driver.propose(encode_entry(entry))

    async def barrier(self) -> None:
        self.leading()
        await self._driver.read_barrier()
        self.leading()

    async def transfer(self, slot: int) -> int:
        self.leading()
        target = next((member for member, (its, _) in self._config.members.items() if its == slot), None)
        if target is None:
            raise Refused(f"there is no master {slot}")
        return self._config.members[await self._driver.transfer(target)][0]

    def _start_task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- connections -------------------------------------------------------------------------------------------------

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        return RaftFrame(body) if role in ("master", "bulk") else self._decoder.decode(body)

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        if peer.peer.role == "worker":
            self._workers[peer.peer.identity] = peer
        return await self._requests.answer(message)

    def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
        if isinstance(message, RaftFrame):
            self._driver.receive(MemberId(peer.peer.identity), message.data)

    def on_open(self, peer: Connection) -> None:
        if peer.peer.role in ("worker", "client"):
            peer.push(LeaderIs(Epoch(self._epoch), self._leader_address))

    def on_close(self, peer: Connection) -> None:
        if peer.peer.role == "master":
            self._driver.peer_disconnected(MemberId(peer.peer.identity))
        elif peer.peer.role == "worker" and self._workers.get(peer.peer.identity) is peer:
            del self._workers[peer.peer.identity]
            id = self.state.sessions.by_directory.get(peer.peer.identity)
            if id is not None and self._leader is not None:
                self._start_task(self._probe(self.state.sessions.live[id]))

    async def _probe(self, session: Session) -> None:
        """A worker on this host whose process is gone is lost at once, without waiting for its lease."""
        if not same_pid_space(session.host):
            return
        for pause_s in _PROBES_S:
            await asyncio.sleep(pause_s)
            if not process_alive(session.pid) and self._leader is not None:
                self._leader.leases.follow(self.state.sessions.live, self.now())
                self._leader.leases.give_up(session.id, "its process has ended")
                self.wake()
                return

    # --- HTTP, and what is shown -------------------------------------------------------------------------------------

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        blob = self.state.blobs.get(Hash(request.match_info["hash"]))
        return web.Response(status=404) if blob is None else web.Response(body=blob)

    async def _get_member(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode((await self.member_info()).info))

    async def member_info(self) -> MemberInfo:
        status = self._driver.status()
        address = self._config.members[self._config.member][1]
        return MemberInfo(
            MasterInfo(self._config.slot, self._config.member, address, os.getpid(), str(status.role), status.epoch,
                       status.commit_index, status.applied_index)
        )  # fmt: skip

    async def cluster_info(self) -> ClusterInfo:
        infos = await asyncio.gather(*(self._info_of(member) for member in self._config.members))
        jobs: dict[str, int] = dict(self.state.ended_counts)
        for job in self.state.active.values():
            if not job.ended:
                jobs[job.public] = jobs.get(job.public, 0) + 1
        suspect = set()
        if self._leader is not None:
            worried_s = (self.settings.session.ttl_ms - 2 * self.settings.session.beat_ms) / 1000
            leases, now = self._leader.leases, self.now()
            suspect = {id for id in self.state.sessions.live if leases.remaining(id, now) < worried_s}
        workers = views.worker_infos(self.state, suspect)
        epoch = self._leader.epoch if self._leader is not None else self._epoch
        leads = next((slot for slot, address in self._config.members.values() if address == self._leader_address), None)
        ordered = sorted(infos, key=lambda info: info.id)
        return ClusterInfo(self._config.cluster_id, leads, epoch, ordered, workers, jobs)

    async def _info_of(self, member: MemberId) -> MasterInfo:
        if member == self._config.member:
            return (await self.member_info()).info
        slot, address = self._config.members[member]
        try:
            body = await fetch(self._http, address, "/member", bytes_max=65_536, timeout_s=_MEMBER_S)
            info = msgspec.json.decode(body, type=MasterInfo)
        except (JobrunnerError, msgspec.MsgspecError, json.JSONDecodeError):
            known = self._infos.get(slot)
            pid = known.pid if known is not None else None
            return MasterInfo(slot, member, address, pid, "down", 0, 0, 0)
        self._infos[slot] = info
        return info


def raft_settings(settings: Settings) -> RaftSettings:
    section = settings.raft
    return RaftSettings(**{name: getattr(section, name) for name in RaftSettings.__dataclass_fields__})


async def serve_master(config: MasterConfig, sock: socket | None, host: str, port: int, *, handle_sigint: bool) -> int:
    """Run a master until SIGTERM (0) or a fatal error (its own exit status). Raises what refuses the directory."""
    store = Store.open(str(config.directory), raft_settings(config.settings))
    server = MasterServer(config, store)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, *((signal.SIGINT,) if handle_sigint else ())):
        loop.add_signal_handler(number, server.ask_to_stop)
    address = await server.start(sock, host, port)
    logger.info("master %d (member %s) listens on %s, pid %d", config.slot, config.member, address, os.getpid())
    error = await server.stopped
    if error is None:
        await server.hand_over()
        await server.stop()
        logger.info("stopped")
        return 0
    logger.critical("%s: %s", type(error).__name__, error)
    return error.exit_status if isinstance(error, JobrunnerError) else 1
