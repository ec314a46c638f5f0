"""Client and JobHandle against a cluster in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import JOB, FakeMasters, status_of

from jobrunner import Client, Job, Sum
from jobrunner.api.client import parse_addresses
from jobrunner.api.prepare import HASH_VERSION, default_slots
from jobrunner.control.messages import JobState, PutBlob, SubmitJob
from jobrunner.errors import CorruptData, JobKilled, Refused, SpecError, TaskError, Unavailable, Unknown, UnknownJob
from jobrunner.ids import job_id_from_number
from jobrunner.planner.plan import decode_plan
from jobrunner.shuffle.partition import HASH_VERSION as SHUFFLE_HASH_VERSION
from jobrunner.spec.settings import LimitsSection, Settings, WorkerSection


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


WORDCOUNT = Job(map=words, reduce=Sum())


@pytest.fixture
def masters() -> FakeMasters:
    return FakeMasters()


@pytest.fixture
def client(masters: FakeMasters) -> Iterator[Client]:
    with Client.over(masters, settings=Settings(limits=LimitsSection(piece_bytes=4096))) as client:
        yield client


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("a b\n" * 10)
    return path


def submitted(masters: FakeMasters) -> SubmitJob:
    (found,) = (message for message in masters.told if isinstance(message, SubmitJob))
    return found


def test_submit_sends_the_blobs_and_then_the_job(
    client: Client, masters: FakeMasters, text: Path, tmp_path: Path
) -> None:
    """Masters refuse a job whose blobs they lack; pieces must fit a frame."""
    handle = client.submit(WORDCOUNT, input=text, output=tmp_path / "out", params={"n": 3})
    job = submitted(masters)
    plan = decode_plan(masters.blobs[job.plan])
    assert handle.id == job.job == plan.job
    assert set(masters.blobs) == {job.plan, job.code}
    assert (plan.params, plan.inputs[0].url, plan.output.url) == ({"n": "3"}, str(text), str(tmp_path / "out"))
    assert isinstance(masters.told[-1], SubmitJob)


def test_code_that_went_with_another_job_is_sent_again(
    client: Client, masters: FakeMasters, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one program in a row: the clean-up of the first drops what the masters just said they had."""
    client.submit(WORDCOUNT, input=text, output=tmp_path / "out")
    kept, times = masters.call, []

    async def call(message: Any, **limits: Any) -> Any:
        if isinstance(message, SubmitJob):
            times.append(message.job)
            if len(times) == 1:
                del masters.blobs[message.code]
            if message.code not in masters.blobs:
                raise Refused("send it first")
        return await kept(message, **limits)

    monkeypatch.setattr(masters, "call", call)
    handle = client.submit(WORDCOUNT, input=text, output=tmp_path / "out2")
    assert times == [handle.id, handle.id]


def test_large_blobs_go_in_pieces(client: Client, masters: FakeMasters, text: Path, tmp_path: Path) -> None:
    """One log entry holds one piece: a blob in one message would stop the masters' heartbeats."""
    ballast = bytes(range(256)) * 64

    def heavy(line: str) -> Iterator[tuple[str, int]]:
        yield line, len(ballast)

    client.submit(Job(map=heavy), input=text, output=tmp_path / "out")
    pieces = [message for message in masters.told if isinstance(message, PutBlob)]
    assert len(pieces) > 4 and all(len(piece.data) <= 4096 for piece in pieces)


def test_reducers_follow_the_slots_of_living_workers(
    client: Client, masters: FakeMasters, text: Path, tmp_path: Path
) -> None:
    """The documented default; a lost worker's slots count for nothing."""
    client.submit(WORDCOUNT, input=text, output=tmp_path / "out")
    assert submitted(masters).stages[1].tasks == 3


def test_nothing_is_sent_for_a_wrong_job(client: Client, masters: FakeMasters, text: Path, tmp_path: Path) -> None:
    """Exit status 2 promises that nothing has started."""
    for words_ in (
        {"input": tmp_path / "none", "output": tmp_path / "out"},
        {"input": text, "output": text},
        {"input": text, "output": tmp_path / "out", "reducers": 0},
        {"input": text, "output": tmp_path / "out", "job_id": "x"},
    ):
        with pytest.raises(SpecError):
            client.submit(WORDCOUNT, **words_)  # type: ignore[arg-type]
    assert masters.blobs == {} and masters.jobs == {}


def test_submitting_again_under_the_same_id_is_the_same_job(
    client: Client, masters: FakeMasters, text: Path, tmp_path: Path
) -> None:
    """After a lost reply the output may be there already: its own output must not be an error."""
    id = "00000000-0000-0000-0000-000000000009"
    first = client.submit(WORDCOUNT, input=text, output=tmp_path / "out", job_id=id)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000.txt").write_text("x")
    assert client.submit(WORDCOUNT, input=text, output=tmp_path / "out", job_id=id).id == first.id
    assert submitted(masters).job == job_id_from_number(9)


def test_an_unknown_outcome_names_the_job_id(client: Client, masters: FakeMasters, text: Path, tmp_path: Path) -> None:
    """Without the id nobody could ask again."""
    masters.fail_submit = Unknown("no answer")
    with pytest.raises(Unknown, match="submitting again with job id j-") as caught:
        client.submit(WORDCOUNT, input=text, output=tmp_path / "out")
    assert caught.value.fields["job"] in masters.jobs


def test_wait_gives_the_result_or_raises_why_not(client: Client, masters: FakeMasters) -> None:
    """A caller that does not look at the state must not take a failed job for a done one."""
    masters.jobs[JOB] = status_of(JobState.COMMITTED)
    assert client.job(JOB).wait().counters == {"lines": 5}
    masters.jobs[JOB] = status_of(JobState.KILLED)
    with pytest.raises(JobKilled):
        client.job(JOB).wait()
    masters.jobs[JOB] = status_of(JobState.FAILED)
    with pytest.raises(TaskError, match=r"failed in .*/map/1/3: ValueError: bad line") as caught:
        client.job(JOB).wait()
    assert "line 3, in words" in caught.value.fields["traceback"]


def test_watch_shows_each_change_once_and_the_end_last(client: Client, masters: FakeMasters) -> None:
    """The display draws what comes out of here; without the end it would never stop."""
    masters.states = [JobState.QUEUED, JobState.RUNNING, JobState.COMMITTED]
    masters.jobs[JOB] = status_of(JobState.QUEUED)
    seen = list(client.job(JOB).watch())
    assert seen[-1].state is JobState.COMMITTED
    assert len({status.version for status in seen}) == len(seen)


def test_waiting_has_a_timeout_and_the_job_goes_on(client: Client, masters: FakeMasters) -> None:
    """A script's own limit must not hang on a job that does."""
    masters.states = [JobState.RUNNING]
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    with pytest.raises(TimeoutError, match="is running after"):
        list(client.job(JOB).watch(0.01))
    assert masters.jobs[JOB].state is JobState.RUNNING


def test_killing_an_ended_job_is_no_error(client: Client, masters: FakeMasters) -> None:
    """`kill` is what clean-up scripts call, whatever happened before."""
    masters.jobs[JOB] = status_of(JobState.COMMITTED)
    assert client.job(JOB).kill().state is JobState.COMMITTED
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    assert client.job(JOB).kill().state is JobState.KILLED
    with pytest.raises(UnknownJob):
        client.job(job_id_from_number(1)).kill()


def test_results_are_the_lines_of_the_parts_in_order(client: Client, masters: FakeMasters, tmp_path: Path) -> None:
    """The manifest says which files are the output; a stray file is none."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-00000.txt").write_bytes(b"a\t1\nb\r\t2\n")
    (out / "part-00001.txt").write_bytes("\u2028c\t3\n".encode())
    (out / "part-00002.txt").write_text("stray\n")
    part = {"output": "main", "attempt": 0, "token": 1, "records": 1, "bytes": 1, "checksum": "crc32:00000000"}
    parts = [{**part, "name": f"part-0000{n}.txt", "partition": n} for n in (0, 1)]
    manifest = {"job": JOB, "parts": parts, "counters": {}, "inputs": []}
    (out / "_SUCCESS").write_text(json.dumps(manifest))
    masters.jobs[JOB] = status_of(JobState.COMMITTED, output=str(out))
    assert list(client.job(JOB).wait().results()) == ["a\t1", "b\r\t2", "\u2028c\t3"]
    (out / "_SUCCESS").write_text(json.dumps({**manifest, "job": job_id_from_number(8)}))
    with pytest.raises(CorruptData, match="was replaced"):
        list(client.job(JOB).results())
    masters.jobs[JOB] = status_of(JobState.RUNNING)
    masters.states = [JobState.RUNNING]
    with pytest.raises(SpecError, match="it has no output"):
        client.job(JOB).results()


def test_a_closed_client_says_so(masters: FakeMasters) -> None:
    """A call that waited for a loop that is gone would wait for ever."""
    client = Client.over(masters)
    client.cluster()
    client.close()
    client.close()
    assert masters.closed
    with pytest.raises(Unavailable, match="closed"):
        client.cluster()


def test_addresses_are_checked() -> None:
    """A typing error must not look like a cluster that is down for a minute."""
    assert parse_addresses("a:1, [::1]:2") == ("a:1", "[::1]:2")
    for wrong in ("", "a", "a:", "a:x", "a:70000", ":1"):
        with pytest.raises(SpecError, match="allowed: host:port"):
            parse_addresses(wrong)


def test_slots_are_as_asked_or_follow_the_processors() -> None:
    """reducers follow slots: a 0 here would be a job without reducers."""
    assert default_slots(Settings(), workers=2, slots=5) == 5
    assert default_slots(Settings(worker=WorkerSection(slots=4)), workers=2) == 4
    assert default_slots(Settings(), workers=10_000) == 1


def test_the_plan_names_the_hash_that_the_shuffle_computes() -> None:
    """prepare does not import the shuffle (numpy): the two numbers could come apart."""
    assert HASH_VERSION == SHUFFLE_HASH_VERSION
