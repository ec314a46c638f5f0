"""Named locks on real processes: holders, leaders and whole groups killed or stopped while a lock is held."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.api.client import Client
from jobrunner.errors import LockBusy, LockInDoubt, LockLost, OutputBusy
from jobrunner.locks.holder import Hold
from jobrunner.testing.local import LocalCluster, wait_until
from tests.crash.cluster import check_alone, cluster_for, make_text
from tests.crash.jobs import wordcount

HOLDER = """
import sys, time
from jobrunner import Client
with Client.from_dir(sys.argv[1]) as client:
    with client.lock("x", ttl=float(sys.argv[2]), delay=float(sys.argv[3])) as lock:
        print(lock.token, flush=True)
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with cluster_for(tmp_path_factory.mktemp("locks"), workers=1) as running:
        yield running


@pytest.fixture(autouse=True)
def _whole(cluster: LocalCluster) -> None:
    """Three masters, whatever the test before has killed."""
    cluster.start_missing()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client.from_dir(cluster.directory) as made:
        yield made


def lock_command(cluster: LocalCluster, *words: str) -> list[str]:
    return [sys.executable, "-m", "jobrunner", "lock", *words[:-1], "--dir", str(cluster.directory), "--",
            "sh", "-c", words[-1]]  # fmt: skip


def alive(pid: int) -> bool:
    """Running, that is: an orphan's zombie waits for whoever adopted it."""
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


def test_the_lock_of_a_killed_holder_is_handed_over_after_ttl_and_delay(cluster: LocalCluster, client: Client) -> None:
    """Sooner: its last writes may still come. Never: kill -9 would close a lock for ever."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cluster.directory), "1.5", "1"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        token = int(holder.stdout.readline())
        time.sleep(0.5)
        killed_at = time.monotonic()
        holder.kill()
        with client.lock("x", wait=60) as lock:
            waited_s = time.monotonic() - killed_at
            assert lock.token > token
        assert waited_s >= 1.5 * 0.7 + 1  # A keepalive every quarter of the ttl.
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def test_a_lock_is_held_through_the_death_of_the_leader(cluster: LocalCluster, client: Client) -> None:
    """Every election would break every lock."""
    with Client.from_dir(cluster.directory) as other, client.lock("leader", ttl=8) as lock:
        cluster.kill_leader()
        with pytest.raises(LockBusy):
            other.lock("leader", wait=0).acquire()
        end = time.monotonic() + 9  # More than the ttl.
        while time.monotonic() < end:
            lock.check()
            time.sleep(0.1)
    assert lock.state is Hold.LOST  # Given back.


def test_two_contenders_never_hold_at_once_while_leaders_are_killed(cluster: LocalCluster) -> None:
    """The one promise of a lock. Tokens rise in the order of the grants."""
    inside: list[str] = []
    grants: list[int] = []
    problems: list[str] = []
    stop = threading.Event()

    def contend(name: str) -> None:
        with Client.from_dir(cluster.directory) as own:
            while not stop.is_set():
                try:
                    with own.lock("contended", ttl=8, wait=30) as lock:
                        inside.append(name)
                        grants.append(lock.token)
                        if len(inside) != 1:
                            problems.append(f"{inside} are inside")
                        time.sleep(0.01)
                        lock.check()
                        inside.remove(name)
                except LockLost as error:  # On a machine that is very slow.
                    problems.append(f"{name}: {error}")
                    return

    threads = [threading.Thread(target=contend, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            count = len(grants)
            wait_until(lambda count=count: len(grants) > count + 5, what="five grants")  # type: ignore[misc]
            cluster.kill_leader()
            wait_until(lambda count=len(grants): len(grants) > count + 5, what="grants of a new leader")  # type: ignore[misc]
            cluster.start_missing()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not problems
    assert grants == sorted(set(grants))


def test_the_command_under_a_lock_is_killed_when_all_masters_are_silent(cluster: LocalCluster, tmp_path: Path) -> None:
    """When they wake they give the lock to somebody else, and the command would still be writing."""
    pids = tmp_path / "pids"
    script = f"(echo $$; sleep 600 & echo $!) > {pids}.new; mv {pids}.new {pids}; echo $JOBRUNNER_LOCK_TOKEN; sleep 600"
    command = lock_command(cluster, "silent", "--ttl", "2", "--reach-timeout", "5", script)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stopped: list[int] = []
    try:
        wait_until(pids.exists, what="the command")
        members = [int(line) for line in pids.read_text().split()]
        assert all(alive(pid) for pid in members)
        for master in cluster.masters:
            stopped += cluster.pause(master)
        stopped_at = time.monotonic()
        wait_until(lambda: not any(alive(pid) for pid in members), timeout_s=10, what="the command's end")
        assert time.monotonic() - stopped_at < 2 + 1
        out, error = process.communicate(timeout=30)
        assert process.returncode == 3
        assert int(out) > 0
        assert "lock silent was lost, and the command killed" in error
    finally:
        cluster.resume(stopped)
        process.kill()
        process.communicate()


def test_a_lock_is_in_doubt_while_the_masters_are_silent_and_comes_back(cluster: LocalCluster, client: Client) -> None:
    """In doubt, nothing may be done; but a pause of the masters need not cost the lock: they end nobody for it."""
    turns: list[Hold] = []
    lock = client.lock("pause", ttl=2, on_doubt=lambda lock: turns.append(lock.state))
    lock.acquire()
    stopped = [pid for master in cluster.masters for pid in cluster.pause(master)]
    try:
        wait_until(lambda: turns == [Hold.IN_DOUBT], what="doubt")
        with pytest.raises(LockInDoubt):
            lock.check()
    finally:
        cluster.resume(stopped)
    wait_until(lambda: lock.state is not Hold.IN_DOUBT, what="the masters' word")
    lock.release()


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_the_exit_status_of_the_command_is_passed_on(cluster: LocalCluster, script: str, status: int) -> None:
    """Scripts go by it."""
    result = subprocess.run(lock_command(cluster, "status", script), capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr


def test_locks_are_shown_and_taken_from_the_command_line(cluster: LocalCluster, client: Client) -> None:
    """What an operator has when a program hangs with a lock."""

    def locks(*words: str, status: int = 0) -> str:
        where = ["--dir", str(cluster.directory)]
        command = [sys.executable, "-m", "jobrunner", "locks", *words, *where]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr
        return result.stdout

    lock = client.lock("shown/here", ttl=4, delay=0)
    lock.acquire()
    shown = locks()
    assert "shown/here" in shown and f":{os.getpid()}" in shown
    assert f'"token": {lock.token}' in locks("--json")
    locks("release", "shown/here", "--reason", "it hangs")
    wait_until(lambda: lock.state is Hold.LOST, what="the holder's knowledge")
    with pytest.raises(LockLost):
        lock.check()
    assert "it hangs" in locks()
    locks("release", "shown/here", "--reason", "again", status=2)


def test_a_job_and_a_program_never_have_one_output(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    """`output:` and the directory's canonical URL is the lock that jobs take."""
    text = make_text(tmp_path / "in", files=2, slow=0)
    output = tmp_path / "out"
    with client.lock(f"output:{output}"), pytest.raises(OutputBusy):
        client.submit(wordcount, input=[text.directory], output=output)
    handle = client.submit(wordcount, input=[text.directory], output=output)
    assert handle.ended(60, tidy=True).output == str(output)
    check_alone(output)
    with client.lock(f"output:{output}", wait=0):
        pass


def test_small_values_outlive_their_leader_and_ephemeral_ones_do_not_outlive_their_client(
    cluster: LocalCluster, client: Client
) -> None:
    """What programs agreed upon must not depend on one master; who is gone must be seen to be gone."""
    kv = client.kv
    with Client.from_dir(cluster.directory) as other:
        first = kv.put("config/a", "1")
        assert first is not None
        other.kv.put("alive/other", b"", ephemeral=True)
        watch = kv.watch("", revision=first.modified)
        cluster.kill_leader()
        assert kv.put("config/a", "2", if_modified=0) is None
        assert kv.put("config/a", "2", if_modified=first.modified)
        assert [item.key for item in kv.list("alive/")] == ["alive/other"]
    seen = [next(watch) for _ in range(4)]
    assert [(change.key, change.value) for change in seen] == [
        ("config/a", b"1"), ("alive/other", b""), ("config/a", b"2"), ("alive/other", None),
    ]  # fmt: skip
    assert kv.get("alive/other") is None
