"""A simulated master: a Raft node with the real state machine, leader and requests on it, and no I/O.

Does what `master/server.py` does: requests are the real coroutines, stepped by hand, so that a proposal's result comes
back to them in a later turn, or `Unknown` when leadership is lost first. Time is the world's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from jobrunner.control.messages import Beat, Instruct, LeaderIs, MemberInfo
from jobrunner.errors import JobrunnerError, NotLeader, Unknown
from jobrunner.ids import Epoch, SessionId
from jobrunner.master.commands import AnyCommand, EndSession, RegisterSession, decode_entry, encode_entry
from jobrunner.master.commands import Entry as LogEntry
from jobrunner.master.leader import Leader, LeaderLimits, Proposal
from jobrunner.master.requests import Requests
from jobrunner.master.state import MasterState
from jobrunner.raft.messages import Entry
from tests.simulation.control_network import Actor, Deliver, Reply, decode, encode
from tests.simulation.raft_world import MS, Node

if TYPE_CHECKING:
    from tests.simulation.control_world import ControlWorld

TICK_US = 50 * MS
GAP_US = 100 * MS  # Shorter stops count as silence.
BEACON_US = 100 * MS
TURN_US = 200  # One turn of a real master's loop.

Resume = Callable[[object], None]


class Pending:
    """What a coroutine awaits: the result of a proposal, or the error that refuses it."""

    def __init__(self) -> None:
        self.resume: Resume | None = None

    def __await__(self) -> Generator[Pending, object, object]:
        result = yield self
        if isinstance(result, JobrunnerError):
            raise result
        return result


class Front:
    """A master under the names that `Requests` knows it by."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self.settings = master.world.cluster_settings
        self.state = master.state
        self.now = master.now
        self.leading = master.leading_now
        self.wake = master.wake_tick

    def wall_ms(self) -> int:
        return self._master.world.now_us // MS

    async def propose(self, command: AnyCommand) -> Any:
        return await self._master.enter(command)

    async def barrier(self) -> None:
        await self._master.barrier()

    async def transfer(self, slot: int) -> int:
        raise AssertionError("not asked in the simulation")

    async def member_info(self) -> MemberInfo:
        raise AssertionError("not asked in the simulation")

    cluster_info = member_info


class Master(Node):
    """`listened_us` is the time in which it was not stopped: what leases may count."""

    world: ControlWorld

    @property
    def name(self) -> str:
        return str(self.member)

    # --- the process -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.state = MasterState()
        self.requests = Requests(Front(self))
        self.leader: Leader | None = None
        self.mail: list[Deliver] = []
        self._waiting: dict[int, Resume] = {}  # By index of the entry.
        self._awake = False
        self._beacon_us = 0
        self._lost_us = 0  # Time it was stopped.
        self._heard: dict[SessionId, int] = {}  # When a session was last heard, in `listened_us`.
        self._led_us = 0
        super().start()
        self.world.later(self, TICK_US, Master._on_timer)

    def crash(self, *, power: bool) -> None:
        before = {path: (inode.durable, bytes(inode.pending)) for path, inode in self.disk.names.items()}
        super().crash(power=power)
        self.leader = None
        self.world.mark("master crash")
        torn = [path for path, inode in self.disk.names.items() if inode.durable not in before.get(path, (b"", b""))]
        if torn:
            self.world.mark("torn write")

    def wake(self) -> None:
        assert self.paused_since is not None
        stopped_us = self.world.now_us - self.paused_since
        self._lost_us += stopped_us if stopped_us > GAP_US else 0
        super().wake()
        mail, self.mail = self.mail, []
        for deliver in mail:
            deliver()

    @property
    def listened_us(self) -> int:
        return self.world.now_us - self._lost_us

    def _write(self, save: Any, after: Any) -> None:
        super()._write(save, after)
        if self.world.crashes_at_write():
            self.world.later(self, 0, lambda node: self.world.crash(self))

    # --- the log's machine -------------------------------------------------------------------------------------------

    def apply(self, entry: Entry) -> None:
        decoded = decode_entry(entry.data)
        newest = self.world.control.before(self, entry.index, decoded.command)
        result = self.state.apply(decoded)
        self.world.control.applied(self, entry.index, decoded, result, newest=newest)
        if isinstance(decoded.command, RegisterSession) and not isinstance(result, JobrunnerError):
            self._heard[result] = self.listened_us  # type: ignore[index]
        resume = self._waiting.pop(entry.index, None)
        if resume is not None:
            self.world.later(self, 0, lambda node: resume(result))
        self.requests.applied()
        if self.leader is not None:
            self.wake_tick()

    def leading(self, epoch: int) -> None:
        settings = self.world.cluster_settings
        limits = LeaderLimits(
            settings.session.ttl_ms / 1000, settings.worker.queue_max, settings.limits.jobs_kept_max,
            gap_s=GAP_US / 1_000_000,
        )  # fmt: skip
        self.leader = Leader(Epoch(epoch), self.now(), limits)
        self._led_us = self.listened_us
        self.world.control.leads(self)
        self._announce()
        for session in self.state.sessions.live.values():
            self.probe(session.directory)
        self.wake_tick()

    def following(self, epoch: int) -> None:
        self.leader = None
        self.requests.not_leading("")
        waiting, self._waiting = self._waiting, {}
        for resume in waiting.values():
            error = Unknown("leadership was lost; the request may or may not be carried out")
            self.world.later(self, 0, lambda node, resume=resume, error=error: resume(error))

    # --- what `Requests` needs ---------------------------------------------------------------------------------------

    def now(self) -> float:
        return self.world.now_us / 1_000_000

    def leading_now(self) -> Leader:
        if self.leader is None:
            raise NotLeader("this master does not lead", leader=str(self.engine.leader or ""))
        return self.leader

    def wake_tick(self) -> None:
        if not self._awake:
            self._awake = True
            self.world.later(self, TURN_US, Master._run_tick)

    def enter(self, command: AnyCommand) -> Pending:
        """Into the log, if this member leads. Raises NotLeader, Unavailable, Refused."""
        leader = self.leading_now()
        entry = LogEntry(self.state.level, self.world.now_us // MS, leader.epoch, command)
        pending = Pending()
        id = self.engine.propose(encode_entry(entry))
        self._waiting[id.index] = lambda result: pending.resume(result) if pending.resume else None
        self.world.later(self, 0, Master.pump)
        return pending

    def barrier(self) -> Pending:
        """A quorum confirms that this member leads. Raises NotLeader."""
        self.leading_now()
        pending = Pending()

        def served(ok: bool) -> None:
            lost = NotLeader("this master no longer leads", leader="")
            result = None if ok and self.leader is not None else lost
            self.world.later(self, 0, lambda node: pending.resume(result) if pending.resume else None)

        self.read(served)
        return pending

    def hear(self, sender: Actor, message: msgspec.Struct, reply: Reply) -> None:
        """A request arrived."""
        if isinstance(message, Beat) and self.leader is not None:
            self._heard[message.session] = self.listened_us
        self._step(self.requests.answer(message), None, reply)

    def _step(self, work: Coroutine[Any, Any, msgspec.Struct], value: object, reply: Reply) -> None:
        try:
            pending = work.send(value)
        except StopIteration as stop:
            reply(stop.value)
        except JobrunnerError as error:
            reply(error)
        else:
            pending.resume = lambda result: self._step(work, result, reply)

    # --- the leader's tick -------------------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        now_us = self.world.now_us
        if self.leader is not None and now_us - self._beacon_us >= BEACON_US:
            self._beacon_us = now_us
            self._announce()
        self.world.later(self, TICK_US, Master._on_timer)
        self.wake_tick()

    def _run_tick(self) -> None:
        self._awake = False
        self.requests.changed()
        if self.leader is None:
            return
        proposals, instructs = self.leader.tick(self.state, self.now())
        for proposal in proposals:
            self._check_verdict(proposal.command)
            self._propose_for(self.leader, proposal)
        for instruct in instructs:
            self._instruct(instruct)

    def _check_verdict(self, command: AnyCommand) -> None:
        """A session may be ended for silence only after a whole lease of listening to it."""
        if isinstance(command, EndSession) and command.reason.startswith("no heartbeat"):
            heard_us = max(self._heard.get(command.session, 0), self._led_us)
            self.world.control.silent(self.name, command.session, self.listened_us - heard_us)

    def _propose_for(self, leader: Leader, proposal: Proposal) -> None:
        def settle(result: object) -> None:
            leader.settled(proposal.key)
            self.wake_tick()

        try:
            self.enter(proposal.command).resume = settle
        except JobrunnerError:
            leader.settled(proposal.key)  # The next tick of the timer tries again.

    def _instruct(self, instruct: Instruct) -> None:
        session = self.state.sessions.live[instruct.session]
        self._push(self.world.workers[session.directory], instruct)

    def _announce(self) -> None:
        assert self.leader is not None
        for actor in self.world.actors():
            self._push(actor, LeaderIs(self.leader.epoch, self.name))

    def _push(self, actor: Actor, message: msgspec.Struct) -> None:
        data = encode(message)
        self.world.carry(self.name, actor, lambda: actor.pushed(decode(data)))

    def probe(self, directory: str) -> None:
        """Its connection closed: a worker whose process is gone is lost at once."""

        def look(node: Node) -> None:
            id = self.state.sessions.by_directory.get(directory)
            if self.leader is None or id is None:
                return
            session, worker = self.state.sessions.live[id], self.world.workers[directory]
            if not (worker.running and worker.life == session.pid):
                self.leader.leases.follow(self.state.sessions.live, self.now())
                self.leader.leases.give_up(id, "its process has ended")
                self.wake_tick()

        self.world.later(self, self.world.rng.randint(1, 20 * MS), look)
