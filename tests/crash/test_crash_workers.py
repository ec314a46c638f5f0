"""Workers killed, stopped and woken, their disks damaged and full: the job goes on, and its output is right."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobrunner.api.client import Client
from jobrunner.api.handle import JobHandle
from jobrunner.api.job import Job
from jobrunner.control.messages import JobState, StageStatus
from jobrunner.testing.local import LocalCluster, descendants, wait_until
from tests.crash.bad_jobs import Gate, held, large, random_map
from tests.crash.cluster import Text, check_alone, check_output, cluster_for, make_text

MAPS = 8
EACH_FILE_A_MAP = {"input.split_files_max": 1}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two workers of two slots; one master is a group of one."""
    with cluster_for(tmp_path_factory.mktemp("workers"), masters=1, workers=2, slots=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: LocalCluster) -> LocalCluster:
    running.start_missing()
    return running


@pytest.fixture(scope="module")
def running_paused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """As `running`, but each slot stops when its first reduce starts, before it fetches anything."""
    path = tmp_path_factory.mktemp("paused")
    env = {"JOBRUNNER_FAILPOINTS": "reduce.start=pause"}
    with cluster_for(path, masters=1, workers=2, slots=2, env=env) as cluster:
        yield cluster


@pytest.fixture
def pausing(running_paused: LocalCluster) -> LocalCluster:
    running_paused.start_missing()
    return running_paused


class Run:
    """One job of MAPS maps: its input, its gate, its handle."""

    def __init__(
        self, cluster: LocalCluster, path: Path, *hold: str, job: Job = held, reducers: int = 4, slow: int = 4
    ) -> None:
        self.cluster = cluster
        self.output = path / "out"
        self.gate = Gate(path / "gate", *hold)
        self.text = make_text(path / "in", files=MAPS, lines=60, slow=slow)
        with Client.from_dir(cluster.directory, settings=EACH_FILE_A_MAP) as client:
            id = client.submit(
                job, input=self.text.directory, output=self.output, reducers=reducers, params=self.gate.params
            ).id
        self.handle: JobHandle = cluster.client.job(id)

    def stage(self, name: str) -> StageStatus:
        return next(stage for stage in self.handle.status().stages if stage.name == name)

    def wait_for(self, name: str, condition: Callable[[StageStatus], bool], what: str) -> None:
        wait_until(lambda: condition(self.stage(name)), timeout_s=30, what=what)

    def wait_at_gate(self, stage: str, count: int) -> None:
        wait_until(lambda: len(self.gate.pids(stage)) >= count, what=f"{count} of {stage} at the gate")

    def check(self, text: Text | None = None) -> dict[str, StageStatus]:
        """The job commits, and its output is right. Returns its stages."""
        status = self.handle.ended(60, tidy=True)
        check_output(self.cluster, status, text or self.text)
        return {stage.name: stage for stage in status.stages}


def stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def stopped_slots(cluster: LocalCluster, number: int) -> list[int]:
    daemon = cluster.workers[number]
    return [pid for pid in descendants(daemon.pid) if stopped(pid)] if daemon.alive else []


def wake_slots(cluster: LocalCluster) -> None:
    for number in range(len(cluster.workers)):
        for pid in stopped_slots(cluster, number):
            os.kill(pid, signal.SIGCONT)


def wake_until_ended(run: Run) -> None:
    """Wake every slot that stops at the failpoint, until the job has ended."""

    def ended() -> bool:
        wake_slots(run.cluster)
        return run.handle.status().state in (JobState.COMMITTED, JobState.FAILED)

    wait_until(ended, timeout_s=60, what="the end of the job")


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_worker_killed_while_maps_run(cluster: LocalCluster, tmp_path: Path) -> None:
    """The commonest loss: its maps run elsewhere, and nobody is charged."""
    run = Run(cluster, tmp_path, "map")
    run.wait_at_gate("map", 4)
    cluster.kill_worker(0)
    run.wait_for("map", lambda stage: stage.attempts["lost"] == 2, "the loss of two maps")
    run.gate.open("map")
    stages = run.check()
    assert stages["map"].attempts["started"] == MAPS + 2
    assert stages["map"].attempts["failed"] == 0


def test_a_worker_killed_before_its_output_was_fetched(pausing: LocalCluster, tmp_path: Path) -> None:
    """Finished maps run again; reducers that need them fill all slots, and must make room."""
    run = Run(pausing, tmp_path)
    wait_until(
        lambda: len(stopped_slots(pausing, 0)) == 2 and len(stopped_slots(pausing, 1)) == 2, what="four stopped reduces"
    )
    assert run.stage("map").done == MAPS
    pausing.kill_worker(0)
    wake_until_ended(run)
    stages = run.check()
    assert stages["map"].attempts["started"] > MAPS
    assert stages["reduce"].attempts["failed"] == 0


def test_a_worker_killed_while_all_slots_reduce(cluster: LocalCluster, tmp_path: Path) -> None:
    """Reduces with all their input go on while lost maps wait for their slots: no deadlock, nothing redone."""
    run = Run(cluster, tmp_path, "reduce", reducers=6, slow=6)
    run.wait_at_gate("reduce", 4)
    cluster.kill_worker(1)
    run.wait_for("reduce", lambda stage: stage.attempts["lost"] == 2, "the loss of two reduces")
    run.wait_for("map", lambda stage: stage.done < MAPS, "maps that are open again")
    time.sleep(0.5)  # Were the two reduces that are left to be restarted, it would be now.
    run.gate.open("reduce")
    stages = run.check()
    assert stages["reduce"].attempts["started"] == 6 + 2
    assert stages["reduce"].attempts.get("lost_input", 0) == 0
    assert stages["map"].attempts["started"] > MAPS


def test_the_only_worker_killed(tmp_path: Path) -> None:
    """No worker at all is a time to wait, not a failure; and what the dead one finished is still on its disk."""
    with cluster_for(tmp_path, masters=1, workers=1, slots=2) as cluster:
        run = Run(cluster, tmp_path / "restarted", "reduce")
        run.wait_at_gate("reduce", 2)
        cluster.kill_worker(0)
        wait_until(lambda: "none is alive" in (run.handle.status().waiting_for or ""), what="a job without workers")
        run.gate.open("reduce")
        cluster.start_missing()
        stages = run.check()
        assert stages["map"].attempts["started"] == MAPS, "finished maps ran again"

        run = Run(cluster, tmp_path / "joined", "map")
        run.wait_at_gate("map", 2)
        cluster.kill_worker(0)
        shutil.rmtree(cluster.directory / "worker-0" / "blocks")
        wait_until(lambda: "none is alive" in (run.handle.status().waiting_for or ""), what="a job without workers")
        run.gate.open("map")
        cluster.start_missing(workers=2)
        run.check()


# --- stopped and woken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots_first", [False, True])
def test_a_worker_that_wakes_changes_nothing(cluster: LocalCluster, tmp_path: Path, slots_first: bool) -> None:
    """It was lost long ago, its job is committed and its output replaced: all it may do is delete what is its own."""
    first = Run(cluster, tmp_path, "reduce")
    first.wait_at_gate("reduce", 4)
    zombie = cluster.workers[0]
    pids = cluster.pause(zombie)
    first.gate.open("reduce")
    first.check()
    with Client.from_dir(cluster.directory, settings=EACH_FILE_A_MAP) as client:
        text = make_text(tmp_path / "in2", files=3, lines=20)
        params = first.gate.params
        second = client.submit(
            held, input=text.directory, output=first.output, reducers=2, params=params, if_exists="replace"
        )
        check_output(cluster, second.ended(60, tidy=True), text)
    before = hashes(first.output)
    if slots_first:  # They write to their ends, and ask for a seal, before the agent hears that its session is over.
        cluster.resume(pids[1:])
        time.sleep(1.0)
        assert hashes(first.output) == before
    cluster.resume(pids)
    wait_until(lambda: state_of(cluster, 0) == "live", what="the woken worker's new session")
    home = cluster.directory / "worker-0"
    wait_until(
        lambda: not [path for path in home.glob(f"*/{first.handle.id}*") if path.parent.name != "answers"],
        what="the end of the zombie's files",
    )
    assert hashes(first.output) == before
    time.sleep(2.0)
    assert hashes(first.output) == before
    check_alone(first.output)
    assert not [pid for pid in pids if pid != zombie.pid and first.handle.id in command_of(pid)]
    cluster.kill_worker(1)
    third = Run(cluster, tmp_path / "third")
    third.check()


def test_a_set_up_that_wakes_after_the_job_leaves_nothing(cluster: LocalCluster, tmp_path: Path) -> None:
    """It makes the stage of a job that is over and cleaned up: nobody else will ever look there again."""
    cluster.kill_worker(0)
    cluster.start_missing(env={"JOBRUNNER_FAILPOINTS": "commit.setup.before=pause"})
    cluster.kill_worker(1)  # So that its session is the younger one: the set-up goes to the other.
    cluster.start_missing(env={})
    run = Run(cluster, tmp_path)
    wait_until(lambda: stopped_slots(cluster, 0), what="a stopped set-up")
    slots = stopped_slots(cluster, 0)
    pids = cluster.pause(cluster.workers[0])
    run.handle.kill()
    assert run.handle.ended(30, tidy=True).state == JobState.KILLED
    check_alone(run.output)
    cluster.resume(slots)
    wait_until(lambda: [path for path in tmp_path.iterdir() if ".jr-" in path.name], what="the stage made again")
    cluster.resume(pids)
    wait_until(lambda: not [path for path in tmp_path.iterdir() if ".jr-" in path.name], what="its clean-up")
    wait_until(lambda: state_of(cluster, 0) == "live", what="the woken worker's new session")
    cluster.kill_worker(0)  # Its failpoint with it.
    time.sleep(0.5)
    check_alone(run.output)


def state_of(cluster: LocalCluster, number: int) -> str:
    return next((worker.state for worker in cluster.status().workers if worker.id == number), "")


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


# --- disks -----------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    """In the first partition that holds anything."""
    data = bytearray(path.read_bytes())
    data[64] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip_a_byte, Path.unlink])
def test_damaged_map_output_is_made_again(pausing: LocalCluster, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """A bad disk under one map's output costs that map, and no reducer is blamed for it."""
    run = Run(pausing, tmp_path)
    wait_until(
        lambda: len(stopped_slots(pausing, 0)) == 2 and len(stopped_slots(pausing, 1)) == 2, what="four stopped reduces"
    )
    for number in (0, 1):
        blocks = sorted((pausing.directory / f"worker-{number}" / "blocks" / run.handle.id).rglob("*.jrb"))
        harm(blocks[0])
    wake_until_ended(run)
    stages = run.check()
    assert stages["map"].attempts["started"] == MAPS + 2
    assert stages["reduce"].attempts["failed"] == 0


def test_a_map_that_is_not_deterministic_fails_once_something_is_sealed(cluster: LocalCluster, tmp_path: Path) -> None:
    """Half of the output would be of one run of the map, half of another."""
    run = Run(cluster, tmp_path, "reduce", job=random_map, reducers=8, slow=6)
    run.wait_at_gate("reduce", 4)
    run.gate.open("reduce", "slow0")
    run.wait_for("reduce", lambda stage: stage.done > 0, "a sealed partition")
    cluster.kill_worker(1)
    run.wait_for("reduce", lambda stage: stage.attempts["lost"] > 0, "lost reduces")
    run.gate.open("reduce")
    status = run.handle.ended(60, tidy=True)
    assert status.state == JobState.FAILED
    assert status.error is not None and status.error.kind == "not_deterministic"
    assert "your map is not deterministic" in status.error.message
    assert not run.output.exists()
    check_alone(run.output)


def test_a_map_that_is_not_deterministic_passes_before_any_seal(pausing: LocalCluster, tmp_path: Path) -> None:
    """Nothing was made of its first output: there is nothing to contradict."""
    run = Run(pausing, tmp_path, job=random_map)
    wait_until(
        lambda: len(stopped_slots(pausing, 0)) == 2 and len(stopped_slots(pausing, 1)) == 2, what="four stopped reduces"
    )
    pausing.kill_worker(1)
    wake_until_ended(run)
    run.check(Text(run.text.directory, {**run.text.counts, "noise": 0}))


def test_input_that_changes_fails_the_job_by_name(cluster: LocalCluster, tmp_path: Path) -> None:
    """Half of the output would be of one content of the file, half of another."""
    run = Run(cluster, tmp_path, "map")
    run.wait_at_gate("map", 4)
    with (run.text.directory / "007.txt").open("a") as file:
        file.write("more\n")
    run.gate.open("map")
    status = run.handle.ended(30, tidy=True)
    assert status.state == JobState.FAILED
    assert status.error is not None and status.error.kind == "input_changed"
    assert "007.txt" in status.error.message
    assert sum(stage.attempts["failed"] for stage in status.stages) == 1
    assert not run.output.exists()
    check_alone(run.output)


def deep_entries(directory: Path) -> list[str]:
    """What lies three levels down or deeper. A walk, since the agent may be deleting: a glob would raise."""
    return [
        os.path.join(root, name)
        for root, directories, files in os.walk(directory)
        for name in (*directories, *files)
        if len(Path(root).relative_to(directory).parts) >= 2
    ]


@contextmanager
def small_disk(disk: Path) -> Iterator[None]:
    """Two megabytes at the directory `disk`."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("not permitted to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_under_a_worker(tmp_path: Path) -> None:
    """Its attempts fail with one clear line; tried again where there is room the job commits, else it fails whole."""
    disk = tmp_path / "cluster" / "worker-1"
    with cluster_for(tmp_path, masters=1, workers=1, slots=1) as cluster, small_disk(disk):
        cluster.start_missing(workers=2)
        text = make_text(tmp_path / "in", files=4, lines=60, slow=0)
        with Client.from_dir(cluster.directory, settings=EACH_FILE_A_MAP) as client:
            handle = client.submit(large, input=text.directory, output=tmp_path / "out", reducers=2)
            status = handle.ended(60, tidy=True)
            failed = [info for info in handle.attempts(failed_only=True) if info.state == "storage"]
        assert failed, "the disk was never full"
        for info in failed:
            assert "No space left on device" in info.message and "\n" not in info.message
        if status.state == JobState.FAILED:
            assert status.error is not None and status.error.kind == "storage"
            assert "No space left on device" in status.error.message
            assert not (tmp_path / "out").exists()
        else:
            lines = [line for part in (tmp_path / "out").glob("part-*") for line in part.read_text().splitlines()]
            assert sum(int(line.rpartition("\t")[2]) for line in lines) == 4 * 60
        check_alone(tmp_path / "out")
        wait_until(lambda: not deep_entries(disk), what="an empty disk")
        cluster.kill_worker(1)
