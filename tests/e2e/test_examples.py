"""The examples as a user runs them: the command line, a cluster of their own, real files."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_input(tmp_path: Path) -> Path:
    directory = tmp_path / "in"
    (directory / "deep").mkdir(parents=True)
    (directory / "a.py").write_text("import os\nprint(os.name)\n\nimport sys\n")
    (directory / "deep" / "b.txt").write_bytes("größe import\r\nlast line without end".encode())
    (directory / "_ignored.txt").write_text("ignored\n")
    (directory / "odd.txt").write_bytes(b"caf\xe9 import\n")
    return directory


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "jobrunner", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result


def read_output(output: Path) -> list[tuple[str, str]]:
    lines = [line for part in sorted(output.glob("part-*")) for line in part.read_text().splitlines()]
    return [(key, value) for key, _, value in (line.partition("\t") for line in lines)]


def test_wordcount_counts_what_split_finds(tmp_path: Path) -> None:
    """The first thing a user tries; its JSON is what scripts read."""
    directory = make_input(tmp_path)
    result = run("run", "examples/wordcount.py", str(directory), "--output", str(tmp_path / "out"), "--json")
    expected: Counter[str] = Counter()
    for name in ("a.py", "deep/b.txt", "odd.txt"):
        expected.update((directory / name).read_bytes().decode("utf-8", "replace").split())
    assert {key: int(value) for key, value in read_output(tmp_path / "out")} == dict(expected)
    status = json.loads(result.stdout)
    assert status["state"] == "committed" and status["counters"]["input.undecodable_lines"] == 1
    assert run("verify", str(tmp_path / "out")).returncode == 0


def test_grep_finds_lines_without_a_reduce(tmp_path: Path) -> None:
    """A map-only job has one part per map task."""
    directory = make_input(tmp_path)
    run("run", "examples/grep.py", str(directory), "--output", str(tmp_path / "out"), "--param", "pattern=^import")
    found = [line for part in sorted((tmp_path / "out").glob("part-*")) for line in part.read_text().splitlines()]
    assert len(found) == 2 and all(re.search(r"import (os|sys)", line) for line in found)


def test_line_length_asks_the_task_for_the_file(tmp_path: Path) -> None:
    """task() tells which file a record comes from."""
    directory = make_input(tmp_path)
    run("run", "examples/line_length.py", str(directory), "--output", str(tmp_path / "out"))
    assert {key for key, _ in read_output(tmp_path / "out")} == {".py", ".txt"}
