"""The life of a job's commit, as a table: (state, event) -> state.

        SET_UP            COMMIT               PUBLISHED              CLEANED_UP
 QUEUED ──────► RUNNING ─────────► COMMITTING ───────────► COMMITTED ────────────► COMMITTED_TIDY
    │              │                   │ PUBLISH_REFUSED       ▲
    │              │                   ▼                       │ PUBLISHED_AFTER_ALL
    │              │               RETRACTING ─────────────────┘
    │              │                   │ WITHDRAWN
    └──────────────┴───────────────────┴──► FAILED | KILLED ──────────────────────► FAILED_TIDY | KILLED_TIDY
       SET_UP_REFUSED, FAIL, KILL

Applied in log order, the same on every master. COMMIT is the point of no return: before it nothing is published,
after it FAIL and KILL are refused, so that log order alone says which came first. A job has ended, for whoever
waits for it, in COMMITTED, FAILED and KILLED; clean-up is then still due, and the path lock is released only when
the job is tidy, so that the next job at the same output finds nothing of this one beside it.

A pair outside the table is a bug and raises ImpossibleStep. Pairs that happen because steps are repeated, late or
run beside each other are in IGNORED, each row with its reason; pairs that a person may ask for too late are in REFUSED.
"""

from enum import StrEnum

from jobrunner.control.messages import JobState, TaskKind
from jobrunner.errors import Refused


class State(StrEnum):
    """Where a job's commit is. `_TIDY`: nothing of the job is left beside the output, and the path is free."""

    QUEUED = "queued"  # Set-up is due: the stage directory is not there yet.
    RUNNING = "running"
    COMMITTING = "committing"  # Winners are fixed for ever; publication goes forward only.
    RETRACTING = "retracting"  # Publication was refused; somebody must prove that it did not happen.
    COMMITTED = "committed"
    FAILED = "failed"
    KILLED = "killed"
    COMMITTED_TIDY = "committed_tidy"
    FAILED_TIDY = "failed_tidy"
    KILLED_TIDY = "killed_tidy"


class Event(StrEnum):
    """What may happen to a job's commit; each is one entry, or part of one, in the log."""

    SET_UP = "set_up"  # A worker made the stage directory.
    SET_UP_REFUSED = "set_up_refused"  # It cannot be made.
    COMMIT = "commit"  # CommitJob: every final partition is sealed.
    PUBLISHED = "published"  # The output has its name, durably.
    PUBLISH_REFUSED = "publish_refused"  # A definite no: a foreign output, no permission, a disk that stays full.
    WITHDRAWN = "withdrawn"  # Retraction: it is not published and can no longer be.
    PUBLISHED_AFTER_ALL = "published_after_all"  # Retraction: the output's _SUCCESS names this job.
    FAIL = "fail"  # A task used up its attempts, or raised Fatal.
    KILL = "kill"  # Somebody asked.
    CLEANED_UP = "cleaned_up"  # The stage directory is deleted.


class ImpossibleStep(Exception):
    """A pair that no log of ours can hold: a bug, not a state of the world."""


TABLE: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.SET_UP): State.RUNNING,
    (State.QUEUED, Event.SET_UP_REFUSED): State.FAILED,
    (State.QUEUED, Event.FAIL): State.FAILED,
    (State.QUEUED, Event.KILL): State.KILLED,
    (State.RUNNING, Event.COMMIT): State.COMMITTING,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.RUNNING, Event.KILL): State.KILLED,
    (State.COMMITTING, Event.PUBLISHED): State.COMMITTED,
    (State.COMMITTING, Event.PUBLISH_REFUSED): State.RETRACTING,
    (State.RETRACTING, Event.WITHDRAWN): State.FAILED,
    (State.RETRACTING, Event.PUBLISHED_AFTER_ALL): State.COMMITTED,
    (State.COMMITTED, Event.CLEANED_UP): State.COMMITTED_TIDY,
    (State.FAILED, Event.CLEANED_UP): State.FAILED_TIDY,
    (State.KILLED, Event.CLEANED_UP): State.KILLED_TIDY,
}

_ENDED = frozenset(
    {State.COMMITTED, State.FAILED, State.KILLED, State.COMMITTED_TIDY, State.FAILED_TIDY, State.KILLED_TIDY}
)
_TIDY = frozenset({State.COMMITTED_TIDY, State.FAILED_TIDY, State.KILLED_TIDY})
_WAS_DECIDED = frozenset({State.COMMITTED, State.FAILED, State.COMMITTED_TIDY, State.FAILED_TIDY})


def _ignored() -> frozenset[tuple[State, Event]]:
    pairs: set[tuple[State, Event]] = set()
    # Several workers may run the set-up of one job; the first answer counts, also after the job has ended.
    for state in State:
        if state is not State.QUEUED:
            pairs |= {(state, Event.SET_UP), (state, Event.SET_UP_REFUSED)}
    # A leader proposes CommitJob when it sees all sealed: twice across a failover, or just behind a KILL or FAIL.
    pairs |= {(state, Event.COMMIT) for state in _ENDED | {State.COMMITTING, State.RETRACTING}}
    # Another publisher reports late. While retracting, the retraction alone decides, and it will see what was done.
    for state in _WAS_DECIDED | {State.RETRACTING}:
        pairs |= {(state, Event.PUBLISHED), (state, Event.PUBLISH_REFUSED)}
    # Another retraction reports late.
    for state in _WAS_DECIDED:
        pairs |= {(state, Event.WITHDRAWN), (state, Event.PUBLISHED_AFTER_ALL)}
    # The end is fixed: killing an ended job is fine and changes nothing; late failures change nothing.
    for state in _ENDED:
        pairs |= {(state, Event.FAIL), (state, Event.KILL)}
    # Another cleaner reports late.
    pairs |= {(state, Event.CLEANED_UP) for state in _TIDY}
    return frozenset(pairs)


IGNORED: frozenset[tuple[State, Event]] = _ignored()

REFUSED: frozenset[tuple[State, Event]] = frozenset(
    (state, event) for state in (State.COMMITTING, State.RETRACTING) for event in (Event.FAIL, Event.KILL)
)

_PUBLIC: dict[State, JobState] = {
    State.QUEUED: JobState.QUEUED,
    State.RUNNING: JobState.RUNNING,
    State.COMMITTING: JobState.COMMITTING,
    State.RETRACTING: JobState.COMMITTING,
    State.COMMITTED: JobState.COMMITTED,
    State.COMMITTED_TIDY: JobState.COMMITTED,
    State.FAILED: JobState.FAILED,
    State.FAILED_TIDY: JobState.FAILED,
    State.KILLED: JobState.KILLED,
    State.KILLED_TIDY: JobState.KILLED,
}

_DUE: dict[State, TaskKind] = {
    State.QUEUED: TaskKind.SETUP,
    State.COMMITTING: TaskKind.PUBLISH,
    State.RETRACTING: TaskKind.RETRACT,
    State.COMMITTED: TaskKind.CLEANUP,
    State.FAILED: TaskKind.CLEANUP,
    State.KILLED: TaskKind.CLEANUP,
}


def next_state(state: State, event: Event) -> State:
    """The state after `event`; `state` itself if the pair is IGNORED.

    Raises Refused for a pair in REFUSED (nothing changed), ImpossibleStep for a pair in none of the tables.
    """
    following = TABLE.get((state, event))
    if following is not None:
        return following
    if (state, event) in IGNORED:
        return state
    if (state, event) in REFUSED:
        raise Refused(f"too late to {event}: the job's output is decided and being published")
    raise ImpossibleStep(f"{event} while {state}")


def public_state(state: State) -> JobState:
    """As `status` shows it. A retraction shows as committing: its outcome is open."""
    return _PUBLIC[state]


def step_due(state: State) -> TaskKind | None:
    """The repeatable step that some worker must run to get further, or None: attempts run, or all is done."""
    return _DUE.get(state)


def is_ended(state: State) -> bool:
    """Whoever waits for the job may be told. The path lock is held until `is_tidy`."""
    return state in _ENDED


def is_tidy(state: State) -> bool:
    """Cleaned up: the path may be released and the job forgotten."""
    return state in _TIDY
