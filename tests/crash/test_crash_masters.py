"""Masters killed, stopped and cut off while jobs run: the job ends right, and nothing that was done is done again."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from pathlib import Path

import msgspec
import pytest

from jobrunner.api.handle import JobHandle
from jobrunner.control.messages import EndCause, JobStatus, MasterInfo
from jobrunner.ids import JobId, parse_job_id
from jobrunner.master.commands import EndSession
from jobrunner.testing.local import LocalCluster, descendants, wait_until
from tests.crash.cluster import (
    SETTINGS,
    Text,
    check_alone,
    check_output,
    cluster_for,
    entries,
    make_text,
    read_counts,
)
from tests.crash.faults import ENDED, count_commands, make_ready
from tests.crash.jobs import slow_reduce

TTL_S = SETTINGS["session.ttl_ms"] / 1000


@dataclass(frozen=True)
class Field:
    """What all cases share."""

    cluster: LocalCluster
    text: Text
    root: Path
    gates: dict[JobId, Path] = attribute(default_factory=dict)

    def new_output(self) -> Path:
        """A name in a directory of its own."""
        directory = self.root / f"case-{len(list(self.root.iterdir()))}"
        directory.mkdir()
        return directory / "out"

    def submit(self, *, map_s: float = 0.0, reduce_s: float = 0.0, gate: str = "") -> JobHandle:
        """8 maps of 3 * map_s, 4 reduces of 3 * reduce_s in all; those of the stage `gate` end after `open_gate`."""
        output = self.new_output()
        params: dict[str, object] = {"map_s": map_s, "reduce_s": reduce_s}
        if gate:
            params[f"{gate}_gate"] = str(output.with_name("gate"))
        handle = self.cluster.client.submit(
            slow_reduce, input=[self.text.directory], output=output, reducers=4, params=params
        )
        self.gates[handle.id] = output.with_name("gate")
        return handle

    def submit_until(self, stage: str, *, map_s: float = 0.0, reduce_s: float = 0.0, gate: str = "reduce") -> JobHandle:
        """A job of which `stage` runs, and which cannot end before `open_gate`, however slow this test is."""
        handle = self.submit(map_s=map_s, reduce_s=reduce_s, gate=gate)
        wait_until(lambda: has_started(handle.status(), stage), what=f"the start of {stage}")
        return handle

    def open_gate(self, handle: JobHandle) -> None:
        self.gates[handle.id].touch()

    def check(self, handle: JobHandle, *, timeout_s: float = 60.0) -> JobStatus:
        if handle.id in self.gates:
            self.open_gate(handle)
        status = handle.ended(timeout_s, tidy=True)
        check_output(self.cluster, status, self.text)
        return status


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("masters")
    text = make_text(root / "in", files=8, lines=60)
    with cluster_for(root) as cluster:
        yield Field(cluster, text, root)


@pytest.fixture
def field(shared: Field) -> Field:
    make_ready(shared.cluster)
    return shared


def has_started(status: JobStatus, stage: str) -> bool:
    """Attempts of the stage run or have run; the job has not ended."""
    assert status.state not in ENDED, f"it is over before it was struck: {status}"
    return any(each.running or each.done for each in status.stages if each.name == stage)


def assert_nothing_was_redone(status: JobStatus) -> None:
    """As many attempts as tasks: none was lost, none was started again."""
    for stage in status.stages:
        assert stage.attempts.get("started") == stage.tasks, f"{stage.name}: {stage.attempts} for {stage.tasks} tasks"


def assert_no_worker_was_lost(status: JobStatus) -> None:
    for stage in status.stages:
        assert EndCause.LOST_WORKER not in stage.attempts, f"{stage.name}: {stage.attempts}"


# --- the leader killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["map", "reduce"])
def test_a_killed_leader_costs_no_attempt(field: Field, stage: str) -> None:
    """Attempts go on without a leader, and what they report to the next one counts."""
    handle = field.submit_until(stage, map_s=0.1, reduce_s=0.3)
    field.cluster.kill_leader()
    assert_nothing_was_redone(field.check(handle))


def test_two_leaders_killed_in_one_job_cost_no_attempt(field: Field) -> None:
    """The second leader's memory is as good as the first's, and the restarted master has caught up to vote."""
    handle = field.submit_until("map", gate="map")
    for _ in range(2):
        field.cluster.kill_leader()
        make_ready(field.cluster)
        assert handle.status().stages[0].running
    assert_nothing_was_redone(field.check(handle))


def test_a_leader_killed_while_many_short_tasks_run_loses_none(field: Field) -> None:
    """Short tasks are assigned ahead: what was promised to workers but not yet told is told by the next leader."""
    many = replace(field, text=make_text(field.new_output().with_name("in"), files=100, lines=20, slow=1))
    handle = many.submit_until("map", map_s=0.005)
    field.cluster.kill_leader()
    many.check(handle)


# --- stopped, and woken ----------------------------------------------------------------------------------------------


@contextmanager
def paused(cluster: LocalCluster, *slots: int) -> Iterator[None]:
    """These masters stopped."""
    pids = [pid for slot in slots for pid in cluster.pause(cluster.masters[slot])]
    try:
        yield
    finally:
        cluster.resume(pids)


def test_a_stopped_leader_is_replaced_and_wakes_as_a_follower(field: Field) -> None:
    """Longer than any lease; its sockets stay open, so only silence tells. Awake, it must expire nobody."""
    ended_before = count_commands(field.cluster, EndSession)
    handle = field.submit_until("map", map_s=0.3)
    leader = field.cluster.leader().id
    with paused(field.cluster, leader):
        status = field.check(handle)
        assert field.cluster.leader().id != leader
        time.sleep(TTL_S + 0.5)
    make_ready(field.cluster)
    assert_nothing_was_redone(status)
    assert count_commands(field.cluster, EndSession) == ended_before, "a worker was expired"
    field.check(field.submit())


def test_a_stopped_follower_is_not_missed_and_catches_up(field: Field) -> None:
    """Many election time-outs long: it must not take the leadership away when it wakes, nor hold anybody up."""
    ended_before = count_commands(field.cluster, EndSession)
    leader, epoch = field.cluster.leader().id, field.cluster.status().epoch
    follower = next(master.id for master in field.cluster.masters if master.id != leader)
    with paused(field.cluster, follower):
        status = field.check(field.submit(map_s=0.3))
        time.sleep(3 * TTL_S)
    assert_nothing_was_redone(status)
    applied = {master.id: master.applied_index for master in field.cluster.status().masters}[leader]
    wait_until(lambda: field.cluster.status().masters[follower].applied_index >= applied, what="catching up")
    info = field.cluster.status()
    assert (info.leader, info.epoch) == (leader, epoch), "the woken follower has disturbed the leader"
    assert count_commands(field.cluster, EndSession) == ended_before


def test_all_masters_stopped_for_longer_than_a_lease_expire_nobody(field: Field) -> None:
    """A suspended host: no time passes for leases while nobody can listen."""
    ended_before = count_commands(field.cluster, EndSession)
    handle = field.submit_until("map", map_s=0.3, reduce_s=0.3)
    with paused(field.cluster, 0, 1, 2):
        field.open_gate(handle)
        time.sleep(2.5 * TTL_S)
    status = field.check(handle)
    assert_no_worker_was_lost(status)
    assert_nothing_was_redone(status)
    assert count_commands(field.cluster, EndSession) == ended_before


# --- without a quorum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["leader", "follower"])
def test_without_a_quorum_nothing_is_decided_and_with_one_the_job_ends(field: Field, left: str) -> None:
    """A minority that decided anything could decide otherwise than the majority that comes back."""
    handle = field.submit_until("map", map_s=0.3, reduce_s=0.3)
    leader = field.cluster.leader().id
    survivor = leader if left == "leader" else (leader + 1) % 3
    output = Path(handle.status().output)
    for slot in {0, 1, 2} - {survivor}:
        field.cluster.kill_master(slot)
    field.open_gate(handle)
    time.sleep(0.5)  # What was decided before may still be learned.
    before = commit_index(field.cluster, survivor)
    time.sleep(1.5 * TTL_S)
    assert commit_index(field.cluster, survivor) == before
    assert not output.exists()
    make_ready(field.cluster)
    status = field.check(handle)
    assert_no_worker_was_lost(status)
    assert_nothing_was_redone(status)


def commit_index(cluster: LocalCluster, slot: int) -> int:
    """What one master says of itself, leader or not."""
    request = urllib.request.Request(
        f"http://{cluster.masters[slot].address}/member", headers={"Authorization": f"Bearer {cluster.cluster.token}"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        return msgspec.json.decode(answer.read(), type=MasterInfo).commit_index


# --- everything down -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["map", "reduce"])
def test_a_job_survives_the_death_of_all_masters(field: Field, stage: str) -> None:
    """All that they knew is in their logs, and the workers waited."""
    handle = field.submit_until(stage, map_s=0.2, reduce_s=0.3)
    for slot in range(3):
        field.cluster.kill_master(slot)
    field.open_gate(handle)
    field.cluster.start_missing()
    status = field.check(handle)
    assert_no_worker_was_lost(status)
    assert_nothing_was_redone(status)


@pytest.mark.parametrize("stage", ["map", "reduce"])
def test_a_job_survives_the_death_of_every_process(field: Field, stage: str) -> None:
    """A power cut, but for what the disks had not written: finished maps are offered again, not all made again."""
    handle = field.submit_until(stage, map_s=0.1, reduce_s=0.3)
    wait_until(lambda: handle.status().stages[0].done, what="the first map")
    for slot in range(3):
        field.cluster.kill_master(slot)
    for worker in field.cluster.workers:
        field.cluster.kill_worker(worker.id)
    field.cluster.start_missing()
    maps = field.check(handle).stages[0]
    if stage == "reduce":  # The first worker back may take over maps of one that is still starting.
        assert maps.attempts["started"] < 2 * maps.tasks, maps.attempts


# --- the client ------------------------------------------------------------------------------------------------------

JOBS = Path(__file__).with_name("jobs.py")


def command(words: list[str], **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "jobrunner", *words],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("point", ["client.submit.before", "client.submit.after"])
def test_a_client_killed_while_submitting_may_submit_again(field: Field, point: str) -> None:
    """It cannot know whether the job was accepted; with its job id the answer is one job, once."""
    output, id = field.new_output(), str(uuid.uuid4())
    words = ["submit", f"{JOBS}:wordcount", str(field.text.directory), "--output", str(output), "--job-id", id,
             "--reducers", "3", "--dir", str(field.cluster.directory)]  # fmt: skip
    killed = command(words, JOBRUNNER_FAILPOINTS=f"{point}=kill")
    assert killed.returncode == -signal.SIGKILL, killed
    assert not killed.stdout
    job = parse_job_id(id)
    assert (job in {each.id for each in field.cluster.client.jobs()}) == (point == "client.submit.after")
    again = command(words)
    assert (again.returncode, again.stdout.strip()) == (0, job), again
    waited = command(["wait", job, "--timeout", "60", "--dir", str(field.cluster.directory)])
    assert waited.returncode == 0, waited
    field.check(field.cluster.client.job(job))
    assert [each.id for each in field.cluster.client.jobs()].count(job) == 1


# --- an embedded run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """`jobrunner run` as a job of a shell: a process group of its own in this session."""

    process: "subprocess.Popen[str]"
    output: Path
    temporary: Path

    def wait_running(self) -> list[int]:
        """Until user code has run; returns all its processes."""
        wait_until(lambda: entries(self.temporary, "jobrunner-*/worker-0/blocks/*/**/*"), what="the first map")
        return [self.process.pid, *descendants(self.process.pid)]

    def end(self) -> tuple[str, str]:
        return self.process.communicate(timeout=60)


@contextmanager
def embedded_run(field: Field, **params: float) -> Iterator[Embedded]:
    output = field.new_output()
    temporary = output.with_name("tmp")
    temporary.mkdir()
    words = ["run", f"{JOBS}:slow_reduce", str(field.text.directory), "--output", str(output), "--slots", "2",
             "--set", "input.split_files_max=1", "--set", "session.ttl_ms=2000"]  # fmt: skip
    for name, value in params.items():
        words += ["--param", f"{name}={value}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobrunner", *words],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        yield Embedded(process, output, temporary)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP])
def test_an_embedded_run_goes_on_after_ctrl_z_and_fg(field: Field, number: signal.Signals) -> None:
    """All its processes stop and wake together, after longer than a lease: nobody is lost, nothing runs twice."""
    with embedded_run(field, map_s=0.1) as run:
        run.wait_running()
        os.killpg(run.process.pid, number)
        wait_until(lambda: os.waitid(os.P_PID, run.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT))
        time.sleep(TTL_S + 1)
        os.killpg(run.process.pid, signal.SIGCONT)
        out, err = run.end()
        assert run.process.returncode == 0, (out, err)
        assert read_counts(run.output) == field.text.counts
        check_alone(run.output)
        assert not list(run.temporary.iterdir())


def test_ctrl_c_ends_an_embedded_run_and_leaves_nothing(field: Field) -> None:
    """130, no output, no process; its directory is gone or named."""
    with embedded_run(field, map_s=0.5) as run:
        pids = run.wait_running()
        os.killpg(run.process.pid, signal.SIGINT)
        out, err = run.end()
        assert run.process.returncode == 130, (out, err)
        assert not run.output.exists()
        wait_until(lambda: not [path for path in run.output.parent.iterdir() if ".jr-" in path.name], timeout_s=5)
        check_alone(run.output)
        wait_until(lambda: all(gone(pid) for pid in pids), timeout_s=5, what="the end of its processes")
        assert all(str(path) in err for path in run.temporary.iterdir()), err


# --- cut off ---------------------------------------------------------------------------------------------------------

# The network as this worker sees it: masters are reached through `proxy`, whatever address they are known by.
CUT_WORKER = """
import os
import sys
from jobrunner.rpc import dialing
dial = dialing._upgrade
routes = dict(pair.split("=") for pair in os.environ["ROUTES"].split(","))
async def upgrade(session, address, settings):
    return await dial(session, routes.get(address, address), settings)
dialing._upgrade = upgrade
from jobrunner.cli import main
main()
"""


class Proxy:
    """Forwards TCP connections until `cut`; then nothing passes, and nobody is told."""

    def __init__(self, addresses: list[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        made = asyncio.run_coroutine_threadsafe(self._listen(addresses), self._loop)
        self.routes: dict[str, str] = made.result(10)

    async def _listen(self, addresses: list[str]) -> dict[str, str]:
        self._open.set()
        routes = {}
        for address in addresses:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str = address) -> None:
                host, _, port = target.rpartition(":")
                try:
                    there_reader, there_writer = await asyncio.open_connection(host, int(port))
                except OSError:
                    writer.close()
                    return
                await asyncio.gather(
                    self._pump(reader, there_writer), self._pump(there_reader, writer), return_exceptions=True
                )

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            routes[address] = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return routes

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.close()

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@pytest.fixture
def proxy(field: Field) -> Iterator[Proxy]:
    made = Proxy([master.address for master in field.cluster.masters])
    yield made
    made.close()


@contextmanager
def worker_behind(proxy: Proxy, cluster: LocalCluster) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of the cluster started by hand, whose way to the masters is the proxy."""
    words = ["worker", "--config", str(cluster.directory / "cluster.toml"), "--id", "9"]
    env = {**os.environ, "PYTHONHASHSEED": str(cluster.cluster.file.hash_seed),
           "ROUTES": ",".join(f"{real}={here}" for real, here in proxy.routes.items())}  # fmt: skip
    (cluster.directory / "worker-9").mkdir()
    with open(cluster.directory / "worker-9" / "worker.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", CUT_WORKER, *words], env=env, stdout=log, stderr=log)
    try:
        wait_until(lambda: worker_state(cluster, process.pid) == "live", what="its session")
        yield process
    finally:
        process.terminate()
        process.wait(20)


def worker_state(cluster: LocalCluster, pid: int) -> str:
    return next((worker.state for worker in cluster.status().workers if worker.pid == pid), "")


def test_a_worker_cut_from_the_masters_but_not_from_the_disk_publishes_nothing(field: Field, proxy: Proxy) -> None:
    """It finishes what it runs and can write where the others write; only a seal would make that count."""
    with worker_behind(proxy, field.cluster) as process:
        handle = field.submit_until("reduce", reduce_s=1.0)

        def runs_a_reduce() -> bool:
            workers = [worker for worker in field.cluster.status().workers if worker.pid == process.pid]
            return any("/reduce/" in attempt for worker in workers for attempt in worker.running)

        wait_until(runs_a_reduce, what="a reduce behind the proxy")
        info = next(worker for worker in field.cluster.status().workers if worker.pid == process.pid)
        theirs = {attempt for attempt in info.running if "/reduce/" in attempt}
        proxy.cut()
        status = field.check(handle)
        assert worker_state(field.cluster, process.pid) == "lost"
        sealed = {str(a.attempt) for a in handle.attempts() if a.state == "done" and a.attempt.stage == "reduce"}
        assert sealed and not theirs & sealed
        time.sleep(1.0)  # It is still at it, or has nothing left to do.
        proxy.mend()
        wait_until(lambda: worker_state(field.cluster, process.pid) == "live", what="its next session")
        check_output(field.cluster, status, field.text)
        field.check(field.submit())
