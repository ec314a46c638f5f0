"""The client's end of a lease: it must give up before the masters do, in every case."""

import pytest

from jobrunner.locks.holder import Hold, Lease


@pytest.fixture
def lease() -> Lease:
    return Lease(10.0, sent_at=100.0, grace_s=5.0)


def test_time_counts_from_the_sending_of_what_was_confirmed(lease: Lease) -> None:
    """Counted from the reply, a slow reply would make the client rely on a lease that the masters have ended."""
    lease.confirmed(sent_at=102.0, now=110.9)
    assert lease.state(110.99) is Hold.HELD
    assert lease.state(111.0) is Hold.IN_DOUBT


def test_a_tenth_is_kept_back_for_clocks_of_different_speeds(lease: Lease) -> None:
    """The masters' clock may run faster than ours."""
    assert lease.state(108.9) is Hold.HELD
    assert lease.state(109.0) is Hold.IN_DOUBT


def test_what_is_in_doubt_comes_back_when_it_is_confirmed(lease: Lease) -> None:
    """An election must not cost every lock."""
    assert lease.state(112.0) is Hold.IN_DOUBT
    lease.confirmed(sent_at=111.0, now=112.0)
    assert lease.state(112.0) is Hold.HELD


def test_what_is_lost_does_not_come_back(lease: Lease) -> None:
    """Somebody else may have had it meanwhile."""
    assert lease.state(114.0) is Hold.LOST
    lease.confirmed(sent_at=113.9, now=114.0)
    assert lease.state(114.0) is Hold.LOST


def test_a_confirmation_that_comes_when_all_is_lost_is_too_late_even_if_nobody_looked(lease: Lease) -> None:
    """The process was stopped: the first thing that runs may be the reply."""
    lease.confirmed(sent_at=113.0, now=200.0)
    assert lease.state(113.5) is Hold.LOST


def test_an_old_confirmation_shortens_nothing_and_prolongs_nothing(lease: Lease) -> None:
    """Replies may come in any order."""
    lease.confirmed(sent_at=105.0, now=106.0)
    lease.confirmed(sent_at=101.0, now=107.0)
    assert lease.state(113.9) is Hold.HELD
    lease.confirmed(sent_at=100.0, now=114.5)
    assert lease.state(114.5) is Hold.IN_DOUBT


def test_the_masters_word_ends_it_at_once(lease: Lease) -> None:
    """From held and from in doubt alike."""
    lease.ended()
    assert lease.state(100.0) is Hold.LOST
    assert lease.left_s(100.0) == 0.0


def test_it_says_when_silence_will_change_it(lease: Lease) -> None:
    """Who waits for that would look too late."""
    assert lease.left_s(100.0) == pytest.approx(9.0)
    assert lease.left_s(110.0) == pytest.approx(4.0)
    assert lease.left_s(114.0) == 0.0
    assert lease.beat_s * 3 < 9.0  # Two keepalives may be lost.
