"""The whole control plane in one thread, from one seed: masters on Raft and faulty disks, workers, clients, output.

    clients ── SubmitJob, KillJob ──► masters: Engine, Store, MasterState, Leader ◄── Beat, Report ── workers: Attempts
                                                     └── Instruct ─────────────────────────────────────────►┘
    all of it over one network that loses, doubles, delays and reorders, and isolates some from others

`RaftWorld` gives time, the masters' network, crashes and stops; here come the workers and clients, and their faults.
`play` for a while, then `finish` with all faults off: every job must then end and become tidy within a bound.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jobrunner.ids import JobId, job_id_from_number
from jobrunner.raft.engine import Engine
from jobrunner.raft.settings import RaftSettings
from jobrunner.spec.settings import SessionSection, Settings
from tests.simulation.control_client import SimClient, SimJob
from tests.simulation.control_history import ControlHistory, state_bytes
from tests.simulation.control_master import Master
from tests.simulation.control_network import Actor, Deliver
from tests.simulation.control_outputs import Outputs
from tests.simulation.control_worker import SimWorker
from tests.simulation.raft_history import Broken
from tests.simulation.raft_world import MS, Faults, Node, RaftWorld

PLAY_US = 4_000 * MS
BOUND_US = 20_000 * MS


@dataclass(frozen=True)
class ControlFaults(Faults):
    """Beside those of Raft. Rates are per second for all workers together, shares are of attempts."""

    worker_crashes: float = 0.0
    worker_pauses: float = 0.0
    worker_cuts: float = 0.0  # A worker is isolated from all masters, not from other workers, for more than its lease.
    kills: float = 0.0
    failures: float = 0.0
    corruption: float = 0.0  # Of blocks read.
    refusals: float = 0.0  # Of publications.
    write_crashes: float = 0.0  # Of writes to a master's log.
    slow: float = 0.0  # Of attempts: they take longer than a lease.
    fickle: float = 0.0  # Of jobs: their maps are not deterministic.

    @classmethod
    def draw(cls, rng: Random) -> "ControlFaults":
        def some(most: float) -> float:
            return rng.choice((0.0, most / 4, most))

        return cls(
            loss=some(0.15), duplicates=some(0.2), delay_us=(50, rng.choice((500, 5 * MS))), late=some(0.1),
            late_us=rng.choice((50, 300, 1000)) * MS, stalls=some(0.05), crashes=some(2), pauses=some(1), cuts=some(2),
            breaks=some(2), lose_all=rng.random() < 0.3, worker_crashes=some(2), worker_pauses=some(2), kills=some(0.5),
            failures=some(0.15), corruption=some(0.02), refusals=some(0.3), write_crashes=some(0.01), slow=some(0.1),
            fickle=some(0.8), worker_cuts=some(0.5),
        )  # fmt: skip


def draw_raft(rng: Random) -> RaftSettings:
    return RaftSettings(
        heartbeat_ms=rng.choice((25, 50)), election_ms=rng.choice((150, 250)),
        append_bytes_max=rng.choice((400, 65_536)), bulk_bytes_max=20_000, inflight_max=rng.choice((1, 8, 64)),
        proposals_bytes_max=rng.choice((5_000, 1_000_000)), segment_bytes_max=rng.choice((1_000, 16_000_000)),
        cache_bytes_max=rng.choice((2_000, 1_000_000)), sync_hang_ms=150,
    )  # fmt: skip


class ControlWorld(RaftWorld):
    node_class = Master
    nodes: dict[str, Master]  # type: ignore[assignment]
    attempt_timeout_s = 2.0

    def __init__(
        self, seed: int, *, faults: ControlFaults | None = None, members: int | None = None,
        engine_class: type[Engine] = Engine,
    ) -> None:  # fmt: skip
        draw = Random(f"control {seed}")
        self.marks: Counter[str] = Counter()
        self.control = ControlHistory(self)
        self.outputs = Outputs(self.control.newest.get)
        self.cluster_settings = Settings(session=SessionSection(ttl_ms=draw.choice((400, 800)), beat_ms=100))
        self.workers: dict[str, SimWorker] = {}
        self.clients: list[SimClient] = []
        self._jobs: dict[JobId, SimJob] = {}
        self._arrived: dict[tuple[str, str], int] = {}
        self._sent = 0
        super().__init__(
            seed, members=members, faults=faults or ControlFaults.draw(draw), settings=draw_raft(draw),
            engine_class=engine_class,
        )  # fmt: skip
        for number in range(self.rng.randint(2, 4)):
            self.workers[f"w{number}"] = SimWorker(self, f"w{number}", number)
        self.clients = [SimClient(self, f"c{number}") for number in range(2)]
        for worker in self.workers.values():
            worker.start()

    @property
    def masters(self) -> list[Master]:
        return list(self.nodes.values())

    def actors(self) -> list[Actor]:
        return [*self.workers.values(), *self.clients]

    def job(self, id: JobId) -> SimJob:
        return self._jobs[id]

    def mark(self, what: str) -> None:
        self.marks[what] += 1

    # --- the network -------------------------------------------------------------------------------------------------

    def carry(self, sender: str, target: Actor | Master, deliver: Deliver) -> None:
        """One message, with what may happen to it."""
        name, rng, faults = target.name, self.rng, self.faults
        if (sender, name) in self._cut or rng.random() < faults.loss:
            self.mark("message lost")
            return
        copies = 1
        if rng.random() < faults.duplicates:
            self.mark("message doubled")
            copies = 2
        self._sent += 1
        number = self._sent
        for _ in range(copies):
            delay_us = rng.randint(*faults.delay_us)
            if rng.random() < faults.late:
                delay_us = rng.randint(0, faults.late_us)
            self.at(delay_us, lambda: self._arrive(sender, target, number, deliver))

    def _arrive(self, sender: str, target: Actor | Master, number: int, deliver: Deliver) -> None:
        if not target.running:
            return
        if number < self._arrived.get((sender, target.name), 0):
            self.mark("message overtaken")
        else:
            self._arrived[sender, target.name] = number
        if target.paused_since is not None:
            target.mail.append(deliver)
        else:
            deliver()

    def reaches(self, reader: SimWorker, source: SimWorker) -> bool:
        """Whether a block can be fetched now."""
        cut = {(reader.name, source.name), (source.name, reader.name)} & self._cut
        return reader is source or (source.running and source.paused_since is None and not cut)

    # --- how long things take ----------------------------------------------------------------------------------------

    def task_us(self, *, is_map: bool = False) -> int:
        if self.rng.random() < self._control_faults.slow / (4 if is_map else 1):
            return self.rng.randint(500 * MS, 1_200 * MS)
        return self.rng.randint(2 * MS, 60 * MS)

    def step_us(self) -> int:
        if self.rng.random() < self._control_faults.slow:
            return self.rng.randint(200 * MS, 1_200 * MS)
        return self.rng.randint(MS, 30 * MS)

    @property
    def _control_faults(self) -> ControlFaults:
        assert isinstance(self.faults, ControlFaults)
        return self.faults

    # --- faults and load ---------------------------------------------------------------------------------------------

    def play_all(self, duration_us: int = PLAY_US) -> None:
        """Jobs and faults for `duration_us`."""
        end, faults = self.now_us + duration_us, self._control_faults
        for number in range(self.rng.randint(3, 6)):
            job = self._draw_job(number)
            client = self.rng.choice(self.clients)
            self.at(self.rng.randint(0, duration_us // 2), lambda client=client, job=job: client.submit(job))
        actions: list[tuple[float, Callable[[], None]]] = [
            (faults.worker_crashes, self._crash_worker),
            (faults.worker_pauses, self._pause_worker),
            (faults.worker_cuts, self._cut_worker),
            (faults.kills, self._kill_job),
        ]

        def repeat(rate: float, action: Callable[[], None], *, first: bool = False) -> None:
            if self.now_us < end:
                if not first:
                    action()
                self.at(1 + int(self.rng.expovariate(rate) * 1_000_000), lambda: repeat(rate, action))

        for rate, action in actions:
            if rate > 0:
                repeat(rate, action, first=True)
        self.play(duration_us, proposals=0)

    def _draw_job(self, number: int) -> SimJob:
        rng = self.rng
        job = SimJob(
            job_id_from_number(self.seed << 8 | number), f"/out{rng.randint(0, 5)}", maps=rng.randint(1, 6),
            reduces=rng.choice((0, 1, 2, 3, 4)), fickle=rng.random() < self._control_faults.fickle,
            faults_max=rng.choice((2, 4)),
        )  # fmt: skip
        self._jobs[job.id] = job
        return job

    def _crash_worker(self) -> None:
        running = [worker for worker in self.workers.values() if worker.running]
        if not running:
            return
        worker = self.rng.choice(running)
        worker.crash(power=self.rng.random() < 0.3)
        self.mark("worker crash")
        if self.rng.random() < 0.5:
            for master in self.awake():
                master.probe(worker.name)  # type: ignore[attr-defined]
        life = worker.life
        self.at(self.rng.randint(1, 1_000 * MS), lambda: worker.start() if worker.life == life else None)

    def _pause_worker(self) -> None:
        awake = [worker for worker in self.workers.values() if worker.running and worker.paused_since is None]
        if awake:
            worker = self.rng.choice(awake)
            worker.pause()
            self.mark("worker pause")
            life = worker.life
            self.at(self.rng.randint(1, 1_500 * MS), lambda: self._wake_worker(worker, life))

    def _wake_worker(self, worker: SimWorker, life: int) -> None:
        if worker.life == life and worker.paused_since is not None:
            worker.wake()

    def _cut_worker(self) -> None:
        name = self.rng.choice(list(self.workers))
        links = {link for master in self.nodes for link in ((name, master), (master, name))}
        self._cut |= links  # type: ignore[arg-type]
        ttl_us = self.cluster_settings.session.ttl_ms * MS
        self.at(ttl_us + self.rng.randint(0, ttl_us), lambda: self._cut.difference_update(links))  # type: ignore[arg-type]

    def _kill_job(self) -> None:
        choices = [(client, job) for client in self.clients for job in client.jobs if job.id in client.acknowledged]
        if choices:
            client, job = self.rng.choice(choices)
            client.kill(job)

    def crashes_at_write(self) -> bool:
        return self._control_faults.write_crashes > 0 and self.rng.random() < self._control_faults.write_crashes

    def crash(self, node: Node) -> None:
        if node.running:
            node.crash(power=True)
            self.at(self.rng.randint(1, 300 * MS), lambda: None if node.running else node.start())

    def _cut_some(self) -> None:
        """Isolate some masters, workers and clients from the others, both ways or one."""
        names = [*self.nodes, *self.workers, *(client.name for client in self.clients)]
        side = set(self.rng.sample(names, self.rng.randint(1, len(names) - 1)))
        one_way = self.rng.random() < 0.3
        links = {(a, b) for a in names for b in names if a in side and b not in side}
        self._cut |= links if one_way else links | {(b, a) for a, b in links}  # type: ignore[arg-type]
        self.mark("one way isolated" if one_way else "isolated")
        self.at(self.rng.randint(1, 1_000 * MS), self._cut.clear)

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, bound_us: int = BOUND_US) -> None:
        """End all faults; every job must then end and become tidy, and every slot and queue be empty."""
        self.faults = ControlFaults()
        self._cut.clear()
        for node in self.masters:
            if not node.running:
                node.start()
            elif node.paused_since is not None:
                node.wake()
        for worker in self.workers.values():
            if not worker.running:
                worker.start()
            elif worker.paused_since is not None:
                worker.wake()
        self.note("faults end")
        start_us = self.now_us
        if not self._run_until(bound_us, lambda: not self._unfinished()):
            raise Broken(f"{bound_us // MS} ms without faults, and still: {'; '.join(self._unfinished())}")
        self.note(f"all is tidy after {(self.now_us - start_us) // MS} ms")
        self.history.check_logs([node.engine for node in self.masters])

    def _run_until(self, bound_us: int, done: Callable[[], bool]) -> bool:
        end = self.now_us + bound_us
        while self.now_us < end:
            self.run(50 * MS)
            if done():
                return True
        return False

    def _unfinished(self) -> list[str]:
        waits = [
            f"{job.id} of {client.name} ({self.control.newest.get(job.id)})"
            for client in self.clients for job in client.jobs if job.id not in client.tidy
        ]  # fmt: skip
        for worker in self.workers.values():
            held = worker.core.held()
            if held or worker.core.reports(1) or not worker.core.session:
                waits.append(f"{worker.name} holds {held} in session {worker.core.session}")
            elif any(slot.run for slot in worker.slots.values()):
                waits.append(f"{worker.name} runs in its slots what nobody waits for")
            elif worker.blocks and not waits:
                waits.append(f"{worker.name} keeps blocks {sorted(worker.blocks)}")
        states = {node.engine.applied_index: state_bytes(node.state) for node in self.masters}
        if not waits and (len({node.engine.applied_index for node in self.masters}) > 1 or len(states) > 1):
            waits.append("the masters are not at one place")
        return waits


def play_seed(seed: int) -> ControlWorld:
    world = ControlWorld(seed)
    world.play_all()
    world.finish()
    return world
