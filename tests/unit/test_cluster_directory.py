"""What a cluster directory says, and how a wrong one is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobrunner.cluster.directory import (
    CLUSTER_FILE,
    TOKEN_FILE,
    ClusterDir,
    create_cluster_dir,
    free_ports,
    locked,
)
from jobrunner.cluster.local import kept_as_it_was
from jobrunner.errors import SpecError
from jobrunner.hosts import process_alive, process_started, same_pid_space, this_host
from jobrunner.raft.store import read_identity
from jobrunner.spec.settings import ClusterSection, RaftSection, Settings


def make(path: Path, masters: int = 3) -> ClusterDir:
    return create_cluster_dir(path, Settings(cluster=ClusterSection(masters=masters)), workers=2, slots=1)


def test_a_new_directory_is_private_and_reads_back(tmp_path: Path) -> None:
    """The token in it opens the cluster to whoever can read it."""
    made = make(tmp_path / "c")
    read = ClusterDir.read(tmp_path / "c")
    assert read.file == made.file and read.token == made.token
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "c" / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    assert len({daemon.address for daemon in [*read.file.masters, *read.file.workers]}) == 5


def test_every_master_knows_the_same_members(tmp_path: Path) -> None:
    """Masters that begin with different members are two clusters."""
    made = make(tmp_path / "c")
    for slot in range(3):
        made.init_master(slot)
        made.init_master(slot)  # Again is harmless.
        identity = read_identity(str(tmp_path / "c" / f"master-{slot}"))
        assert (identity.slot, identity.member) == (slot, made.file.masters[slot].member)
    assert len(made.members()) == 3


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    """Somebody's files would be mixed with ours."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SpecError, match=r"thesis\.tex"):
        make(tmp_path)


def test_a_missing_or_damaged_cluster_is_refused_in_one_line(tmp_path: Path) -> None:
    """A traceback tells an operator nothing."""
    with pytest.raises(SpecError, match="not a cluster directory"):
        ClusterDir.read(tmp_path / "nowhere")
    make(tmp_path / "c")
    (tmp_path / "c" / CLUSTER_FILE).write_text("{")
    with pytest.raises(SpecError, match="damaged"):
        ClusterDir.read(tmp_path / "c")


def test_other_than_loopback_is_refused_without_tls(tmp_path: Path) -> None:
    """The token would cross the network in the clear."""
    settings = Settings(cluster=ClusterSection(host="10.0.0.1"))
    with pytest.raises(SpecError, match="TLS"):
        create_cluster_dir(tmp_path / "c", settings, workers=1, slots=1)


def test_two_commands_never_change_one_directory_at_once(tmp_path: Path) -> None:
    """Both would start every daemon."""
    with locked(tmp_path), pytest.raises(SpecError, match="in use"), locked(tmp_path):
        pass


def test_what_an_existing_cluster_does_not_follow_is_said(tmp_path: Path) -> None:
    """Somebody asks for five masters, is told that the cluster accepts jobs, and believes it survives two deaths."""
    made = make(tmp_path / "c")
    assert kept_as_it_was(made, made.settings(), workers=None, slots=None) == []
    assert kept_as_it_was(made, made.settings(), workers=2, slots=1) == []
    asked = Settings(cluster=ClusterSection(masters=5), raft=RaftSection(heartbeat_ms=70))
    masters, workers, slots, beat = kept_as_it_was(made, asked, workers=1, slots=4)
    assert "stays 3, not 5" in masters and "stays 2, not 1" in workers and "stays 1, not 4" in slots
    assert beat.startswith("raft.heartbeat_ms: stays 50, not 70") and "cluster.toml" in beat


def test_ports_in_use_are_passed_over() -> None:
    """A daemon that finds its port taken never starts."""
    ports = free_ports("127.0.0.1", 5)
    assert len(set(ports)) == 5
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert ports[0] not in free_ports("127.0.0.1", 50)


def test_a_dead_process_is_seen_as_dead_even_before_it_is_buried() -> None:
    """A zombie answers signals: its tasks would wait for the lease."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_alive(child.pid) and process_started(child.pid) > 0
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process_alive(child.pid)
    child.wait()
    assert not process_alive(child.pid)
    assert process_alive(os.getpid())


def test_this_process_shares_its_own_pid_space() -> None:
    """Otherwise a dead neighbour is noticed only by its lease."""
    assert same_pid_space(this_host())
