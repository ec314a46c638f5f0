"""Which cluster, and with which token."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobrunner.cli.locate import Where, locate, settings_of
from jobrunner.cluster.directory import ClusterDir, create_cluster_dir
from jobrunner.errors import SpecError
from jobrunner.spec.settings import Settings


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterDir:
    return create_cluster_dir(tmp_path / "home", Settings(), workers=1, slots=1)


def test_the_order_is_flag_directory_environment_here(cluster: ClusterDir, tmp_path: Path) -> None:
    """A kill that went to another cluster than meant would be worse than none."""
    none, home = tmp_path / "none", cluster.path
    environ = {"JOBRUNNER_CLUSTER": "env:1", "JOBRUNNER_TOKEN_FILE": str(home / "token")}
    own = tuple(cluster.addresses)
    assert locate(Where(cluster="flag:1", directory=home), environ, none).addresses == ("flag:1",)
    assert locate(Where(directory=home), environ, none).addresses == own
    assert locate(Where(), environ, home).addresses == ("env:1",)
    found = locate(Where(), {}, home)
    assert (found.addresses, found.token, found.cluster_id) == (own, cluster.token, cluster.cluster_id)


def test_the_token_comes_from_flag_environment_or_directory(cluster: ClusterDir, tmp_path: Path) -> None:
    """Addresses alone prove nothing; a token file of the directory tells the cluster's id as well."""
    other = tmp_path / "token"
    other.write_text("secret\n")
    none = tmp_path / "none"
    assert locate(Where(cluster="a:1", token_file=other), {}, none).token == "secret"
    assert locate(Where(cluster="a:1"), {"JOBRUNNER_TOKEN_FILE": str(other)}, none).token == "secret"
    assert locate(Where(cluster="a:1"), {}, cluster.path).token == cluster.token
    assert locate(Where(cluster="a:1", token_file=other), {}, none).cluster_id == ""
    assert locate(Where(cluster="a:1", token_file=cluster.path / "token"), {}, none).cluster_id == cluster.cluster_id


def test_what_is_missing_is_said(cluster: ClusterDir, tmp_path: Path) -> None:
    """Each of these is somebody's first command."""
    none, empty = tmp_path / "none", tmp_path / "empty"
    empty.touch()
    for where, line in (
        (Where(), "no cluster: give --cluster"),
        (Where(cluster="a:1"), "no token: give --token-file"),
        (Where(cluster="a"), "allowed: host:port"),
        (Where(cluster="a:1", token_file=none), "cannot be read: No such file"),
        (Where(cluster="a:1", token_file=empty), "it is empty"),
        (Where(directory=none), "not a cluster directory"),
    ):
        with pytest.raises(SpecError, match=line):
            locate(where, {}, none)


def test_the_reach_timeout_is_a_setting() -> None:
    """60 s is too long for a health check."""
    assert settings_of(Where(reach_timeout_s=1.5), config=None, sets=[]).limits.reach_timeout_ms == 1500
    with pytest.raises(SpecError, match="--reach-timeout: found 0"):
        settings_of(Where(reach_timeout_s=0), config=None, sets=[])


def test_help_loads_nothing_heavy() -> None:
    """Completion and people in a hurry call it; pyarrow and aiohttp cost half a second."""
    code = (
        "import sys\nfrom jobrunner.cli import app\n"
        "heavy = 'pyarrow', 'numpy', 'aiohttp', 'pydantic', 'fsspec', 'asyncio'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"
