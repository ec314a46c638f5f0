"""The table of a job's commit: every pair of state and event, legal or not."""

import pytest

from jobrunner.commit.steps import (
    IGNORED,
    REFUSED,
    TABLE,
    Event,
    ImpossibleStep,
    State,
    is_ended,
    is_tidy,
    next_state,
    public_state,
    step_due,
)
from jobrunner.control.messages import JobState, TaskKind
from jobrunner.errors import Refused

ALL_PAIRS = [(state, event) for state in State for event in Event]


@pytest.mark.parametrize(("state", "event"), ALL_PAIRS)
def test_every_pair_moves_is_ignored_is_refused_or_is_impossible(state: State, event: Event) -> None:
    """A pair in two tables, or one that silently moves, would let two masters' reading of one log differ from docs."""
    pair = (state, event)
    assert (pair in TABLE) + (pair in IGNORED) + (pair in REFUSED) <= 1
    if pair in TABLE:
        assert next_state(state, event) is TABLE[pair] is not state
    elif pair in IGNORED:
        assert next_state(state, event) is state
    elif pair in REFUSED:
        with pytest.raises(Refused):
            next_state(state, event)
    else:
        with pytest.raises(ImpossibleStep):
            next_state(state, event)


def test_the_impossible_pairs_are_these() -> None:
    """Listed one by one: an entry that becomes possible must be thought about, not swallowed."""
    impossible = {pair for pair in ALL_PAIRS if pair not in TABLE and pair not in IGNORED and pair not in REFUSED}
    late = {Event.PUBLISHED, Event.PUBLISH_REFUSED, Event.WITHDRAWN, Event.PUBLISHED_AFTER_ALL}
    undecided = {State.QUEUED, State.RUNNING, State.KILLED, State.KILLED_TIDY}
    expected = {(state, event) for state in undecided for event in late}
    expected |= {(state, Event.CLEANED_UP) for state in State if not is_ended(state)}
    expected |= {(State.COMMITTING, Event.WITHDRAWN), (State.COMMITTING, Event.PUBLISHED_AFTER_ALL)}
    expected |= {(State.QUEUED, Event.COMMIT)}
    assert impossible == expected


def test_nothing_is_published_unless_the_commit_is_decided() -> None:
    """A publication reachable without CommitJob would show readers the output of a job that may still fail."""
    for (state, _), following in TABLE.items():
        if following in (State.COMMITTED, State.RETRACTING):
            assert state in (State.COMMITTING, State.RETRACTING)
        if following is State.COMMITTING:
            assert state is State.RUNNING


def test_an_ended_job_keeps_its_end() -> None:
    """A late event that turned COMMITTED into FAILED would contradict what clients were told."""
    for state in filter(is_ended, State):
        for event in Event:
            try:
                following = next_state(state, event)
            except ImpossibleStep:
                continue
            assert public_state(following) is public_state(state)


@pytest.mark.parametrize("state", [State.COMMITTING, State.RETRACTING])
def test_a_decided_job_cannot_be_killed(state: State) -> None:
    """An abort after CommitJob would race with a publisher that is already renaming."""
    for event in (Event.KILL, Event.FAIL):
        with pytest.raises(Refused, match="too late"):
            next_state(state, event)


def test_every_state_that_is_not_an_end_has_a_step_due_or_runs() -> None:
    """A state with no step due would wait for ever; a tidy state with one would be cleaned for ever."""
    for state in State:
        if is_tidy(state) or state is State.RUNNING:
            assert step_due(state) is None
        else:
            assert step_due(state) is not None
    assert step_due(State.FAILED) is TaskKind.CLEANUP
    assert public_state(State.RETRACTING) is JobState.COMMITTING


def test_every_state_is_reached_and_every_untidy_state_can_become_tidy() -> None:
    """A dead end would hold the output's path lock for ever."""
    reached = {State.QUEUED}
    while grown := {following for (state, _), following in TABLE.items() if state in reached} - reached:
        reached |= grown
    assert reached == set(State)
    tidy = {state for state in State if is_tidy(state)}
    while grown := {state for (state, _), following in TABLE.items() if following in tidy} - tidy:
        tidy |= grown
    assert tidy == set(State)
