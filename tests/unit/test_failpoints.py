"""Failpoints: parsing, counting, and each action."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import failpoints
from jobrunner.errors import SpecError, StorageFailed
from jobrunner.failpoints import NAMES, arm, failpoint, parse


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    arm("")


def test_a_list_of_failpoints_is_parsed() -> None:
    """Tests arm several at once, in one variable."""
    armed = parse(" map.start=kill , reduce.start=error:3,commit.move.one=pause:12,")
    assert {name: (point.action, point.nth) for name, point in armed.items()} == {
        "map.start": ("kill", 1),
        "reduce.start": ("error", 3),
        "commit.move.one": ("pause", 12),
    }
    assert parse("") == {}


@pytest.mark.parametrize(
    "text",
    ["map.start", "map.start=", "map.start=explode", "map.start=kill:", "map.start=kill:0", "map.start=kill:x",
     "map.start=kill:-1", "map.start=kill:1:2", "map.start=kill:²"],
)  # fmt: skip
def test_a_wrong_action_or_count_is_refused_by_name(text: str) -> None:
    """A failpoint that never fires would let a crash test pass without a crash."""
    with pytest.raises(SpecError, match=r"name=kill\|pause\|error") as caught:
        parse(text)
    assert text in str(caught.value)


def test_a_misspelt_name_is_refused() -> None:
    """Same: a failpoint that does not exist never fires."""
    with pytest.raises(SpecError, match=r"no failpoint 'map\.begin'"):
        parse("map.begin=kill")


def test_error_raises_on_the_nth_pass_only() -> None:
    """A step that is repeated after its failure must get through."""
    arm("map.start=error:2")
    failpoint("map.start")
    failpoint("reduce.start")
    with pytest.raises(StorageFailed, match=r"map\.start") as caught:
        failpoint("map.start")
    assert caught.value.fields == {"failpoint": "map.start"}
    failpoint("map.start")


def test_a_name_that_is_not_declared_is_a_bug_even_unarmed() -> None:
    """`jobrunner --failpoints` lists the declared ones; an undeclared one could never be armed."""
    with pytest.raises(AssertionError):
        failpoint("map.begin")


def test_the_environment_arms_at_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are armed from outside, by their environment alone."""
    monkeypatch.setenv("JOBRUNNER_FAILPOINTS", "map.start=error")
    monkeypatch.setattr(failpoints, "_armed", None)
    with pytest.raises(StorageFailed):
        failpoint("map.start")


def test_a_file_arms_the_first_process_that_passes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that kills each process which tries it would never be done; and a running process cannot be armed else."""
    monkeypatch.setenv("JOBRUNNER_FAILPOINTS_DIR", str(tmp_path))
    monkeypatch.setattr(failpoints, "_armed", None)
    failpoint("map.start")
    (tmp_path / "map.start").write_text("error\n")
    failpoint("reduce.start")
    with pytest.raises(StorageFailed):
        failpoint("map.start")
    assert [path.name for path in tmp_path.iterdir()] == [f"map.start.{os.getpid()}"]
    failpoint("map.start")
    (tmp_path / "map.start").write_text("explode")
    with pytest.raises(SpecError):
        failpoint("map.start")


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("pause", signal.SIGSTOP)])
def test_kill_and_pause_hit_the_process_that_passes(action: str, number: signal.Signals) -> None:
    """An exit with clean-up, or a sleep, would not be what a crash or a stopped machine is."""
    child = os.fork()
    if child == 0:
        arm(f"map.start={action}")
        failpoint("map.start")
        os._exit(0)
    _, status = os.waitpid(child, os.WUNTRACED)
    if action == "pause":
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == number
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    else:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


def test_every_name_has_its_process_and_place() -> None:
    """The list is what people read to choose one."""
    for name, where in NAMES.items():
        assert name == name.strip().lower() and where.split(": ")[0] in ("client", "master", "worker", "slot")
