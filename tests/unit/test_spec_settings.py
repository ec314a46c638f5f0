"""Settings: precedence, errors that name the key, and files that follow the one list."""

from pathlib import Path

import pytest

from jobrunner.errors import SpecError
from jobrunner.spec.keys import keys
from jobrunner.spec.load import load_settings
from jobrunner.spec.settings import RaftSection, Settings
from jobrunner.spec.settings_file import CONF_INTROS, conf_text, dump_toml, read_settings

REPOSITORY = Path(__file__).parents[2]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def refusal(*sets: str, file: Path | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load_settings(file, sets, environ or {})
    return str(caught.value)


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    """The documented precedence: somebody's override would otherwise be ignored without a word."""
    file = written(tmp_path, "[raft]\nheartbeat_ms = 20\nelection_ms = 200\ninflight_max = 2\n")
    environ = {"JOBRUNNER_RAFT__ELECTION_MS": "300", "JOBRUNNER_RAFT__INFLIGHT_MAX": "3"}
    raft = load_settings(file, ["raft.inflight_max=4"], environ).raft
    assert (raft.heartbeat_ms, raft.election_ms, raft.inflight_max) == (20, 300, 4)
    assert raft.segment_bytes_max == RaftSection().segment_bytes_max


def test_nothing_given_is_the_defaults() -> None:
    """The embedded default must not need a file."""
    assert load_settings(None, [], {}) == Settings()


def test_variables_that_are_no_settings_are_left_alone() -> None:
    """JOBRUNNER_CLUSTER is an address list; read as the section `cluster` it would break every command."""
    environ = {"JOBRUNNER_CLUSTER": "127.0.0.1:1", "JOBRUNNER_FAILPOINTS": "x=kill", "JOBRUNNER_TOKEN_FILE": "t"}
    assert load_settings(None, [], environ) == Settings()


def test_an_unknown_key_is_refused_with_the_nearest_right_one() -> None:
    """A misspelt limit that is silently ignored is found out at the worst time."""
    assert refusal("raft.electon_ms=1") == (
        "raft.electon_ms (--set raft.electon_ms): no such key; did you mean raft.election_ms?"
    )
    assert "did you mean shuffle?" in refusal("shufle.merge_runs_max=1")
    line = refusal(environ={"JOBRUNNER_RAFT__HARTBEAT_MS": "1"})
    assert "environment JOBRUNNER_RAFT__HARTBEAT_MS" in line and "raft.heartbeat_ms" in line


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("raft.election_ms=soon", "found 'soon', allowed: an integer, at least 50 (ms)"),
        ("raft.election_ms=3", "found '3', allowed: an integer, at least 50 (ms)"),
        ("cluster.masters=9", "found '9', allowed: an integer from 1 to 7"),
        ("shuffle.compression=gz", "found 'gz', allowed: one of lz4, zstd, none"),
        ("election=3", "allowed: section.key=value"),
        ("raft.election_ms", "allowed: section.key=value"),
    ],
)
def test_a_wrong_value_names_what_was_found_and_what_is_allowed(setting: str, line: str) -> None:
    """One line must be enough to mend it."""
    assert line in refusal(setting)


def test_a_wrong_file_names_itself(tmp_path: Path) -> None:
    """With several sources, the line must say which one to edit."""
    assert "cannot be read" in refusal(file=tmp_path / "none.toml")
    assert "not TOML" in refusal(file=written(tmp_path, "[raft"))
    assert "settings.toml" in refusal(file=written(tmp_path, "[raft]\nelection_ms = 1\n"))
    assert "allowed: a table" in refusal(file=written(tmp_path, "raft = 1\n"))
    assert "allowed: an integer" in refusal(file=written(tmp_path, "[cluster]\nmasters = true\n"))


def test_a_daemon_reads_back_what_was_dumped(tmp_path: Path) -> None:
    """cluster.toml is the only way settings reach daemons."""
    settings = Settings(raft=RaftSection(election_ms=777))
    file = written(tmp_path, dump_toml(settings))
    assert read_settings(file) == settings == load_settings(file, [], {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[raft]\nelection_ms = 1\n", ["raft.election_ms", "at least 50"]),
        ("[raft]\nelection_ms = 'x'\n", ["raft.election_ms"]),
        ("[raft]\nelektion_ms = 1\n", ["elektion_ms", "raft"]),
        ("[[[", ["not TOML"]),
    ],
)
def test_a_daemon_refuses_a_wrong_file_by_key(tmp_path: Path, text: str, words: list[str]) -> None:
    """cluster.toml may be edited by hand; a daemon has no pydantic to check it."""
    file = written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_settings(file)
    assert all(word in str(caught.value) for word in [str(file), *words])


@pytest.mark.parametrize("name", CONF_INTROS)
def test_conf_files_list_every_key_with_its_default(name: str) -> None:
    """conf/ would drift from the code. To renew: python -m jobrunner.spec.settings_file conf"""
    assert (REPOSITORY / "conf" / name).read_text() == conf_text(name)


def test_conf_text_uncommented_is_the_defaults(tmp_path: Path) -> None:
    """People uncomment lines: each must be right as it stands."""
    lines = [line.removeprefix("# ") for line in conf_text("local.toml").splitlines()]
    values = [
        line for line in lines if line.startswith("[") or line.split(" = ")[0] in {k.name for k in keys().values()}
    ]
    assert len(values) == len(keys()) + len({key.section for key in keys().values()})
    assert load_settings(written(tmp_path, "\n".join(values)), [], {}) == Settings()


def test_every_default_is_within_its_bounds() -> None:
    """A default that its own check refuses could not be written in a file."""
    assert [key.path for key in keys().values() if not key.allows(key.default)] == []
