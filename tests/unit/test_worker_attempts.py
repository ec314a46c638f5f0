"""The agent's core: instructions and ends in, actions out; no process, no clock."""

import itertools

import pytest

from jobrunner.control.messages import (
    EndCause,
    Failed,
    Forget,
    Instruct,
    Instruction,
    MapDone,
    OutputFile,
    Sealable,
    Start,
    StepDone,
    Stop,
    TaskKind,
    Verdict,
)
from jobrunner.ids import AttemptId, Epoch, Hash, JobId, SessionId, StageName, Token
from jobrunner.worker import attempts as core
from jobrunner.worker.attempts import Attempts, Phase

JOB, OTHER = JobId("j-" + "0" * 26), JobId("j-" + "1" * 26)


def start(token: int, kind: TaskKind = TaskKind.MAP, job: JobId = JOB) -> Start:
    return Start(AttemptId(job, StageName(kind.value), token, 0), Token(token), kind, Hash("a" * 64))


def map_done(item: Start) -> MapDone:
    return MapDone(item.attempt, item.token, 1, 2, 3, {})


def sealable(item: Start) -> Sealable:
    return Sealable(item.attempt, item.token, [OutputFile("main", "part-00000.txt", 1, 2, "crc32:0")], 0, {})


def failed(item: Start, cause: EndCause = EndCause.EXCEPTION) -> Failed:
    return Failed(item.attempt, item.token, cause, "no")


class Worker:
    """The core with a session, and instructions numbered for it."""

    def __init__(self, slots: int = 2, **options: int) -> None:
        self.core = Attempts(slots, **options)
        self.core.registered(SessionId(7), Epoch(3))
        self.core.tick(100.0)
        self._sequence = itertools.count(1)

    def tell(self, *items: Instruction, epoch: int = 3) -> list[core.Action]:
        return self.core.instruct(Instruct(Epoch(epoch), SessionId(7), next(self._sequence), list(items)))

    def run(self, *items: Start, timeout_s: float = 10.0) -> list[core.Action]:
        """Start and prepare; what follows from it."""
        self.tell(*items)
        return [action for item in items for action in self.core.prepared(item.token, timeout_s)]


def kinds(actions: list[core.Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_an_attempt_is_prepared_then_run_then_reported() -> None:
    """The whole life of an attempt that ends well."""
    worker, item = Worker(), start(1)
    assert worker.tell(item) == [core.Prepare(item)]
    assert worker.core.phase(item.attempt) is Phase.PREPARING
    assert worker.core.prepared(item.token, 10) == [core.StartSlot(1, JOB), core.RunAttempt(1, item)]
    assert worker.core.running_on(1) == item
    assert worker.core.ended(map_done(item)) == []
    assert worker.core.reports(10) == [map_done(item)]
    accepted = worker.core.verdicts([map_done(item)], [Verdict.ACCEPTED])
    assert accepted == [core.Accepted(map_done(item), Verdict.ACCEPTED)]
    assert worker.core.held() == [] and worker.core.reports(10) == []


def test_a_slot_runs_one_attempt_after_another() -> None:
    """A process an attempt would cost a fork each."""
    worker, items = Worker(slots=1), [start(1), start(2)]
    assert kinds(worker.run(*items)) == ["StartSlot", "RunAttempt"]
    assert worker.core.phase(items[1].attempt) is Phase.READY
    assert worker.core.ended(map_done(items[0])) == [core.RunAttempt(1, items[1])]


def test_no_more_slots_than_there_are_processors_for() -> None:
    """A worker that forks a process an instruction would swap itself to death."""
    worker = Worker(slots=2)
    actions = worker.run(*[start(token) for token in range(1, 6)])
    assert kinds(actions).count("StartSlot") == 2
    assert [held.running for held in worker.core.held()] == [True, True, False, False, False]


def test_steps_of_the_commit_run_on_a_full_worker() -> None:
    """A publication that waits for a slow map of another job would keep an output waiting for hours."""
    worker = Worker(slots=1)
    worker.run(start(1))
    publish = start(2, TaskKind.PUBLISH, OTHER)
    assert worker.run(publish) == [core.StartSlot(2, None), core.RunAttempt(2, publish)]


def test_an_idle_slot_of_another_job_gives_way() -> None:
    """Slots hold a job's modules: another job cannot use them, and must not wait for them."""
    worker, first, second = Worker(slots=1), start(1), start(2, job=OTHER)
    worker.run(first)
    worker.core.ended(map_done(first))
    assert worker.run(second) == [
        core.KillSlot(1, "its slot goes to another job"),
        core.StartSlot(2, OTHER),
        core.RunAttempt(2, second),
    ]


def test_a_slot_whose_attempt_failed_is_replaced() -> None:
    """A failed attempt may leave anything behind in its process."""
    worker, items = Worker(slots=1), [start(1), start(2)]
    worker.run(*items)
    actions = worker.core.ended(failed(items[0]))
    assert kinds(actions) == ["KillSlot", "StartSlot", "RunAttempt"]
    assert actions[-1] == core.RunAttempt(2, items[1])


def test_a_slot_is_replaced_after_a_number_of_attempts() -> None:
    """Leaks of user code must not grow for ever."""
    worker, items = Worker(slots=1, slot_attempts_max=2), [start(1), start(2), start(3)]
    worker.run(*items)
    assert kinds(worker.core.ended(map_done(items[0]))) == ["RunAttempt"]
    assert kinds(worker.core.ended(map_done(items[1]))) == ["KillSlot", "StartSlot", "RunAttempt"]


# --- fencing ---------------------------------------------------------------------------------------------------------


def test_an_instruction_of_a_lower_epoch_is_refused() -> None:
    """An old leader that wakes up would start what the new one gave to others."""
    worker = Worker()
    worker.core.leader(Epoch(4))
    assert kinds(worker.tell(start(1), epoch=3)) == ["Refuse"]
    assert worker.core.held() == []


def test_an_instruction_for_another_session_is_refused() -> None:
    """What was meant for this worker before it was declared lost runs elsewhere by now."""
    worker = Worker()
    assert kinds(worker.core.instruct(Instruct(Epoch(3), SessionId(6), 1, [start(1)]))) == ["Refuse"]


def test_a_sequence_seen_before_is_refused_and_a_new_epoch_counts_anew() -> None:
    """A doubled instruction must not start an attempt again; a new leader begins at 1."""
    worker = Worker()
    assert kinds(worker.core.instruct(Instruct(Epoch(3), SessionId(7), 5, [start(1)]))) == ["Prepare"]
    assert kinds(worker.core.instruct(Instruct(Epoch(3), SessionId(7), 5, [start(2)]))) == ["Refuse"]
    assert kinds(worker.core.instruct(Instruct(Epoch(4), SessionId(7), 1, [start(2)]))) == ["Prepare"]
    assert (worker.core.epoch, worker.core.sequence) == (4, 1)


def test_a_missing_instruction_shows_in_the_beats_until_the_leader_gives_it_up() -> None:
    """Lost with its connection, it would pass for received once a later one arrived: its Forget or Stop for ever."""
    core = Worker().core

    def tell(sequence: int, void: int = 0) -> int:
        assert kinds(core.instruct(Instruct(Epoch(3), SessionId(7), sequence, [start(sequence)], void))) == ["Prepare"]
        return core.sequence

    assert [tell(1), tell(3), tell(4)] == [1, 1, 1]
    assert kinds(core.instruct(Instruct(Epoch(3), SessionId(7), 2, [start(9)]))) == ["Refuse"]
    assert [tell(5, void=4), tell(6, void=4)] == [5, 6]


def test_a_token_not_above_the_highest_is_refused_alone() -> None:
    """Tokens rise for ever: a lower one is an old order, but the rest of the instruction is not."""
    worker = Worker()
    worker.tell(start(5))
    actions = worker.tell(start(5), start(4), start(6))
    assert kinds(actions) == ["Refuse", "Refuse", "Prepare"]


def test_a_new_leader_resets_the_sequence_that_beats_report() -> None:
    """It has sent nothing yet: a sequence of its predecessor would make it think its orders arrived."""
    worker = Worker()
    worker.tell(start(1))
    assert worker.core.sequence == 1
    assert worker.core.leader(Epoch(9)) and worker.core.sequence == 0
    assert not worker.core.leader(Epoch(9)) and not worker.core.leader(Epoch(8))


# --- stop, forget, the end of a session ------------------------------------------------------------------------------


def test_what_has_not_started_is_withdrawn_without_a_word() -> None:
    """Work assigned ahead does not count as running; nobody waits for its end."""
    worker, item = Worker(), start(1)
    worker.tell(item)
    assert worker.tell(Stop(item.token, EndCause.SUPERSEDED)) == [core.Unprepare(item.token)]
    assert worker.core.prepared(item.token, 10) == []
    assert worker.core.held() == []


def test_a_stopped_attempt_is_killed_and_its_files_deleted() -> None:
    """Another attempt won: this one only costs time and space."""
    worker, item = Worker(), start(1)
    worker.run(item)
    assert kinds(worker.tell(Stop(item.token, EndCause.SUPERSEDED))) == ["KillSlot", "DeleteFiles"]
    assert worker.core.slot_exited(1, EndCause.SIGNAL, "SIGKILL") == []
    assert worker.core.reports(10) == []


def test_a_late_word_of_a_stopped_attempt_is_ignored() -> None:
    """Its message may have been on the way when it was killed."""
    worker, item = Worker(), start(1)
    worker.run(item)
    worker.tell(Stop(item.token, EndCause.PREEMPTED))
    assert worker.core.ended(map_done(item)) == [] and worker.core.reports(10) == []


def test_beats_say_which_reduces_have_all_their_input() -> None:
    """The leader would restart them for map output that they no longer need."""
    worker, item = Worker(), start(1, TaskKind.REDUCE)
    worker.run(item)
    assert [held.ready for held in worker.core.held()] == [False]
    worker.core.fetched(item.token)
    assert [held.ready for held in worker.core.held()] == [True]
    worker.core.ended(sealable(item))
    assert [held.ready for held in worker.core.held()] == [True]
    worker.core.fetched(Token(2))  # Of an attempt that was stopped meanwhile.
    assert len(worker.core.held()) == 1


def test_stop_does_not_touch_what_may_have_won() -> None:
    """The seal may be in the log although its answer was lost: deleting its files would lose output."""
    worker, item = Worker(), start(1, TaskKind.REDUCE)
    worker.run(item)
    worker.core.ended(sealable(item))
    assert worker.tell(Stop(item.token, EndCause.SUPERSEDED)) == []
    assert worker.core.reports(10) == [sealable(item)]
    lost = worker.core.verdicts([sealable(item)], [Verdict.LOST])
    assert lost == [core.DeleteFiles(item)]


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict.ACCEPTED, ["Accepted"]),
        (Verdict.WON, ["Accepted"]),
        (Verdict.LOST, ["DeleteFiles"]),
        (Verdict.GONE, ["DeleteFiles"]),
        (Verdict.REFUSED, ["Refuse"]),
    ],
)
def test_files_are_deleted_exactly_when_they_cannot_count(verdict: Verdict, expected: list[str]) -> None:
    """A winner's files are the output."""
    worker, item = Worker(), start(1, TaskKind.REDUCE)
    worker.run(item)
    worker.core.ended(sealable(item))
    assert kinds(worker.core.verdicts([sealable(item)], [verdict])) == expected


def test_a_failed_attempt_leaves_no_files_once_its_end_is_recorded() -> None:
    """Accepted means here that the failure is counted."""
    worker, item = Worker(), start(1)
    worker.run(item)
    worker.core.ended(failed(item))
    assert kinds(worker.core.verdicts([failed(item)], [Verdict.ACCEPTED])) == ["Accepted", "DeleteFiles"]


def test_a_forgotten_job_leaves_nothing_running() -> None:
    """Attempts, waiting ones, idle slots and reports of an ended job are of no use to anybody."""
    worker = Worker(slots=3)
    waiting, running, over, kept = start(1), start(2), start(3), start(4, job=OTHER)
    worker.tell(waiting)
    worker.run(running, over, kept)
    worker.core.ended(map_done(over))
    actions = worker.tell(Forget(JOB))
    assert sorted(kinds(actions)) == ["DeleteFiles", "ForgetJob", "KillSlot", "KillSlot", "Unprepare"]
    assert kinds(actions)[-1] == "ForgetJob"
    assert [held.token for held in worker.core.held()] == [4] and worker.core.reports(10) == []


def test_the_end_of_a_session_stops_everything_but_keeps_possible_winners() -> None:
    """Final output counts whoever made it, also a worker called lost; all else is run by others now."""
    worker = Worker(slots=5)
    running, preparing = start(1), start(2)
    mapped, sealed, broken, step = start(3), start(4, TaskKind.REDUCE), start(5), start(6, TaskKind.SETUP)
    worker.run(running, mapped, sealed, broken, step)
    worker.tell(start(7))
    worker.core.ended(map_done(mapped))
    worker.core.ended(sealable(sealed))
    worker.core.ended(failed(broken))
    worker.core.ended(StepDone(step.attempt, step.token, "done"))
    actions = worker.core.session_ended()
    assert kinds(actions).count("KillSlot") == 4  # That of the failed one is dying already.
    deleted = [action.start.token for action in actions if isinstance(action, core.DeleteFiles)]
    assert sorted(deleted) == [1, 5, 6]  # The map output is kept: it is offered in the next session.
    assert worker.core.reports(10) == [sealable(sealed)]
    assert preparing.token not in [held.token for held in worker.core.held()]
    worker.core.registered(SessionId(20), Epoch(5))
    assert (worker.core.session, worker.core.sequence) == (20, 0)
    assert worker.core.reports(10) == [sealable(sealed)]


# --- ends and time ---------------------------------------------------------------------------------------------------


def test_a_process_that_dies_fails_its_attempt_with_what_killed_it() -> None:
    """A segfault says nothing itself."""
    worker, items = Worker(slots=1), [start(1), start(2)]
    worker.run(*items)
    actions = worker.core.slot_exited(1, EndCause.SIGNAL, "SIGSEGV", "last words")
    assert kinds(actions) == ["StartSlot", "RunAttempt"]
    (report,) = worker.core.reports(10)
    assert isinstance(report, Failed)
    assert (report.cause, report.message, report.tail) == (EndCause.SIGNAL, "SIGSEGV", "last words")


def test_no_progress_is_a_timeout_reported_when_the_process_is_gone() -> None:
    """Until then it could still write."""
    worker, item = Worker(), start(1)
    worker.run(item, timeout_s=1.0)
    assert worker.core.tick(100.9) == []
    worker.core.progress(item.token)
    assert worker.core.tick(101.8) == []
    assert kinds(worker.core.tick(102.0)) == ["KillSlot"]
    assert worker.core.reports(10) == [] and worker.core.tick(102.5) == []
    worker.core.slot_exited(1, EndCause.SIGNAL, "SIGKILL", "tail")
    (report,) = worker.core.reports(10)
    assert isinstance(report, Failed) and report.cause is EndCause.TIMEOUT and report.tail == "tail"


def test_a_result_in_the_last_instant_beats_the_timeout() -> None:
    """It was finished; the kill only came late."""
    worker, item = Worker(), start(1)
    worker.run(item, timeout_s=1.0)
    worker.core.tick(100.9)
    worker.core.tick(101.5)
    worker.core.ended(map_done(item))
    worker.core.slot_exited(1, EndCause.SIGNAL, "SIGKILL")
    assert worker.core.reports(10) == [map_done(item)]


def test_a_gap_in_time_is_nobodys_fault() -> None:
    """After SIGSTOP and SIGCONT of a worker every attempt would time out at once."""
    worker, item = Worker(), start(1)
    worker.run(item, timeout_s=5.0)
    assert worker.core.tick(1000.0) == []
    assert worker.core.tick(1000.9) == []
    for step in range(1, 5):
        worker.core.tick(1000.9 + step)
    assert kinds(worker.core.tick(1005.8)) == ["KillSlot"]


def test_a_failed_preparation_is_reported_like_any_end() -> None:
    """The user's modules do not import: no slot ever ran."""
    worker, item = Worker(), start(1)
    worker.tell(item)
    assert worker.core.ended(failed(item)) == []
    assert worker.core.reports(10) == [failed(item)]


def test_everything_held_is_told_until_acknowledged() -> None:
    """A leader compares its state with this list: what is missing from it is lost."""
    worker = Worker(slots=1)
    items = [start(1), start(2), start(3)]
    worker.run(*items)
    worker.core.ended(map_done(items[0]))
    assert [(held.token, held.running) for held in worker.core.held()] == [(1, True), (2, True), (3, False)]


def test_reports_are_limited_and_oldest_first() -> None:
    """A worker that comes back from a long isolation has many."""
    worker = Worker(slots=5)
    items = [start(token) for token in range(1, 6)]
    worker.run(*items)
    for item in reversed(items):
        worker.core.ended(map_done(item))
    assert [report.token for report in worker.core.reports(3)] == [1, 2, 3]


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize(
    "event", ["prepared", "ended", "exited", "stop", "forget", "session", "verdict", "progress", "tick"]
)
def test_every_event_is_safe_in_every_phase(phase: Phase, event: str) -> None:
    """Messages cross each other on the way: none may find the core unprepared."""
    worker, item = Worker(slots=1), start(1)
    worker.tell(item)
    if phase is not Phase.PREPARING:
        blocker = start(2)
        if phase is Phase.READY:
            worker.run(blocker)
        worker.core.prepared(item.token, 10)
    if phase is Phase.ENDED:
        worker.core.ended(map_done(item))
    assert worker.core.phase(item.attempt) is phase
    events = {
        "prepared": lambda: worker.core.prepared(item.token, 10),
        "ended": lambda: worker.core.ended(map_done(item)),
        "exited": lambda: worker.core.slot_exited(1, EndCause.EXITED, "status 0"),
        "stop": lambda: worker.tell(Stop(item.token, EndCause.OPERATOR)),
        "forget": lambda: worker.tell(Forget(JOB)),
        "session": worker.core.session_ended,
        "verdict": lambda: worker.core.verdicts([map_done(item)], [Verdict.GONE]),
        "progress": lambda: worker.core.progress(item.token),
        "tick": lambda: worker.core.tick(100.5),
    }
    events[event]()
    events[event]()
    assert len(worker.core.reports(10)) <= 2
