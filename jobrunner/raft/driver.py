"""Runs one engine on a store, a transport and a clock: the only file of Raft that knows asyncio.

One cycle a loop turn, however much happened in it: propose all that waits, send, hand one save to the storage thread,
apply what is committed, tell the machine who leads. The storage thread only writes and syncs; what was proposed
meanwhile is the next save, so one sync carries all that arrived during the one before.

Time counts while listening. When the timer fires, what has arrived is read and stepped first, in a few turns of the
loop, then deadlines are looked at. If the process was stopped, or the loop was held, for more than half an election
timeout, the gap counts for nobody.

All methods belong to the loop's thread. Failures of the disk, and damage found at any time, end in `on_fatal`, once:
nothing is sent, applied or answered after it.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from jobrunner.clock import Clock
from jobrunner.errors import JobrunnerError, NotLeader, Unavailable, Unknown
from jobrunner.ids import Epoch, MemberId
from jobrunner.raft.engine import Chance, Engine
from jobrunner.raft.member import Machine, RaftStatus, RoleName, Transport
from jobrunner.raft.messages import EntryKind, Message, decode_message, encode_message
from jobrunner.raft.ready import Save, Send
from jobrunner.raft.roles import Follower, Leader
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Snapshot
from jobrunner.raft.snapshots import StoredSnapshot
from jobrunner.raft.store import Store

logger = logging.getLogger(__name__)

APPLY_SECONDS_MAX = 0.002  # One page of applying; then the loop takes its turn.
APPLY_BYTES_MAX = 262_144
TURNS_BEFORE_TICK = 3  # Loop turns from a readable socket to a stepped message, and one more.
STOP_SECONDS_MAX = 5.0


class Driver:
    """One running member. `store` is open; `stop` closes it."""

    def __init__(
        self,
        *,
        store: Store,
        machine: Machine,
        transport: Transport,
        settings: RaftSettings,
        clock: Clock,
        rng: Chance,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.member = store.identity.member
        newest = store.snapshot
        self._engine = Engine(
            member=self.member, log=store.log, state=store.state, settings=settings, rng=rng,
            members=newest.members if newest is not None else None, snapshot=newest,
        )  # fmt: skip
        if newest is not None:
            machine.restore(newest.data())
        self._store = store
        self._machine = machine
        self._transport = transport
        self._settings = settings
        self._clock = clock
        self._on_fatal = on_fatal
        self._running = False
        self._cycle_due = False
        self._counted = 0.0  # The clock, up to which time was counted or given up.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._proposed: list[tuple[bytes, asyncio.Future[object]]] = []  # Not yet in the log.
        self._waiting: dict[int, asyncio.Future[object]] = {}  # By index; all of one leadership, `_waiting_term`.
        self._waiting_term = 0
        self._handing_over: list[asyncio.Future[MemberId]] = []
        self._reading: list[asyncio.Future[None]] = []  # Not yet asked of the engine.
        self._reads: dict[int, list[asyncio.Future[None]]] = {}  # By number; all of one leadership, `_reads_term`.
        self._reads_term = 0
        self._reads_due: list[tuple[int, int]] = []  # (index, number): confirmed; to be served when that is applied.
        self._leading_term = 0
        self._told: tuple[int, MemberId | None] | None = None
        self._applied_bytes = 0  # Since the last snapshot.
        self._applied_entries = 0
        self._snapshotting: asyncio.Future[StoredSnapshot] | None = None
        self._saves: queue.SimpleQueue[tuple[Save, tuple[Send, ...]] | int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_and_sync, name="raft-storage", daemon=True)

    # --- for the process around it ---

    async def start(self, campaign: bool = False) -> None:
        """Begin to listen and count time. `campaign`: ask for votes at once, as a fresh group's first master does."""
        self._loop = asyncio.get_running_loop()
        self._counted = self._clock.now()
        self._running = True
        self._thread.start()
        if campaign:
            self._engine.campaign()
        self._cycle()

    async def stop(self) -> None:
        """End, without a word to the others; close the store when its last write is done."""
        self._halt(Unavailable("this master is stopping"))
        self._saves.put(None)
        if self._snapshotting is not None:
            await asyncio.wait([self._snapshotting], timeout=STOP_SECONDS_MAX)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_SECONDS_MAX)
        if not self._thread.is_alive():
            self._store.close()

    async def propose(self, data: bytes) -> object:
        """The machine's result for `data`, once it is committed and applied here.

        Raises NotLeader, Refused, Unavailable: it was not and will not be carried out. Raises Unknown: it may be, or
        may have been. Raises what the machine returned, if that is an exception.
        """
        if not self._running:
            raise Unavailable("this master is stopping")
        future: asyncio.Future[object] = self._loop.create_future()
        self._proposed.append((data, future))
        self._schedule()
        return await future

    async def read_barrier(self) -> None:
        """Return when this member leads, led after the call, and has applied all that was committed before it.

        What the machine then holds is at least as new as every answer that anybody had before the call. Costs one
        round of heartbeats, shared by all who wait. Raises NotLeader, Unavailable.
        """
        if not self._running:
            raise Unavailable("this master is stopping")
        if not isinstance(self._engine.role, Leader):
            raise NotLeader("this master does not lead", leader=self._engine.leader_address())
        future: asyncio.Future[None] = self._loop.create_future()
        self._reading.append(future)
        self._schedule()
        await future

    async def transfer(self, target: MemberId | None = None) -> MemberId:
        """Make `target`, or the most complete member, the leader; return when it is known to lead.

        Raises NotLeader, Refused; Unavailable if it did not take over in time: this member may lead on.
        """
        if not self._running:
            raise Unavailable("this master is stopping")
        target = self._engine.transfer(target)
        if target == self.member:
            return target
        future: asyncio.Future[MemberId] = self._loop.create_future()
        self._handing_over.append(future)
        self._schedule()
        try:
            async with asyncio.timeout(3 * self._settings.election_ms / 1000):
                return await future
        except TimeoutError:
            raise Unavailable(f"{target} did not take over in time") from None
        finally:
            self._handing_over.remove(future)

    def receive(self, sender: MemberId, message: bytes) -> None:
        """A message arrived. Raises Refused if it is none of Raft's."""
        decoded = decode_message(message)
        self._take(lambda: self._engine.step(sender, decoded))

    def peer_disconnected(self, member: MemberId) -> None:
        """The connection to `member` closed. If it leads, its process most likely died: ask for votes soon."""
        self._take(lambda: self._engine.peer_lost(member))

    def peer_connected(self, member: MemberId) -> None:
        """A connection to `member` opened: repeat what it may have missed."""
        self._take(lambda: self._engine.peer_found(member))

    def report_unreachable(self, member: MemberId) -> None:
        """A message to `member` was dropped."""
        self._engine.report_unreachable(member)  # From within `send`: there is nothing to do at once.

    def status(self) -> RaftStatus:
        engine = self._engine
        role = RoleName.CANDIDATE
        if isinstance(engine.role, Leader):
            role = RoleName.LEADER
        elif isinstance(engine.role, Follower):
            role = RoleName.FOLLOWER
        return RaftStatus(
            role=role,
            epoch=Epoch(engine.term),
            leader=engine.leader,
            commit_index=engine.commit_index,
            applied_index=engine.applied_index,
            last_index=engine.log.last_index,
            members=tuple(engine.members.values()),
        )

    # --- the cycle ---

    def _take(self, event: Callable[[], None]) -> None:
        if not self._running:
            return
        try:
            self._advance()
            event()
        except Exception as error:
            self._fatal(error)
        self._schedule()

    def _schedule(self) -> None:
        if self._running and not self._cycle_due:
            self._cycle_due = True
            self._loop.call_soon(self._cycle)

    def _cycle(self) -> None:
        self._cycle_due = False
        if not self._running:
            return
        try:
            self._advance()
            self._notice_role()
            self._propose_all()
            self._ask_reads()
            ready = self._engine.ready()
            self._send(ready.send_now)
            if ready.save is not None:
                self._saves.put((ready.save, ready.after_persist))
            self._reads_due += [(read.index, read.number) for read in ready.reads]
            self._apply_page()
            self._serve_reads()
            self._begin_snapshot()
            self._notice_role()
            self._arm()
        except Exception as error:
            self._fatal(error)

    def _propose_all(self) -> None:
        proposed, self._proposed = self._proposed, []
        for data, future in proposed:
            if future.done():
                continue  # Cancelled before it was in the log.
            try:
                proposal = self._engine.propose(data)
            except JobrunnerError as error:
                future.set_exception(error)
            else:
                self._waiting[proposal.index] = future
                self._waiting_term = proposal.term

    def _ask_reads(self) -> None:
        """All that wait become one read."""
        reading, self._reading = self._reading, []
        if not reading:
            return
        try:
            number = self._engine.read()
        except NotLeader as error:
            for future in reading:
                if not future.done():
                    future.set_exception(NotLeader(str(error), leader=self._engine.leader_address()))
        else:
            self._reads[number] = reading
            self._reads_term = self._engine.term

    def _serve_reads(self) -> None:
        applied = self._engine.applied_index
        for index, number in [due for due in self._reads_due if due[0] <= applied]:
            self._reads_due.remove((index, number))
            for future in self._reads.pop(number, ()):
                if not future.done():
                    future.set_result(None)

    def _send(self, sends: tuple[Send, ...]) -> None:
        message: Message | None = None
        data = b""
        for send in sends:
            if send.message != message:  # Followers in step get the same bytes.
                message, data = send.message, encode_message(send.message)
            self._transport.send(send.to, data, send.bulk)

    def _apply_page(self) -> None:
        engine = self._engine
        first = engine.applied_index + 1
        if first > engine.commit_index or engine.installing:
            return
        until = self._clock.now() + APPLY_SECONDS_MAX
        for entry in engine.log.slice(first, engine.commit_index, APPLY_BYTES_MAX):
            result: object = None
            if entry.kind == EntryKind.DATA:
                result = self._machine.apply(entry.index, entry.term, entry.data)
            engine.applied(entry.index)
            self._applied_bytes += entry.size
            self._applied_entries += 1
            future = self._waiting.pop(entry.index, None)
            if future is not None and not future.done():
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            if self._clock.now() >= until:
                break
        if engine.applied_index < engine.commit_index or engine.transferring is not None:
            self._schedule()

    # --- snapshots ---

    def _begin_snapshot(self) -> None:
        """Copy the machine's state, and write it in a thread of its own: the log's thread goes on syncing."""
        engine, settings = self._engine, self._settings
        if self._applied_bytes < settings.snapshot_bytes and self._applied_entries < settings.snapshot_entries:
            return
        if self._snapshotting is not None or engine.installing or engine.applied_index > engine.log.durable_index:
            return
        index = engine.applied_index
        term = engine.log.term_at(index)
        assert term is not None, index
        self._applied_bytes = self._applied_entries = 0
        snapshot = Snapshot(index, term, tuple(engine.members.values()), self._machine.snapshot())
        self._snapshotting = self._loop.run_in_executor(None, self._store.save_snapshot, snapshot)
        self._snapshotting.add_done_callback(self._snapshot_saved)

    def _snapshot_saved(self, future: "asyncio.Future[StoredSnapshot]") -> None:
        self._snapshotting = None
        if not self._running or future.cancelled():
            return
        if (error := future.exception()) is not None:
            self._fatal(error)
            return
        stored = future.result()
        self._engine.compact(stored, self._settings.trailing_entries)
        logger.info("snapshot of %d bytes after entry %d", stored.size, stored.index)
        self._saves.put(self._engine.log.first_index - 1)

    def _notice_role(self) -> None:
        """Tell the machine, and whoever waits for an entry of a leadership that is over."""
        engine = self._engine
        leads = isinstance(engine.role, Leader)
        if self._handing_over:
            self._notice_transfer()
        if self._waiting and not (leads and self._waiting_term == engine.term):
            self._give_up("leadership was lost")
        if self._reads and not (leads and self._reads_term == engine.term):
            self._give_up_reads(NotLeader("this master no longer leads", leader=engine.leader_address()))
        if isinstance(engine.role, Leader):
            if self._leading_term != engine.term and engine.applied_index >= engine.role.noop_index:
                self._leading_term, self._told = engine.term, None
                logger.info("leading epoch %d", engine.term)
                self._machine.leading(engine.term)
            return
        now = (engine.term, engine.leader)
        if self._leading_term or now != self._told:
            self._leading_term, self._told = 0, now
            logger.info("epoch %d, leader %s", engine.term, engine.leader)
            self._machine.following(engine.term, engine.leader)

    def _notice_transfer(self) -> None:
        leader, target = self._engine.leader, self._engine.transferring
        for future in self._handing_over:
            if future.done() or target is not None or leader is None:
                continue
            if leader != self.member:
                future.set_result(leader)
            else:
                future.set_exception(Unavailable("the other master did not take over in time; this one leads on"))

    # --- time ---

    def _advance(self) -> None:
        """Count the time since the last call, unless this process cannot have listened in it."""
        elapsed_ms = int((self._clock.now() - self._counted) * 1000)
        if elapsed_ms > self._settings.heartbeat_ms + self._settings.election_ms // 2:
            self._counted = self._clock.now()
            logger.warning("did not listen for %d ms", elapsed_ms)
            self._engine.slept(elapsed_ms)
        elif elapsed_ms > 0:
            self._counted += elapsed_ms / 1000
            self._engine.advance(elapsed_ms)

    def _arm(self) -> None:
        """Have the timer fire when something falls due, and at least every heartbeat, so that gaps are seen."""
        wait = min(max(self._engine.wait_ms(), 1), self._settings.heartbeat_ms) / 1000
        due = self._clock.now() + wait
        if self._timer is not None:
            if self._timer_due <= due + 0.0005:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(wait, self._on_timer, TURNS_BEFORE_TICK)

    def _on_timer(self, turns: int) -> None:
        if turns:
            self._loop.call_soon(self._on_timer, turns - 1)
            return
        self._timer = None
        if self._running:
            self._take(self._engine.tick)

    # --- the disk ---

    def _write_and_sync(self) -> None:
        """The storage thread."""
        while (item := self._saves.get()) is not None:
            stored: StoredSnapshot | None = None
            try:
                if isinstance(item, int):
                    self._store.drop_prefix(item)
                    continue
                save, after = item
                if save.install is not None:
                    stored = self._store.install(save)
                else:
                    self._store.write(save)
                    self._store.sync()
            except BaseException as error:
                self._call_back(self._fatal, error)
                return
            self._call_back(self._saved, (after, stored, save.install))

    def _call_back(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            logger.debug("the loop is closed")

    def _saved(self, done: tuple[tuple[Send, ...], StoredSnapshot | None, Snapshot | None]) -> None:
        if not self._running:
            return
        after, stored, install = done
        try:
            self._send(after)
            self._advance()
            if stored is not None and install is not None:
                self._machine.restore(install.data)
                self._applied_bytes = self._applied_entries = 0
                self._engine.installed(stored)
            else:
                self._engine.saved()
        except Exception as error:
            self._fatal(error)
        self._cycle()

    # --- the end ---

    def _fatal(self, error: BaseException) -> None:
        if self._running:
            self._halt(Unavailable(f"this master stopped: {error}"))
            logger.critical("stopping: %s", error, exc_info=error)
            self._on_fatal(error)

    def _halt(self, reason: JobrunnerError) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _, future in self._proposed:
            if not future.done():
                future.set_exception(reason)
        self._proposed.clear()
        self._give_up(str(reason))
        self._give_up_reads(reason)
        for handing in self._handing_over:
            if not handing.done():
                handing.set_exception(reason)

    def _give_up(self, reason: str) -> None:
        """What is in the log may yet be committed, here or by another leader."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unknown(f"{reason}; the request may or may not be carried out"))
        self._waiting.clear()

    def _give_up_reads(self, reason: JobrunnerError) -> None:
        """Who reads has changed nothing, and may ask another."""
        for future in [*self._reading, *(future for group in self._reads.values() for future in group)]:
            if not future.done():
                future.set_exception(reason)
        self._reading.clear()
        self._reads.clear()
        self._reads_due.clear()
