"""Processes that run a commit's steps one file operation at a time, in an order the test chooses.

Each actor is a thread that waits before every operation; `step` lets one pass. A stopped process is an actor that is
not stepped, a killed one an actor whose next operation raises Killed.
"""

import os
import threading
from collections.abc import Callable

from jobrunner.commit.disk import PosixDisk

_HANG_S = 30


class Killed(BaseException):
    """kill -9: nothing catches it."""


class Actor:
    """One process. `next_call` is the operation it waits before; `result` and `error` are set once it has ended."""

    def __init__(self, name: str, body: Callable[["SteppedDisk"], object]) -> None:
        self.name = name
        self.next_call = ""
        self.is_done = False
        self.is_killed = False
        self.result: object = None
        self.error: BaseException | None = None
        self._go = threading.Semaphore(0)
        self._waits = threading.Semaphore(0)
        self._body = body
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._await()

    def step(self) -> None:
        """Let one operation happen."""
        if not self.is_done:
            self._go.release()
            self._await()

    def finish(self) -> "Actor":
        while not self.is_done:
            self.step()
        return self

    def kill(self) -> None:
        self.is_killed = True
        self.finish()

    def pass_gate(self, call: str) -> None:
        """Called by the actor's own thread before each operation."""
        self.next_call = call
        self._waits.release()
        assert self._go.acquire(timeout=_HANG_S)
        if self.is_killed:
            raise Killed

    def _run(self) -> None:
        try:
            self.result = self._body(SteppedDisk(self))
        except BaseException as error:
            self.error = error
        self.is_done = True
        self._waits.release()

    def _await(self) -> None:
        assert self._waits.acquire(timeout=_HANG_S), f"{self.name} hangs"


class SteppedDisk(PosixDisk):
    """The real disk, a gate before each operation; no syncs, since nobody cuts the power."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def mkdir(self, path: str) -> None:
        self._actor.pass_gate(f"mkdir {path}")
        super().mkdir(path)

    def make_parents(self, path: str) -> None:
        self._actor.pass_gate(f"make_parents {path}")
        super().make_parents(path)

    def rename(self, source: str, target: str) -> None:
        self._actor.pass_gate(f"rename {source} {target}")
        super().rename(source, target)

    def write_new(self, path: str, data: bytes) -> None:
        self._actor.pass_gate(f"write_new {path}")
        with open(path, "xb") as file:
            file.write(data)

    def open_new(self, path: str) -> int:
        self._actor.pass_gate(f"open_new {path}")
        return super().open_new(path)

    def read(self, path: str) -> bytes:
        self._actor.pass_gate(f"read {path}")
        return super().read(path)

    def list(self, path: str) -> list[str]:
        self._actor.pass_gate(f"list {path}")
        return super().list(path)

    def stat(self, path: str) -> os.stat_result | None:
        self._actor.pass_gate(f"stat {path}")
        return super().stat(path)

    def sync_directory(self, path: str) -> None:
        self._actor.pass_gate(f"sync_directory {path}")

    def remove_tree(self, path: str) -> None:
        """One entry an operation, deepest first, as rmtree does; ends when it finds nothing."""
        for _ in range(1000):
            self._actor.pass_gate(f"remove_tree {path}")
            if not os.path.lexists(path):
                return
            deepest = path
            while os.path.isdir(deepest) and (names := os.listdir(deepest)):
                deepest = os.path.join(deepest, min(names))
            if os.path.isdir(deepest):
                os.rmdir(deepest)
            else:
                os.unlink(deepest)
        raise AssertionError(f"{path} does not get empty")
