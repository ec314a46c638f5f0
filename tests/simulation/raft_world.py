"""A group of Raft members in one thread, from one seed: real engine, real store, faulty disks, faulty network.

`RaftWorld` is a heap of (time, number, event); time is simulated microseconds, and every draw comes from one random
number generator, so a seed repeats a run exactly. `Node` is what `driver.py` is to a real member: it does what the
engine asks, with delays between the steps and crashes inside them. Subclass `Node` and override `apply`, `leading`,
`following` to put a state machine on top, and `RaftWorld.at` to bring other actors.

Faults: messages lost, doubled, late and out of order; links cut one way or both; crashes of a process or of its
machine, inside a write too; processes stopped and woken; disks that stall; connections that break for no reason.
"""

import heapq
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from jobrunner.errors import JobrunnerError
from jobrunner.ids import MemberId
from jobrunner.raft.engine import Engine
from jobrunner.raft.messages import Entry, EntryKind, Member, VoteReply, decode_message, encode_message, first_entry
from jobrunner.raft.reads import ReadReady
from jobrunner.raft.ready import Save, Send
from jobrunner.raft.roles import Leader
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Snapshot
from jobrunner.raft.snapshots import StoredSnapshot
from jobrunner.raft.store import Store, init_store
from tests.simulation.faulty_files import FaultyDisk, FaultyFiles, PowerCut
from tests.simulation.raft_history import Broken, History

MS = 1_000
DIRECTORY = "/raft"
T = TypeVar("T")


@dataclass(frozen=True)
class Faults:
    """How much goes wrong. Rates are per second of simulated time for the whole group, shares are of messages."""

    loss: float = 0.0
    duplicates: float = 0.0
    delay_us: tuple[int, int] = (50, 500)
    late: float = 0.0  # Share of messages that take up to `late_us` instead.
    late_us: int = 300 * MS
    sync_us: tuple[int, int] = (100, 2 * MS)
    stalls: float = 0.0  # Share of syncs that take up to 200 ms.
    crashes: float = 0.0
    pauses: float = 0.0
    cuts: float = 0.0
    breaks: float = 0.0  # Connections that close and open again.
    transfers: float = 0.0  # A leader is asked to hand over.
    lose_all: bool = False

    @classmethod
    def draw(cls, rng: Random) -> "Faults":
        """Each kind is off in some runs: what always happens together hides what happens alone."""

        def some(most: float) -> float:
            return rng.choice((0.0, most / 4, most))

        return cls(
            loss=some(0.2), duplicates=some(0.2), late=some(0.2), stalls=some(0.1), crashes=some(4), pauses=some(2),
            cuts=some(3), breaks=some(4), transfers=some(3), lose_all=rng.random() < 0.5,
        )  # fmt: skip


def draw_settings(rng: Random) -> RaftSettings:
    """Small limits, so that every limit is met in a short run."""
    return RaftSettings(
        heartbeat_ms=rng.choice((10, 20, 50)),
        election_ms=rng.choice((100, 150, 250)),
        append_bytes_max=rng.choice((100, 400, 65_536)),
        bulk_bytes_max=2_000,
        inflight_max=rng.choice((1, 2, 8, 64)),
        proposals_bytes_max=rng.choice((2_000, 100_000)),
        segment_bytes_max=rng.choice((300, 1_000, 16_000_000)),
        cache_bytes_max=rng.choice((200, 2_000, 1_000_000)),
        sync_hang_ms=100,
        snapshot_bytes=rng.choice((500, 3_000, 1_000_000)),
        snapshot_piece_bytes=rng.choice((20, 100, 10_000)),
        trailing_entries=rng.choice((0, 3, 30)),
    )


class Node:
    """One member: its disk, which outlives it, and its process, when it runs."""

    def __init__(self, world: "RaftWorld", member: MemberId, slot: int) -> None:
        self.world = world
        self.takes_snapshots = type(self).apply is Node.apply or type(self).snapshot is not Node.snapshot
        self.member = member
        self.disk = FaultyDisk(world.rng, lose_all=world.faults.lose_all)
        self.life = 0  # Events of an earlier life of the process are void.
        self.running = False
        self.paused_since: int | None = None
        self.inbox: list[tuple[MemberId, bytes]] = []  # While paused.
        self.applied: list[Entry] = []
        self.leading_epoch = 0
        self.reads: dict[int, Callable[[bool], None]] = {}  # By the engine's number: what to do when it is served.
        self.reads_due: list[ReadReady] = []
        self.reads_term = 0
        files = FaultyFiles(self.disk)
        init_store(DIRECTORY, cluster_id="c", member=member, slot=slot, members=world.members, files=files)

    # --- for subclasses: a state machine ---

    def apply(self, entry: Entry) -> None:
        """A committed DATA entry, in order; from the first again after a restart."""

    def snapshot(self) -> bytes:
        """The state of a machine that chains what it applies. Who overrides `apply` overrides this too."""
        last = next((entry.data for entry in reversed(self.applied) if entry.kind == EntryKind.DATA), b"")
        return b"%08x" % self.chain + last

    def restore(self, data: bytes) -> None:
        """Become what `snapshot` gave."""
        self.chain = int(data[:8], 16)

    def leading(self, epoch: int) -> None:
        """This member leads and has applied its own first entry."""

    def following(self, epoch: int) -> None:
        """It leads no more."""

    # --- the process ---

    def start(self) -> None:
        world = self.world
        self.life += 1
        self.running, self.paused_since, self.leading_epoch = True, None, 0
        self.inbox.clear()
        self.applied = []
        self._drop_reads()
        self.chain, self.applied_bytes, self.snapshotting = 0, 0, False
        self.store = Store.open(DIRECTORY, world.settings, FaultyFiles(self.disk))
        log, newest = self.store.log, self.store.snapshot
        self.engine = world.engine_class(
            member=self.member, log=log, state=self.store.state, settings=world.settings, rng=world.rng,
            members=newest.members if newest is not None else None, snapshot=newest,
        )  # fmt: skip
        if newest is not None:
            self._restore(newest.index, newest.term, newest.data())
        world.history.started(self.engine)
        self.ticked_us = world.now_us
        world.note(f"{self.member} starts, term {self.engine.term}, last {log.last_index}")
        for other in world.nodes.values():
            if other is not self and other.running:
                world.connected(self, other)
        self._schedule_tick()

    def crash(self, *, power: bool) -> None:
        """End the process; with `power`, its machine too."""
        self.running = False
        self._drop_reads()
        self.life += 1
        if power:
            self.disk.crash()
        else:
            self.disk.kill()
        self.world.note(f"{self.member} {'loses power' if power else 'is killed'}")
        for other in self.world.nodes.values():
            if other is not self:
                self.world.later(other, self.world.rng.randint(10, 2 * MS), lambda node: node.lost(self.member))

    def lost(self, member: MemberId) -> None:
        self.engine.peer_lost(member)
        self.pump()

    def pause(self) -> None:
        self.paused_since = self.world.now_us

    def wake(self) -> None:
        assert self.paused_since is not None
        self.engine.slept((self.world.now_us - self.paused_since) // MS)
        self.paused_since = None
        self.ticked_us = self.world.now_us
        inbox, self.inbox = self.inbox, []
        for sender, message in inbox:
            self.receive(sender, message)
        self._schedule_tick()

    def receive(self, sender: MemberId, message: bytes) -> None:
        if self.paused_since is not None:
            self.inbox.append((sender, message))
            return
        self.engine.step(sender, decode_message(message))
        self.pump()

    def propose(self, data: bytes) -> bool:
        try:
            self.engine.propose(data)
        except JobrunnerError:
            return False
        self.pump()
        return True

    def read(self, served: Callable[[bool], None]) -> None:
        """`served(True)` when a linearizable read may be served here, `served(False)` if never. Raises NotLeader."""
        number = self.engine.read()
        self.reads_term = self.engine.term
        self.reads[number] = served
        self.pump()

    def _serve_reads(self) -> None:
        for due in [due for due in self.reads_due if due.index <= self.engine.applied_index]:
            self.reads_due.remove(due)
            if (served := self.reads.pop(due.number, None)) is not None:
                served(True)

    def _drop_reads(self) -> None:
        reads, self.reads = self.reads, {}
        self.reads_due = []
        for served in reads.values():
            served(False)

    def pump(self) -> None:
        """Do what the engine asks."""
        while True:
            self._notice_role()
            self.world.history.check(self.engine)
            ready = self.engine.ready()
            self._send(ready.send_now)
            if ready.save is not None:
                self._write(ready.save, ready.after_persist)
            self.reads_due += ready.reads
            self._serve_reads()
            if not self._apply_some():
                return

    def _restore(self, index: int, term: int, data: bytes) -> None:
        self.restore(data)
        self.world.history.applied(index, self.chain)
        self.applied = [Entry(index, term, EntryKind.DATA, data[8:])]
        self.applied_bytes = 0

    def _begin_snapshot(self) -> None:
        engine = self.engine
        if not self.takes_snapshots or self.snapshotting or engine.installing:
            return
        if self.applied_bytes < self.world.settings.snapshot_bytes or engine.applied_index > engine.log.durable_index:
            return
        term = engine.log.term_at(engine.applied_index)
        assert term is not None
        snapshot = Snapshot(engine.applied_index, term, self.world.members, self.snapshot())
        self.snapshotting, self.applied_bytes = True, 0
        self.world.later(self, self.world.sync_delay_us(), lambda node: node._snapshot_written(snapshot))

    def _snapshot_written(self, snapshot: Snapshot) -> None:
        stored = self._or_crash(lambda: self.store.save_snapshot(snapshot))
        if stored is None:
            return
        self.world.snapshots_taken += 1
        self.world.later(self, self.world.sync_delay_us(), lambda node: node._snapshot_saved(stored))

    def _snapshot_saved(self, stored: StoredSnapshot) -> None:
        self.snapshotting = False
        self.engine.compact(stored, self.world.settings.trailing_entries)
        first = self.engine.log.first_index
        self._or_crash(lambda: self.store.drop_prefix(first - 1))

    def _or_crash(self, step: Callable[[], T]) -> T | None:
        """Several file operations: sometimes the power goes between two of them."""
        if self.world.faults.crashes and self.world.rng.random() < 0.1:
            self.disk.operations_left = self.world.rng.randint(0, 6)
        try:
            return step()
        except PowerCut:
            self.crash(power=True)
            self.world.at(self.world.rng.randint(1, 300 * MS), lambda: None if self.running else self.start())
            return None
        finally:
            self.disk.operations_left = None

    def _install(self, save: Save, after: tuple[Send, ...]) -> None:
        self.world.history.installing(self.member, save)
        stored = self._or_crash(lambda: self.store.install(save))
        if stored is None:
            return
        assert save.install is not None
        install = save.install
        self.world.snapshots_installed += 1
        self.world.history.installed(self.member, save)

        def finish(node: "Node") -> None:
            node._send(after)
            node._restore(install.index, install.term, install.data)
            node.engine.installed(stored)
            node.pump()

        self.world.later(self, self.world.sync_delay_us(), finish)

    def _write(self, save: Save, after: tuple[Send, ...]) -> None:
        if save.install is not None:
            self.world.later(self, 0, lambda node: node._install(save, after))
            return
        self.store.write(save)
        self.world.history.saving(self.member, save)
        self.world.later(self, self.world.sync_delay_us(), lambda node: node._synced(save, after))

    def _synced(self, save: Save, after: tuple[Send, ...]) -> None:
        self.store.sync()
        self.world.history.saved(self.member, save)
        self._send(after)
        self.engine.saved()
        self.pump()

    def _apply_some(self) -> bool:
        engine = self.engine
        first = engine.applied_index + 1
        if first > engine.commit_index or engine.installing:
            return False
        for entry in engine.log.slice(first, engine.commit_index, 1_000):
            self.applied.append(entry)
            if entry.kind == EntryKind.DATA:
                self.apply(entry)
                self.chain = zlib.crc32(entry.data, self.chain)
            self.applied_bytes += entry.size
            engine.applied(entry.index)
            self.world.history.applied(entry.index, self.chain)
        self._begin_snapshot()
        self._notice_role()
        return True

    def _notice_role(self) -> None:
        role, epoch = self.engine.role, self.engine.term
        if self.reads and not (isinstance(role, Leader) and epoch == self.reads_term):
            self._drop_reads()
        if self.leading_epoch and not (isinstance(role, Leader) and epoch == self.leading_epoch):
            self.leading_epoch = 0
            self.following(epoch)
        if not self.leading_epoch and isinstance(role, Leader) and self.engine.applied_index >= role.noop_index:
            self.leading_epoch = epoch
            self.world.note(f"{self.member} leads term {epoch}")
            self.leading(epoch)

    def _send(self, sends: tuple[Send, ...]) -> None:
        for send in sends:
            if isinstance(send.message, VoteReply) and send.message.granted:
                self.world.history.voted(self.member, send.to, send.message.term)
            self.world.send(self, send.to, encode_message(send.message))

    def _schedule_tick(self) -> None:
        wait_ms = min(max(self.engine.wait_ms(), 1), self.world.settings.heartbeat_ms)
        self.world.later(self, wait_ms * MS, Node._tick)

    def _tick(self) -> None:
        elapsed_ms = (self.world.now_us - self.ticked_us) // MS
        self.ticked_us += elapsed_ms * MS
        self.engine.tick(elapsed_ms)
        self.pump()
        self._schedule_tick()


class RaftWorld:
    """The group, its network and its faults. `play` for a while, then `settle` with all faults off."""

    node_class: type[Node] = Node

    def __init__(
        self,
        seed: int,
        *,
        members: int | None = None,
        faults: Faults | None = None,
        settings: RaftSettings | None = None,
        engine_class: type[Engine] = Engine,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.faults = faults or Faults.draw(self.rng)
        self.settings = settings or draw_settings(self.rng)
        self.engine_class = engine_class
        self.now_us = 0
        self.trace: list[str] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = 0
        self._serial = 0
        self.reads_served = 0
        self.snapshots_taken = 0
        self.snapshots_installed = 0
        self._cut: set[tuple[MemberId, MemberId]] = set()  # (from, to)
        count = members or self.rng.choice((1, 3, 3, 3, 5))
        names = [MemberId(f"m{slot}") for slot in range(1, count + 1)]
        self.members = tuple(Member(name, slot, f"host{slot}:1") for slot, name in enumerate(names, 1))
        self.history = History(names, first_entry(self.members))
        self.nodes = {name: self.node_class(self, name, slot) for slot, name in enumerate(names, 1)}
        for node in self.nodes.values():
            node.start()

    # --- time ---

    def at(self, delay_us: int, event: Callable[[], None]) -> None:
        """Run `event` in `delay_us`; events of one instant run in the order they were made."""
        self._numbers += 1
        heapq.heappush(self._events, (self.now_us + delay_us, self._numbers, event))

    def later(self, node: Node, delay_us: int, event: Callable[[Node], None]) -> None:
        """Run `event` on `node` if the same process then still runs; when it is paused, after it wakes."""
        life = node.life

        def run() -> None:
            if not node.running or node.life != life:
                return
            if node.paused_since is not None:
                self.at(10 * MS, run)
                return
            event(node)

        self.at(delay_us, run)

    def run(self, duration_us: int, until: Callable[[], bool] | None = None) -> bool:
        """Play events for `duration_us`, or until `until`; whether it came true."""
        end = self.now_us + duration_us
        while self._events and self._events[0][0] <= end:
            self.now_us, _, event = heapq.heappop(self._events)
            event()
            if until is not None and until():
                return True
        self.now_us = end
        return False

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now_us / MS:10.3f} ms  {text}")

    # --- the network ---

    def send(self, sender: Node, to: MemberId, message: bytes) -> None:
        if (sender.member, to) in self._cut or self.rng.random() < self.faults.loss:
            if self.rng.random() < 0.2:  # A transport may notice that it drops, or not.
                sender.engine.report_unreachable(to)
            return
        for _ in range(2 if self.rng.random() < self.faults.duplicates else 1):
            delay_us = self.rng.randint(*self.faults.delay_us)
            if self.rng.random() < self.faults.late:
                delay_us = self.rng.randint(0, self.faults.late_us)
            self.at(delay_us, lambda: self._deliver(sender.member, to, message))

    def _deliver(self, sender: MemberId, to: MemberId, message: bytes) -> None:
        if self.nodes[to].running:
            self.nodes[to].receive(sender, message)

    def connected(self, one: Node, other: Node) -> None:
        self.later(one, MS, lambda node: node.engine.peer_found(other.member))
        self.later(other, MS, lambda node: node.engine.peer_found(one.member))

    def sync_delay_us(self) -> int:
        if self.rng.random() < self.faults.stalls:
            return self.rng.randint(0, 200 * MS)
        return self.rng.randint(*self.faults.sync_us)

    # --- faults and load ---

    def play(self, duration_us: int, *, proposals: float = 100) -> None:
        """Run with the faults and with clients that propose `proposals` times a second."""
        end = self.now_us + duration_us
        actions: list[tuple[float, Callable[[], None]]] = [
            (proposals, self.propose_somewhere),
            (self.faults.crashes, self._crash_one),
            (self.faults.pauses, self._pause_one),
            (self.faults.cuts, self._cut_some),
            (self.faults.breaks, self._break_one),
            (self.faults.transfers, self._transfer_one),
            (proposals / 2, self._read_somewhere),
        ]

        def repeat(rate: float, action: Callable[[], None]) -> None:
            if self.now_us < end:
                action()
                self.at(1 + int(self.rng.expovariate(rate) * 1_000_000), lambda: repeat(rate, action))

        for rate, action in actions:
            if rate > 0:
                self.at(
                    int(self.rng.expovariate(rate) * 1_000_000), lambda rate=rate, action=action: repeat(rate, action)
                )
        self.run(duration_us)
        running = [node.engine for node in self.nodes.values() if node.running and not node.engine.installing]
        self.history.check_logs(running)

    def settle(self, bound_us: int = 5_000 * MS) -> None:
        """End all faults; the group must then commit a new entry, on every member, within `bound_us`."""
        self.faults = Faults()
        self._cut.clear()
        for node in self.nodes.values():
            if not node.running:
                node.start()
            elif node.paused_since is not None:
                node.wake()
        last = b"settled"

        def done() -> bool:
            return all(node.applied and node.applied[-1].data == last for node in self.nodes.values())

        def ask() -> None:
            for node in self.nodes.values():
                if node.leading_epoch and not (node.applied and node.applied[-1].data == last):
                    node.propose(last)
            self.at(100 * MS, ask)

        self.at(100 * MS, ask)
        if not self.run(bound_us, done):
            states = {name: (type(node.engine.role).__name__, node.engine.term) for name, node in self.nodes.items()}
            raise Broken(f"no progress within {bound_us // MS} ms without faults: {states}")
        self.history.check_logs([node.engine for node in self.nodes.values()])

    def propose_somewhere(self) -> None:
        self._serial += 1
        data = b"%d:" % self._serial + b"x" * self.rng.choice((0, 0, 10, 300))
        for node in self.awake():
            if isinstance(node.engine.role, Leader):
                node.propose(data)

    def _read_somewhere(self) -> None:
        """Whoever takes itself for the leader is asked, deposed ones too: that is the point."""
        node = self.rng.choice(list(self.nodes.values()))
        if not node.running or node.paused_since is not None or not isinstance(node.engine.role, Leader):
            return
        self.read_at(node)

    def read_at(self, node: Node) -> None:
        """A linearizable read, checked when it is served."""
        committed = len(self.history.committed)

        def served(ok: bool) -> None:
            if ok:
                self.reads_served += 1
                self.history.read(node.engine, committed)

        node.read(served)

    def _transfer_one(self) -> None:
        for node in self.awake():
            if isinstance(node.engine.role, Leader):
                node.engine.transfer(self.rng.choice(list(self.nodes)))
                node.pump()

    def awake(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.running and node.paused_since is None]

    def _crash_one(self) -> None:
        node = self.rng.choice(list(self.nodes.values()))
        leaders = [one for one in self.awake() if isinstance(one.engine.role, Leader)]
        if leaders and self.rng.random() < 0.3:
            node = self.rng.choice(leaders)
        if node.running:
            node.crash(power=self.rng.random() < 0.7)
            self.at(self.rng.randint(1, 300 * MS), lambda: None if node.running else node.start())

    def _pause_one(self) -> None:
        if awake := self.awake():
            node = self.rng.choice(awake)
            node.pause()
            life = node.life
            self.at(self.rng.randint(1, 600 * MS), lambda: self._wake(node, life))

    def _wake(self, node: Node, life: int) -> None:
        if node.running and node.life == life and node.paused_since is not None:
            node.wake()

    def _cut_some(self) -> None:
        names = list(self.nodes)
        side = set(self.rng.sample(names, self.rng.randint(0, len(names) - 1)))
        one_way = self.rng.random() < 0.3
        links = {(a, b) for a in names for b in names if a in side and b not in side}
        self._cut |= links if one_way else links | {(b, a) for a, b in links}
        self.at(self.rng.randint(1, 500 * MS), self._cut.clear)

    def _break_one(self) -> None:
        awake = self.awake()
        if len(awake) >= 2:
            one, other = self.rng.sample(awake, 2)
            one.lost(other.member)
            other.lost(one.member)
            self.connected(one, other)
