"""Every script in raft/ prints what it says it prints. JOBRUNNER_REWRITE=1 writes what is printed now, for review."""

import os
from pathlib import Path

import pytest

from tests.scenarios.raft_script import play

SCRIPTS = sorted((Path(__file__).parent / "raft").glob("*.txt"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_prints_what_it_says(script: Path) -> None:
    """The order of saves and messages is the algorithm; here a change of it shows as a readable difference."""
    said = script.read_text()
    printed = play(said)
    if os.environ.get("JOBRUNNER_REWRITE"):
        script.write_text(printed)
    else:
        assert printed == said


def test_there_are_scripts() -> None:
    """A moved directory would pass in silence."""
    assert len(SCRIPTS) >= 6
