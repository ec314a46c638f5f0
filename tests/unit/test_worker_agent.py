"""An agent with real templates and slots against a master made of a script: a job from start to output."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_fakes import Cluster, alive, failed, sealed_text, until

import jobrunner.worker.slot  # noqa: F401 - imported before the fork, so that each template starts at once
from jobrunner.control.messages import (
    BlockOwner,
    EndCause,
    Failed,
    Forget,
    LossKind,
    MapDone,
    Sealable,
    StepDone,
    Stop,
    TaskKind,
    Verdict,
)
from jobrunner.errors import SpecError
from jobrunner.ids import SessionId
from jobrunner.planner.code import StepCode
from jobrunner.shuffle.reducers import Count, Sum
from jobrunner.worker.context import counter, param, task
from jobrunner.worker.template import TemplateHandle, start_base_template


@pytest.fixture
def template() -> Iterator[TemplateHandle]:
    handle = start_base_template()
    yield handle
    handle.close()
    gc.unfreeze()


def words(line: str) -> Any:
    for word in line.split():
        yield word, 1


def test_a_word_count_from_setup_to_output(tmp_path: Path, template: TemplateHandle) -> None:
    """All of a worker at once: registration, code, maps, shuffle, reduces, commit."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            job = cluster.job(StepCode(words, Sum()), ["b a\na\n", "c a b\n"], reducers=2)
            assert await master.do(job, TaskKind.SETUP) == StepDone(
                master.ended[0].attempt, master.ended[0].token, "done"
            )
            maps = await asyncio.gather(master.do(job, TaskKind.MAP, 0), master.do(job, TaskKind.MAP, 1))
            assert all(isinstance(done, MapDone) for done in maps)
            counted = maps[0].counters if isinstance(maps[0], MapDone) else {}
            assert counted == {"input.records": 2, "input.bytes": 6, "map.output_records": 3}
            reduces = [await master.do(job, TaskKind.REDUCE, number, version=1) for number in (0, 1)]
            text = "".join(sealed_text(job, done) for done in reduces)
            assert sorted(text.splitlines()) == ["a\t3", "b\t2", "c\t1"]
            digests = sum(done.digest for done in maps if isinstance(done, MapDone)) % (1 << 64)
            assert {done.consumed for done in reduces if isinstance(done, Sealable)} == {digests}
            assert isinstance(await master.do(job, TaskKind.PUBLISH), StepDone)
            assert sorted(path.name for path in job.output.iterdir()) == [
                "_SUCCESS",
                "part-00000.txt",
                "part-00001.txt",
            ]
            assert isinstance(await master.do(job, TaskKind.CLEANUP), StepDone)
            assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        assert cluster.status == 0

    asyncio.run(main())


def exits(line: str) -> Any:
    import os

    os._exit(7)


def exits_well(line: str) -> Any:
    import os

    os._exit(0)


def raises(line: str) -> Any:
    if line == "bad":
        raise ValueError("this line is bad")
    yield line, 1


def quits(line: str) -> Any:
    raise SystemExit(0)


def gives_up(line: str) -> Any:
    from jobrunner.errors import Fatal

    raise Fatal("no use")


def segfaults(line: str) -> Any:
    import ctypes

    ctypes.string_at(0)


def hangs(line: str) -> Any:
    while True:
        pass


def no_memory(line: str) -> Any:
    raise MemoryError


def bad_key(line: str) -> Any:
    yield {"a": 1}.keys(), 1


def opens_nothing(line: str) -> Any:
    with open("/nowhere/at/all") as file:
        yield file.read(), 1


@pytest.mark.parametrize(
    ("function", "cause", "words"),
    [
        (exits, EndCause.EXITED, "status 7"),
        (exits_well, EndCause.EXITED, "status 0"),
        (raises, EndCause.EXCEPTION, "ValueError: this line is bad"),
        (quits, EndCause.EXCEPTION, "SystemExit: 0"),
        (gives_up, EndCause.FATAL, "no use"),
        (segfaults, EndCause.SIGNAL, "SIGSEGV"),
        (hangs, EndCause.TIMEOUT, "no progress"),
        (no_memory, EndCause.MEMORY, "MemoryError"),
        (bad_key, EndCause.EXCEPTION, "map function bad_key"),
        (opens_nothing, EndCause.EXCEPTION, "FileNotFoundError"),
    ],
)
def test_every_end_of_user_code_has_its_cause(
    tmp_path: Path, template: TemplateHandle, function: Any, cause: EndCause, words: str
) -> None:
    """Budgets are per cause, and a user must see what happened; the worker goes on."""

    async def main() -> None:
        async with Cluster(tmp_path, template, slots=1) as cluster:
            options = {"timeout_ms": 300} if function is hangs else {}
            job = cluster.job(StepCode(function, Sum()), ["good\nbad\n"], **options)
            report = failed(await cluster.master.do(job, TaskKind.MAP))
            assert report.cause is cause, report
            assert words in report.message
            if function is raises:
                assert report.place is not None and report.place.offset == 5
                assert "raise ValueError" in report.traceback and "map_task.py" not in report.traceback
                assert cluster.log(report, "traceback").decode() == report.traceback
            if function is segfaults:
                assert "Segmentation fault" in report.tail
            good = cluster.job(StepCode(raises, Sum()), ["fine\n"])
            assert isinstance(await cluster.master.do(good, TaskKind.MAP), MapDone)

    asyncio.run(main())


def shouts(line: str) -> Any:
    print("x" * 10_000_000)
    print("the end")
    raise ValueError("after much ado")


def test_much_output_is_cut_and_its_end_travels(tmp_path: Path, template: TemplateHandle) -> None:
    """A log without a limit fills the disk of every job on the worker; the last lines are the ones that matter."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(shouts, Sum()), ["a\n"], log_bytes_max=5_000, tail_bytes_max=2_000)
            report = failed(await cluster.master.do(job, TaskKind.MAP))
            assert report.tail.endswith("xxx\nthe end\n") and len(report.tail) == 2_000
            await until(lambda: b"more bytes dropped" in cluster.log(report), "the last line of the log")
            log = cluster.log(report)
            assert log.startswith(b"x" * 5_000) and b"[9995009 more bytes dropped" in log and len(log) < 5_100

    asyncio.run(main())


def test_logs_are_served(tmp_path: Path, template: TemplateHandle) -> None:
    """`jobrunner logs` asks the worker that ran the attempt."""

    def prints(line: str) -> Any:
        print("hello", line)
        return [(line, 1)]

    async def main() -> None:
        from jobrunner.errors import Denied, Refused
        from jobrunner.rpc.client import fetch, new_session

        async with Cluster(tmp_path, template) as cluster:
            done = await cluster.master.do(cluster.job(StepCode(prints, Sum()), ["a\nb\n"]), TaskKind.MAP)
            session, stranger = new_session("secret"), new_session("wrong")
            try:
                address = cluster.agent.address
                path = f"/logs/{done.attempt}?stream=stdout&offset=6"
                assert await fetch(session, address, path, bytes_max=1000, timeout_s=5) == b"a\nhello b\n"
                with pytest.raises(Refused):
                    await fetch(session, address, f"/logs/{done.attempt}?stream=passwd", bytes_max=1000, timeout_s=5)
                with pytest.raises(Denied):
                    await fetch(stranger, address, path, bytes_max=1000, timeout_s=5)
            finally:
                await session.close()
                await stranger.close()

    asyncio.run(main())


def test_a_job_with_state_params_and_counters(tmp_path: Path, template: TemplateHandle) -> None:
    """Everything user code may use: a class with setup and close, task(), param(), counter(), scratch."""

    class Longest:
        def setup(self) -> None:
            self.longest = ""
            self.least = param("least", default=0)

        def __call__(self, line: str) -> Any:
            counter("lines").add()
            if len(line) > max(len(self.longest), self.least):
                self.longest = line

        def close(self) -> Any:
            current = task()
            Path(current.scratch_directory, "note").write_text("x")
            assert current.split is not None and current.split.path.endswith(".txt")
            yield self.longest, current.partition

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(Longest), ["aa\nb\ncccc\n", "d\n"], reducers=0, params={"least": "1"})
            await cluster.master.do(job, TaskKind.SETUP)
            ends = [await cluster.master.do(job, TaskKind.MAP, number) for number in (0, 1)]
            assert [sealed_text(job, end) for end in ends] == ["cccc\t0\n", "\t1\n"]
            assert isinstance(ends[0], Sealable) and ends[0].counters["lines"] == 3
            assert not any((tmp_path / "worker-1" / "scratch" / job.id).glob("*/*"))

    asyncio.run(main())


def test_count_takes_bare_keys_and_pairs(tmp_path: Path, template: TemplateHandle) -> None:
    """A bare word, a pair, and a tuple of three that can only be a key."""

    def keys(line: str) -> Any:
        return [line, (line, 5), (1, 2, 3)]

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(keys, Count()), ["a\na\n"])
            await cluster.master.do(job, TaskKind.SETUP)
            await cluster.master.do(job, TaskKind.MAP)
            done = await cluster.master.do(job, TaskKind.REDUCE, version=1)
            assert sorted(sealed_text(job, done).splitlines()) == ["[1, 2, 3]\t2", "a\t4"]

    asyncio.run(main())


def test_user_modules_that_do_not_import_fail_the_attempt(tmp_path: Path, template: TemplateHandle) -> None:
    """The user's mistake, shown with the user's traceback."""
    (tmp_path / "broken_jobs.py").write_text("import no_such_module_anywhere\n")

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(_step_of("broken_jobs"), ["a\n"], sys_path=[str(tmp_path)])
            report = failed(await cluster.master.do(job, TaskKind.MAP))
            assert report.cause is EndCause.EXCEPTION and "no_such_module_anywhere" in report.message
            assert "broken_jobs.py" in report.traceback

    asyncio.run(main())


def test_an_import_that_hangs_ends_in_time(tmp_path: Path, template: TemplateHandle) -> None:
    """A module that waits for a server at import would hold its job for ever."""
    (tmp_path / "slow_jobs.py").write_text("while True:\n    pass\n")

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(_step_of("slow_jobs"), ["a\n"], sys_path=[str(tmp_path)], import_timeout_ms=300)
            report = failed(await cluster.master.do(job, TaskKind.MAP))
            assert report.cause is EndCause.TIMEOUT and "import_timeout_ms" in report.message
            assert "slow_jobs.py" in report.traceback

    asyncio.run(main())


def test_modules_that_start_threads_are_imported_by_each_slot(tmp_path: Path, template: TemplateHandle) -> None:
    """A fork copies one thread: whatever the others held stays locked for ever in the child."""
    text = "import threading, time\nthreading.Thread(target=lambda: time.sleep(60), daemon=True).start()\n"
    text += "def words(line):\n    return [(threading.active_count(), 1)]\n"
    (tmp_path / "threaded_jobs.py").write_text(text)

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(_step_of("threaded_jobs"), ["a\n"], reducers=0, sys_path=[str(tmp_path)])
            await cluster.master.do(job, TaskKind.SETUP)
            assert sealed_text(job, await cluster.master.do(job, TaskKind.MAP)) == "2\t1\n"

    asyncio.run(main())


def _step_of(module: str) -> StepCode:
    """A step whose map is `words` of a module, by reference; this process does not import it."""
    return StepCode(ByName(module), Sum())


class ByName:
    """A map that pickles as `module.words`."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __call__(self, line: str) -> Any:
        raise AssertionError("never called under this name")

    def __reduce__(self) -> Any:
        return words_of, (self._module,)


def words_of(module: str) -> Any:
    import importlib

    importlib.invalidate_caches()
    return importlib.import_module(module).words


# --- stops, deaths, sessions -----------------------------------------------------------------------------------------


def leaves_a_child(line: str) -> Any:
    """Write the pids of this process and of a grandchild, then go on for ever."""
    import os
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    Path(param("pids") + ".tmp").write_text(f"{os.getpid()} {child.pid}")
    Path(param("pids") + ".tmp").rename(param("pids"))
    while True:
        task().progress()


async def _pids(path: Path) -> list[int]:
    await until(path.exists, "the child's pids")
    return [int(word) for word in path.read_text().split()]


def test_a_stopped_attempt_dies_with_its_children(tmp_path: Path, template: TemplateHandle) -> None:
    """What user code started would go on eating the machine, and writing."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            params = {"pids": str(tmp_path / "pids")}
            job = cluster.job(StepCode(leaves_a_child, Sum()), ["a\n"], params=params)
            start = job.start(cluster.master.token(), TaskKind.MAP)
            cluster.master.tell(start)
            pids = await _pids(tmp_path / "pids")
            assert all(alive(pid) for pid in pids)
            cluster.master.tell(Stop(start.token, EndCause.SUPERSEDED))
            await until(lambda: not any(alive(pid) for pid in pids), "the end of the slot and its child")
            await until(lambda: cluster.master.beats[-1].held == [], "a beat without the attempt")
            assert cluster.master.ended == []

    asyncio.run(main())


def hangs_in_reduce(key: Any, values: Any) -> Any:
    yield key, sum(values)
    while True:
        task().progress()


def test_a_beat_says_that_a_reduce_has_all_its_input(tmp_path: Path, template: TemplateHandle) -> None:
    """The leader must know it before a worker is lost, or restarts reduces that run well."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            job = cluster.job(StepCode(words, hangs_in_reduce), ["a\n"])
            await master.do(job, TaskKind.SETUP)
            await master.do(job, TaskKind.MAP)
            start = job.start(master.token(), TaskKind.REDUCE, 0, version=1)
            master.tell(start)
            await until(lambda: any(held.ready for held in master.beats[-1].held), "a beat with a ready reduce")
            assert [held.token for held in master.beats[-1].held] == [start.token]

    asyncio.run(main())


def test_answers_in_pages_are_put_together(tmp_path: Path, template: TemplateHandle) -> None:
    """One answer for 30,000 maps fits no frame: no reduce of such a job could start, and no output be published."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            master.page_rows = 1
            job = cluster.job(StepCode(words, Sum()), ["a\n", "b\n", "a c\n"], reducers=2)
            await master.do(job, TaskKind.SETUP)
            for number in range(3):
                await master.do(job, TaskKind.MAP, number)
            reduces = [await master.do(job, TaskKind.REDUCE, number, version=1) for number in (0, 1)]
            assert sorted("".join(sealed_text(job, done) for done in reduces).split()) == ["1", "1", "2", "a", "b", "c"]
            await master.do(job, TaskKind.PUBLISH)
            assert len(list(job.output.glob("part-*"))) == 2

    asyncio.run(main())


def test_an_attempt_that_cannot_be_prepared_ends(
    tmp_path: Path, template: TemplateHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody thought of would leave it waiting for ever, and its job with it."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master

            def refuses(asked: object) -> Any:
                raise SpecError("does not fit a frame")

            monkeypatch.setattr(master, "_map_outputs", refuses)
            job = cluster.job(StepCode(words, Sum()), ["a\n"])
            ended = await master.do(job, TaskKind.REDUCE, version=1)
            assert isinstance(ended, Failed)
            assert (ended.cause, ended.message) == (EndCause.STORAGE, "does not fit a frame")

    asyncio.run(main())


def test_blocks_are_offered_before_the_first_beat(tmp_path: Path, template: TemplateHandle) -> None:
    """A beat says that there is room for work: the maps that are about to be offered would run again."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            await master.do(cluster.job(StepCode(words, Sum()), ["a\n"]), TaskKind.MAP)
            master.session_over = True
            await until(lambda: master.offered, "an offer")
            assert not [beat for beat in master.beats_at_offer if beat.session == master.session]

    asyncio.run(main())


@pytest.mark.parametrize("keep", [True, False])
def test_a_job_that_ended_while_the_worker_was_lost_is_forgotten(
    tmp_path: Path, template: TemplateHandle, keep: bool
) -> None:
    """No master remembers that this worker had any of it: its template and files would stay for ever."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            job = cluster.job(StepCode(words, Sum()), ["a\n"])
            await master.do(job, TaskKind.MAP)
            master.keep, master.session_over = keep, True
            beats = len(master.beats)
            await until(lambda: master.offered and len(master.beats) > beats, "a beat of the new session")
            assert (tmp_path / "worker-1" / "blocks" / job.id).exists() is keep
            assert (job.id in cluster.agent._pool.jobs()) is keep

    asyncio.run(main())


def test_without_a_leader_results_wait(tmp_path: Path, template: TemplateHandle) -> None:
    """An election must not cost finished work."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(words, Sum()), ["a b\n"])
            start = job.start(cluster.master.token(), TaskKind.MAP)
            cluster.master.tell(start)
            cluster.master.mute = True
            await until(lambda: cluster.agent._core.reports(1), "the attempt's end")
            assert cluster.master.ended == []
            cluster.master.mute = False
            assert isinstance(await cluster.master.end_of(start), MapDone)

    asyncio.run(main())


def test_the_end_of_a_session_kills_registers_and_offers(tmp_path: Path, template: TemplateHandle) -> None:
    """What a zombie would go on doing is done by others; the blocks it has may still be of use."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master, params = cluster.master, {"pids": str(tmp_path / "pids")}
            done = await master.do(cluster.job(StepCode(words, Sum()), ["a b\n"]), TaskKind.MAP)
            endless = cluster.job(StepCode(leaves_a_child, Sum()), ["a\n"], params=params)
            master.tell(endless.start(master.token(), TaskKind.MAP))
            pids = await _pids(tmp_path / "pids")
            master.session_over = True
            await until(lambda: len(master.registered) == 2, "a second registration")
            assert not any(alive(pid) for pid in pids)
            assert master.registered[0].process == master.registered[1].process
            await until(lambda: master.offered, "an offer")
            assert isinstance(done, MapDone) and done.counters["input.records"] == 1
            found = [(block.token, block.counters) for block in master.offered[0].blocks]
            assert found == [(done.token, done.counters)]
            again = cluster.job(StepCode(words, Sum()), ["c\n"])
            assert isinstance(await master.do(again, TaskKind.MAP), MapDone)

    asyncio.run(main())


def test_files_of_a_lost_attempt_are_deleted_and_of_a_winner_kept(tmp_path: Path, template: TemplateHandle) -> None:
    """The loser's files cost space; the winner's are the output."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            job = cluster.job(StepCode(words), ["a b\n"], reducers=0)
            await master.do(job, TaskKind.SETUP)
            master.verdict = lambda _: Verdict.WON
            winner = await master.do(job, TaskKind.MAP)
            master.verdict = lambda _: Verdict.LOST
            loser = await master.do(job, TaskKind.MAP, attempt=1)
            folder = job.output.parent / f".{job.output.name}.jr-{job.id}" / "attempts"
            await until(lambda: not (folder / f"0-1-{loser.token}").exists(), "the loser's files to go")
            assert sealed_text(job, winner) == "a\t1\nb\t1\n"

    asyncio.run(main())


def test_a_forgotten_job_leaves_nothing_on_the_worker(tmp_path: Path, template: TemplateHandle) -> None:
    """Blocks and blobs of every job ever run would fill the disk."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(words, Sum()), ["a b\n"])
            await cluster.master.do(job, TaskKind.MAP)
            root = tmp_path / "worker-1"
            assert any((root / "blocks" / job.id).rglob("*.jrb")) and any((root / "blobs").iterdir())
            cluster.master.tell(Forget(job.id))
            left = ("blocks", "blobs", "scratch", "answers", "trash")
            await until(lambda: not any(any((root / name).iterdir()) for name in left), "an empty directory")
            assert isinstance(await cluster.master.do(job, TaskKind.MAP), MapDone)

    asyncio.run(main())


def test_map_output_that_cannot_be_read_is_reported_before_the_reducers_end(
    tmp_path: Path, template: TemplateHandle
) -> None:
    """The masters must know whom to blame: the reducer is not charged."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            master = cluster.master
            job = cluster.job(StepCode(words, Sum()), ["a\n"])
            await master.do(job, TaskKind.SETUP)
            done = await master.do(job, TaskKind.MAP)
            master.lost_owner = BlockOwner(SessionId(1), "f" * 32, "127.0.0.1:1")
            report = failed(await master.do(job, TaskKind.REDUCE, version=1))
            assert report.cause is EndCause.LOST_INPUT
            (lost,) = master.lost
            assert (lost.reader, lost.lost, lost.kind) == (report.attempt, [done.attempt], LossKind.UNREACHABLE)
            master.lost_owner = None
            assert isinstance(await master.do(job, TaskKind.REDUCE, attempt=1, version=2), Sealable)

    asyncio.run(main())


def test_a_refused_step_says_so(tmp_path: Path, template: TemplateHandle) -> None:
    """A foreign output is a definite no, not a failure to try again."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(words), ["a\n"], reducers=0)
            job.output.parent.joinpath(f".{job.output.name}.jr-{job.id}").write_text("in the way")
            report = await cluster.master.do(job, TaskKind.SETUP)
            assert isinstance(report, StepDone) and report.outcome == "refused" and report.detail

    asyncio.run(main())


@pytest.mark.parametrize(("tidy", "stays"), [(True, False), (False, True)])
def test_a_set_up_that_comes_too_late_leaves_no_stage(
    tmp_path: Path, template: TemplateHandle, tidy: bool, stays: bool
) -> None:
    """It would lie beside the output for ever; but the stage of a job that still runs is not ours to delete."""

    async def main() -> None:
        async with Cluster(tmp_path, template) as cluster:
            job = cluster.job(StepCode(words), ["a\n"], reducers=0)
            cluster.master.verdict, cluster.master.tidy = (lambda _: Verdict.GONE), tidy
            await cluster.master.do(job, TaskKind.SETUP)
            stage = job.output.parent / f".{job.output.name}.jr-{job.id}"
            await until(lambda: cluster.master.asked_jobs, "a question about the job")
            await until(lambda: stage.exists() is stays, "the stage to go or stay")

    asyncio.run(main())
