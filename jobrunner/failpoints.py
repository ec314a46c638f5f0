"""Failpoints: named places where anybody's test can kill, pause or fail a process.

`JOBRUNNER_FAILPOINTS=name=kill|pause|error[:n],...` acts on the n-th pass (default the first) in each process that
passes it. Every name is declared here, so that `jobrunner --failpoints` lists them and a misspelt one is refused.

`JOBRUNNER_FAILPOINTS_DIR=DIR` arms processes that run: a file DIR/name that holds an action makes the first process
that passes act, once; it renames the file to `name.PID` before it acts, so that whoever waits knows which it was.
"""

import os
import signal
from dataclasses import dataclass, field

from jobrunner.errors import SpecError, StorageFailed

NAMES: dict[str, str] = {
    "client.submit.before": "client: everything checked, nothing sent",
    "client.submit.after": "client: the job is accepted, the id is not yet printed",
    "master.submit.applied": "master: SubmitJob is applied",
    "master.assign.applied": "master: an assignment is applied, not yet sent",
    "master.seal.applied": "master: a winner is fixed, the worker does not know yet",
    "master.commit.applied": "master: CommitJob is applied, nothing is published",
    "master.committed.applied": "master: JobCommitted is applied, clean-up is due",
    "master.cleaned.applied": "master: clean-up is recorded and the path released",
    "commit.setup.before": "worker: set-up task, before the stage directory is made",
    "commit.setup.after": "worker: set-up done, not yet reported",
    "commit.attempt.mkdir": "worker: the attempt's directory exists, no file yet",
    "commit.attempt.written": "worker: files written, not yet synced",
    "commit.attempt.synced": "worker: files durable, not yet reported for sealing",
    "commit.sealed": "worker: told that its attempt won",
    "commit.record.temp": "worker: COMMIT.json written as a temporary file",
    "commit.record.after": "worker: COMMIT.json has its name",
    "commit.move.one": "worker: one winner's file moved into final/",
    "commit.move.all": "worker: all winners in final/",
    "commit.success.temp": "worker: _SUCCESS written as a temporary file",
    "commit.success.after": "worker: _SUCCESS has its name in final/",
    "commit.replace.moved": "worker: the old output is out of the way",
    "commit.publish.before": "worker: about to rename final/ to the output",
    "commit.publish.after": "worker: the output has its name, its parent is not yet synced",
    "commit.publish.reported": "worker: published and synced, not yet reported",
    "commit.cleanup.trash": "worker: the stage is renamed to trash",
    "commit.cleanup.after": "worker: trash deleted, not yet reported",
    "commit.retract.trash": "worker: retracting, the stage is renamed to trash",
    "commit.retract.after": "worker: retraction decided, not yet reported",
    "map.start": "slot: a map attempt starts",
    "map.block.temp": "slot: block file written under its temporary name",
    "map.block.after": "slot: block file has its name, not yet reported",
    "map.reported": "worker: told that its map output counts",
    "reduce.start": "slot: a reduce attempt starts",
    "reduce.fetched": "slot: all input is here, no user code ran",
    "worker.registered": "worker: has a session",
    "worker.assigned": "worker: an instruction to start arrived",
}


@dataclass
class _Armed:
    action: str
    nth: int
    passed: int = field(default=0)


def parse(text: str) -> dict[str, _Armed]:
    """Armed failpoints from `name=action[:n],...`. Raises SpecError naming the wrong part."""
    armed: dict[str, _Armed] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, rest = part.partition("=")
        action, colon, count = rest.partition(":")
        if name not in NAMES:
            raise SpecError(f"JOBRUNNER_FAILPOINTS: no failpoint {name!r} (`jobrunner --failpoints` lists them)")
        nth = (int(count) if count.isascii() and count.isdigit() else 0) if colon else 1
        if action not in ("kill", "pause", "error") or nth < 1:
            raise SpecError(f"JOBRUNNER_FAILPOINTS: {part!r} is not name=kill|pause|error[:n], n from 1")
        armed[name] = _Armed(action, nth)
    return armed


_armed: dict[str, _Armed] | None = None
_directory = ""


def arm(text: str) -> None:
    """Arm exactly these in this process, all passes uncounted; "" disarms. In place of the environment's."""
    global _armed, _directory
    _armed, _directory = parse(text), ""


def failpoint(name: str) -> None:
    """Pass the failpoint `name`: nothing happens unless it is armed. `error` raises StorageFailed."""
    global _armed, _directory
    if _armed is None:
        _armed = parse(os.environ.get("JOBRUNNER_FAILPOINTS", ""))
        _directory = os.environ.get("JOBRUNNER_FAILPOINTS_DIR", "")
    assert name in NAMES, name
    if _directory and (action := _take(name)):
        _act(name, action)
    if not _armed or name not in _armed:
        return
    point = _armed[name]
    point.passed += 1
    if point.passed == point.nth:
        _act(name, point.action)


def _take(name: str) -> str:
    """The action in DIR/name, if this process is the first to come by; else "". Raises SpecError."""
    path = os.path.join(_directory, name)
    taken = f"{path}.{os.getpid()}"
    try:
        os.rename(path, taken)
    except FileNotFoundError:
        return ""
    with open(taken, encoding="utf-8") as file:
        return parse(f"{name}={file.read().strip()}")[name].action


def _act(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise StorageFailed(f"failpoint {name}", failpoint=name)
