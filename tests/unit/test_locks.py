"""Sessions, leases and the lock table."""

from jobrunner.control.messages import HostInfo, OutputFile
from jobrunner.ids import SessionId, StageName, Token, job_id_from_number
from jobrunner.locks.sessions import Session, SessionTable
from jobrunner.locks.table import Claim, LockTable
from jobrunner.master.liveness import Leases

JOB, OTHER = job_id_from_number(1), job_id_from_number(2)
REDUCE = StageName("reduce")


def session(id: int, directory: str = "d", process: str = "p") -> Session:
    return Session(SessionId(id), directory, process, 0, "a:1", 1, HostInfo("h", "b", "n"), 2)


def claim(token: int) -> Claim:
    return Claim(0, Token(token), SessionId(1), [OutputFile("main", "part-00000.txt", 1, 1, "crc32:00")], 7)


def test_a_sealed_partition_keeps_its_winner() -> None:
    """A paused attempt that wakes would replace what readers have seen."""
    table = LockTable()
    first = table.seal(JOB, REDUCE, 0, claim(5))
    assert table.seal(JOB, REDUCE, 0, claim(6)) == first
    assert table.winner(JOB, REDUCE, 0) == first
    assert table.winner(OTHER, REDUCE, 0) is None


def test_tokens_rise_for_ever() -> None:
    """A token that came twice would let an old attempt pass for a new one."""
    table = LockTable()
    assert [table.next_token() for _ in range(3)] == [1, 2, 3]


def test_a_path_belongs_to_one_live_job_until_it_is_released_by_it() -> None:
    """Two jobs would mix their files in one directory."""
    table = LockTable()
    assert table.take_path("/out", JOB) == JOB
    assert table.take_path("/out", OTHER) == JOB
    table.release_path("/out", OTHER)
    assert table.take_path("/out", OTHER) == JOB
    table.release_path("/out", JOB)
    assert table.take_path("/out", OTHER) == OTHER


def test_a_new_process_of_a_directory_replaces_its_session() -> None:
    """Two sessions of one disk would both be given the blocks on it."""
    table = SessionTable()
    assert table.register(session(1)) is None
    assert table.same_process("d", "p") == session(1)
    assert table.same_process("d", "p2") is None
    assert table.register(session(2, process="p2")) == session(1)
    assert list(table.live) == [2]


def test_ending_a_session_twice_is_harmless_and_the_worker_is_shown_as_lost() -> None:
    """Two leaders may both give the verdict."""
    table = SessionTable()
    table.register(session(1))
    assert table.end(SessionId(1)) == session(1)
    assert table.end(SessionId(1)) is None
    assert list(table.lost) == ["d"]
    table.register(session(3))
    assert not table.lost


def test_a_lease_ends_after_its_time_and_not_before() -> None:
    """Too early: work is thrown away. Too late: tasks wait for the dead."""
    leases = Leases(5.0)
    leases.follow([SessionId(1), SessionId(2)], 0.0)
    leases.renew(SessionId(2), 4.0)
    assert leases.lost(4.9) == []
    assert [id for id, _ in leases.lost(5.0)] == [1]
    assert [id for id, _ in leases.lost(9.0)] == [1, 2]


def test_a_gap_prolongs_every_lease() -> None:
    """A leader that slept would end every worker when it wakes."""
    leases = Leases(5.0)
    leases.follow([SessionId(1)], 0.0)
    leases.add_gap(60.0)
    assert leases.lost(64.0) == []
    assert leases.lost(65.0)


def test_a_process_that_is_known_to_be_gone_is_lost_at_once_unless_it_speaks_again() -> None:
    """Its tasks need not wait for the lease; a wrong guess must not outlive a heartbeat."""
    leases = Leases(5.0)
    leases.follow([SessionId(1)], 0.0)
    leases.give_up(SessionId(1), "its process has ended")
    assert leases.lost(0.1) == [(1, "its process has ended")]
    leases.renew(SessionId(1), 0.2)
    assert leases.lost(0.3) == []


def test_sessions_that_ended_are_followed_no_more() -> None:
    """The leader would propose their end for ever."""
    leases = Leases(5.0)
    leases.follow([SessionId(1)], 0.0)
    leases.follow([], 1.0)
    assert leases.lost(100.0) == []
