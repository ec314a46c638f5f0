"""The small parts of a worker: logs, files, frames, the task context, the border to user code."""

import io
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from jobrunner.control.messages import EndCause, InputPlace
from jobrunner.errors import CorruptData, Fatal, SpecError, StorageFailed
from jobrunner.ids import AttemptId, JobId, StageName
from jobrunner.planner.plan import blob_hash
from jobrunner.shuffle.reducers import BadValue
from jobrunner.storage.readers import BadInput, InputChanged
from jobrunner.worker import files, user_code, wire
from jobrunner.worker.context import COUNTERS_MAX, OutsideTask, Task, counter, param, running, task
from jobrunner.worker.logs import AttemptLog, log_directory, prune_logs, read_log

JOB = JobId("j-" + "0" * 26)
ATTEMPT = AttemptId(JOB, StageName("map"), 3, 1)


def a_task(**params: str) -> Task:
    return Task(ATTEMPT, params, "/nowhere")


# --- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_keeps_its_first_bytes_and_counts_the_rest(tmp_path: Path) -> None:
    """The cause of a failure is often at the start, the size of the flood is worth knowing."""
    log = AttemptLog(str(tmp_path / "log"), bytes_max=10, tail_bytes_max=8)
    log.stdout.write(b"0123456")
    log.stdout.write(b"789abc")
    log.stderr.write(b"XY")
    log.close()
    assert (tmp_path / "log" / "stdout").read_bytes() == b"0123456789\n[3 more bytes dropped: attempt.log_bytes_max]\n"
    assert (tmp_path / "log" / "stderr").read_bytes() == b"XY"
    assert log.tail.text() == "789abcXY"


def test_an_attempt_that_writes_nothing_leaves_no_file(tmp_path: Path) -> None:
    """A million tasks would leave two million empty files."""
    AttemptLog(str(tmp_path / "log"), bytes_max=10, tail_bytes_max=8).close()
    assert not (tmp_path / "log").exists()


def test_a_log_is_read_in_pieces(tmp_path: Path) -> None:
    """Following a log asks again from where it was."""
    log = AttemptLog(log_directory(str(tmp_path), ATTEMPT), bytes_max=100, tail_bytes_max=8)
    log.stdout.write(b"abcdef")
    assert read_log(str(tmp_path), ATTEMPT, stream="stdout", offset=2, bytes_max=3) == b"cde"
    assert read_log(str(tmp_path), ATTEMPT, stream="stdout", offset=6, bytes_max=3) == b""
    assert read_log(str(tmp_path), ATTEMPT, stream="stderr", offset=0, bytes_max=3) is None
    log.close()


# --- files -----------------------------------------------------------------------------------------------------------


def test_logs_of_the_oldest_jobs_go_first(tmp_path: Path) -> None:
    """They would fill the disk: nobody else ever deletes them."""
    prune_logs(str(tmp_path), 2)  # No job has written any.
    for name in ("j-1", "j-2", "j-3"):
        (tmp_path / "jobs" / name / "logs" / "map" / "0" / "0").mkdir(parents=True)
        (tmp_path / "jobs" / name / "logs" / "map" / "0" / "0" / "stderr").write_text("x")
    prune_logs(str(tmp_path), 2)
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["j-2", "j-3"]


def test_what_an_earlier_process_kept_for_attempts_goes_at_start(tmp_path: Path) -> None:
    """No job's end would take a blob along whose plan this process has not read: it would stay for ever."""
    directory = files.open_directory(str(tmp_path / "w"), "c")
    data = b"plan of a job that is over"
    files.keep_blob(directory, blob_hash(data), data)
    files.delete_leftovers(directory)
    assert list((tmp_path / "w" / "blobs").iterdir()) == []
    os.close(directory.lock)


def test_a_directory_keeps_its_name_and_serves_one_process(tmp_path: Path) -> None:
    """Two agents on one directory would offer each other's blocks and delete them."""
    path = str(tmp_path / "worker-1")
    first = files.open_directory(path, "c1")
    with pytest.raises(SpecError, match="in use"):
        files.open_directory(path, "c1")
    files.os.close(first.lock)
    second = files.open_directory(path, "c1")
    assert second.uuid == first.uuid
    files.os.close(second.lock)
    with pytest.raises(SpecError, match="belongs to cluster c1"):
        files.open_directory(path, "c2")


def test_a_damaged_directory_file_is_refused(tmp_path: Path) -> None:
    """A new uuid would orphan what the masters know of this directory."""
    (tmp_path / "directory.json").write_text("{")
    with pytest.raises(CorruptData, match=r"directory\.json"):
        files.open_directory(str(tmp_path), "c1")


def test_a_blob_is_what_its_name_says(tmp_path: Path) -> None:
    """A plan with a flipped bit would run another job."""
    directory = files.open_directory(str(tmp_path), "c1")
    name = blob_hash(b"plan")
    with pytest.raises(CorruptData):
        files.keep_blob(directory, name, b"other")
    path = files.keep_blob(directory, name, b"plan")
    assert files.load_blob(directory, name) == b"plan"
    Path(path).write_bytes(b"plam")
    assert files.load_blob(directory, name) is None and not Path(path).exists()
    with pytest.raises(CorruptData, match="not the name of a blob"):
        files.blob_file(directory, name.__class__("../token"))
    files.os.close(directory.lock)


# --- frames ----------------------------------------------------------------------------------------------------------


def test_frames_come_out_whole_however_bytes_arrive() -> None:
    """A stream socket cuts where it likes."""
    said = [wire.Ready(1), wire.ChildExited(3, 7, 0), wire.Ready(2)]
    data = b"".join(map(wire.frame, said))
    for size in (1, 2, 5, len(data)):
        frames: wire.Frames[Any] = wire.Frames(wire.FromTemplate)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [message for piece in pieces for message in frames.feed(piece)] == said


def test_descriptors_stay_with_their_frame() -> None:
    """A slot with another slot's pipe would write into its log."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null") as first, open("/dev/zero") as second:
        socket.send_fds(ours, [wire.frame(wire.ForkSlot(1))], [first.fileno()])
        socket.send_fds(ours, [wire.frame(wire.ForkSlot(2))], [second.fileno()])
        pipe: wire.Pipe[Any] = wire.Pipe(theirs, wire.ToTemplate)
        for child, file in ((1, first), (2, second)):
            assert pipe.receive_one() == wire.ForkSlot(child)
            (fd,) = pipe.take_fds(1)
            assert files.os.fstat(fd).st_rdev == files.os.fstat(file.fileno()).st_rdev
            files.os.close(fd)
        ours.close()
        assert pipe.receive_one() is None


# --- context ---------------------------------------------------------------------------------------------------------


def test_outside_a_task_the_context_says_so() -> None:
    """A module that calls param() at import would otherwise fail with something obscure."""
    for call in (task, lambda: counter("a"), lambda: param("a", 1)):
        with pytest.raises(OutsideTask, match="inside a map or reduce"):
            call()


def test_params_take_the_type_of_their_default() -> None:
    """Every param is text on the command line."""
    with running(a_task(number="3", flag="no", ratio="0.5", name="x")):
        assert param("number", 1) == 3 and param("flag", True) is False and param("ratio", 1.0) == 0.5
        assert param("name") == "x" and param("other", None) is None
        with pytest.raises(SpecError, match="not set and has no default"):
            param("other")
        with pytest.raises(SpecError, match="not a int"):
            param("name", 1)


def test_counters_add_up_and_have_a_limit() -> None:
    """They travel in a message of limited size: a counter a key would block the report for ever."""
    with running(a_task()) as current:
        counter("bad").add(2)
        counter("bad").add()
        counter("none").add(0)
        assert current.counted() == {"bad": 3}
        for number in range(COUNTERS_MAX - 2):
            counter(f"c{number}").add()
        with pytest.raises(SpecError, match="counters"):
            counter("one too many")


def test_progress_is_told_now_and_then() -> None:
    """A message a record would cost more than the record."""
    now, told = itertools.count(0, 0.05), []
    current = Task(ATTEMPT, {}, "/nowhere", on_progress=lambda: told.append(1), clock=lambda: next(now))
    for _ in range(100):
        current.progress()
    assert 20 <= len(told) <= 26


# --- the border to user code -----------------------------------------------------------------------------------------


def test_the_meter_counts_exactly_across_streams() -> None:
    """The counters of a job are compared by people and by tests."""
    told: list[int] = []
    meter = user_code.Meter(lambda: told.append(1))
    assert list(meter.watch(range(10_000))) == list(range(10_000))
    assert meter.count == 10_000
    assert list(meter.watch("abc")) == ["a", "b", "c"] and list(meter.watch(())) == []
    assert meter.count == 10_003 and told
    stream = meter.watch(iter(range(100)))
    next(stream)
    assert meter.count == 10_004


def test_a_slow_item_is_a_sign_of_life_of_its_own() -> None:
    """Else a batch of slow records would be taken for a hang."""
    assert user_code.next_step(4, 0.0001) == 8 and user_code.next_step(4096, 0.0) == 4096
    assert user_code.next_step(64, 0.01) == 64 and user_code.next_step(4096, 1.0) == 1


class Stateful:
    seen = 0

    def __call__(self, line: str) -> Iterator[Any]:
        self.seen += 1
        yield line, self.seen


def test_an_object_is_fresh_in_every_attempt() -> None:
    """A re-run in a used process must be the same run."""
    given = Stateful()
    for _ in range(2):
        made = user_code.ready_function(given)
        assert made.always_iterable and list(made.call("a")) == [("a", 1)]
    assert given.seen == 0
    assert list(user_code.ready_function(Stateful).call("b")) == [("b", 1)]


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def raised_by_us() -> BaseException:
    try:
        files.write_whole("/nowhere/at/all", b"")
    except OSError as error:
        own = error.__traceback__
        assert own is not None
        return error.with_traceback(own.tb_next)
    raise AssertionError


def raised_by_arrow() -> BaseException:
    """A write that fails under pyarrow, whose own frames have file names of a few words."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError(28, "full")

    batch = pyarrow.record_batch({"a": [1]})
    try:
        with pyarrow.ipc.new_stream(Full(), batch.schema) as stream:
            stream.write_batch(batch)
    except OSError as error:
        own = error.__traceback__
        assert own is not None
        return error.with_traceback(own.tb_next)
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (raised(ValueError("x")), EndCause.EXCEPTION),
        (raised(KeyboardInterrupt()), EndCause.EXCEPTION),
        (raised(Fatal("x")), EndCause.FATAL),
        (raised(MemoryError()), EndCause.MEMORY),
        (raised(OSError(28, "full")), EndCause.EXCEPTION),  # This frame is a user's, as far as it can know.
        (raised_by_us(), EndCause.STORAGE),
        (raised_by_arrow(), EndCause.STORAGE),
        (StorageFailed("x"), EndCause.STORAGE),
        (InputChanged("x"), EndCause.INPUT_CHANGED),
        (BadValue("x"), EndCause.EXCEPTION),
    ],
)
def test_the_cause_says_whose_fault_it_was(error: BaseException, cause: EndCause) -> None:
    """A full disk of the worker is not the user's bug, and the reverse."""
    assert user_code.explain(error).cause is cause


def test_a_failure_shows_place_and_user_frames() -> None:
    """`status` prints these; our own frames say nothing to a user."""
    place = InputPlace("/in.txt", 17)
    failure = user_code.explain(user_code.PlacedError(raised(ValueError("bad")), place))
    assert (failure.message, failure.place) == ("ValueError: bad", place)
    assert "raise error" in failure.traceback
    assert user_code.explain(BadInput("long", url="/in.txt", offset=3)).place == InputPlace("/in.txt", 3)


def test_an_error_whose_text_fails_is_still_an_error() -> None:
    """Its __str__ is user code too."""

    class Nasty(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "Nasty" in user_code.explain(raised(Nasty())).message


def test_blame_names_the_function() -> None:
    """The value alone does not say which function gave it."""
    with pytest.raises(BadValue, match="map function f: cannot") as caught, user_code.blame("map function f", BadValue):
        raise BadValue("cannot", reducer="Sum", key="1")
    assert caught.value.fields == {"reducer": "Sum", "key": "1"}
