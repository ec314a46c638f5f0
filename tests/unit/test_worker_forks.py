"""Forks of a process that has run uvloop: libuv's own handler at fork must not close what is ours."""

import subprocess
import sys

SCRIPT = """
import asyncio, os, uvloop
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(asyncio.sleep(0))
from jobrunner.worker import processes

def forked(life):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            processes.begin_child([])
            life()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

def template():
    pipes = [os.pipe() for _ in range(4)]  # Take the numbers that closing has made free.
    before = [os.fstat(fd).st_ino for pipe in pipes for fd in pipe]
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert [os.fstat(fd).st_ino for pipe in pipes for fd in pipe] == before
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

forked(template)
print("whole")
"""


def test_a_fork_of_a_fork_keeps_its_pipes_although_uvloop_ran_before() -> None:
    """A slot's stderr would be closed by its number, and a crash would leave no trace."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "whole"), result.stderr
