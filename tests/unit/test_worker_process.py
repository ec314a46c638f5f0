"""A worker as a process of its own: stopped, killed, paused; and what is left of it."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from worker_fakes import FakeJob, FakeMaster, agent_config, alive, until

import jobrunner.worker.slot  # noqa: F401 - imported before the fork, so that each template starts at once
from jobrunner.control.messages import MapDone, TaskKind
from jobrunner.planner.code import StepCode
from jobrunner.rpc.server import bind
from jobrunner.shuffle.reducers import Sum
from jobrunner.worker.context import param, task
from jobrunner.worker.main import run_worker_process
from jobrunner.worker.template import start_base_template


class Worker:
    """A forked worker process; the test itself is its master."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket: socket.socket = bind("127.0.0.1", 0)
        host, port = self.socket.getsockname()
        template = start_base_template()
        self.template = template.pid
        self.pid = os.fork()
        if self.pid == 0:
            self.socket.close()
            try:
                os._exit(run_worker_process(agent_config(root, (f"{host}:{port}",)), template))
            finally:
                os._exit(99)
        template.close()

    def run(self, test: Callable[[FakeMaster], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            master = FakeMaster()
            await master.start(self.socket)
            try:
                await until(lambda: master.beats, "the first beat")
                await test(master)
            finally:
                await master.server.stop()

        try:
            asyncio.run(main())
        finally:
            if alive(self.pid):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            os.waitpid(self.template, 0)  # It sees the agent's end, and ends after all it forked or adopted.
            gc.unfreeze()

    async def end(self) -> int:
        """The worker's exit status."""
        pid, status = 0, 0

        def ended() -> bool:
            nonlocal pid, status
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return bool(pid)

        await until(ended, "the worker's end")
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def endless(line: str) -> Any:
    """Tell the pids of this slot, its template and a child of it, then go on for ever."""
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    stray = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(param("pids") + ".tmp").write_text(f"{os.getpid()} {os.getppid()} {child.pid} {stray.pid}")
    Path(param("pids") + ".tmp").rename(param("pids"))
    while True:
        task().progress()


async def start_endless(master: FakeMaster, root: Path) -> list[int]:
    job = master.add(FakeJob(root, StepCode(endless, Sum()), ["a\n"], params={"pids": str(root / "pids")}))
    master.tell(job.start(master.token(), TaskKind.MAP))
    await until((root / "pids").exists, "the slot's pids")
    return [int(word) for word in (root / "pids").read_text().split()]


def test_the_death_of_the_agent_ends_every_process_of_the_worker(worker: Worker) -> None:
    """A slot without an agent would go on writing for a worker that everybody thinks is gone."""

    async def test(master: FakeMaster) -> None:
        pids = await start_endless(master, worker.root)
        assert all(alive(pid) for pid in pids)
        os.kill(worker.pid, signal.SIGKILL)
        assert await worker.end() == -signal.SIGKILL
        await until(lambda: not any(alive(pid) for pid in (*pids, worker.template)), "the end of all processes")

    worker.run(test)


def test_a_worker_that_is_told_to_end_leaves_nothing_and_exits_with_0(worker: Worker) -> None:
    """systemd and Kubernetes send SIGTERM and look at the status."""

    async def test(master: FakeMaster) -> None:
        pids = await start_endless(master, worker.root)
        os.kill(worker.pid, signal.SIGTERM)
        assert await worker.end() == 0
        await until(lambda: not any(alive(pid) for pid in (*pids, worker.template)), "the end of all processes")

    worker.run(test)


def test_a_worker_without_its_template_ends(worker: Worker) -> None:
    """It could run nothing; its supervisor starts it anew."""

    async def test(master: FakeMaster) -> None:
        pids = await start_endless(master, worker.root)
        os.kill(worker.template, signal.SIGKILL)
        assert await worker.end() == 1
        slot, template, child, stray = pids
        await until(lambda: not any(alive(pid) for pid in (slot, template)), "the end of slots")
        for pid in (child, stray):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    worker.run(test)


def test_a_worker_that_wakes_up_hears_that_its_session_is_over(worker: Worker) -> None:
    """A paused worker must not finish what was given to others meanwhile."""

    async def test(master: FakeMaster) -> None:
        pids = await start_endless(master, worker.root)
        os.kill(worker.pid, signal.SIGSTOP)
        master.session_over = True
        os.kill(worker.pid, signal.SIGCONT)
        await until(lambda: len(master.registered) == 2, "a new registration")
        slot, _, child, stray = pids
        await until(lambda: not any(alive(pid) for pid in (slot, child, stray)), "the end of the attempt's processes")
        job = master.add(FakeJob(worker.root, StepCode(lambda line: [(line, 1)], Sum()), ["a\n"]))
        assert isinstance(await master.do(job, TaskKind.MAP), MapDone)

    worker.run(test)


def test_the_death_of_a_jobs_template_fails_its_attempts_and_the_next_start_a_new_one(worker: Worker) -> None:
    """The kernel may choose any process when memory is short."""

    async def test(master: FakeMaster) -> None:
        slot, template, child, stray = await start_endless(master, worker.root)
        os.kill(template, signal.SIGKILL)
        await until(lambda: master.ended, "the attempt's end")
        await until(lambda: not any(alive(pid) for pid in (slot, child, stray)), "the end of what it had forked")
        job = master.add(FakeJob(worker.root, StepCode(lambda line: [(line, 1)], Sum()), ["a\n"]))
        assert isinstance(await master.do(job, TaskKind.MAP), MapDone)

    worker.run(test)
