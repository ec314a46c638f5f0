"""TARGET: every way to get it wrong gives one line that says how to mend it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import Job
from jobrunner.api.pack import pack_job
from jobrunner.cli.target import load_target
from jobrunner.errors import SpecError
from jobrunner.planner.code import open_code

GOOD = "from jobrunner import Job\ndef split(line):\n    return [(line, HERE)]\nHERE = 3\njob = Job(map=split)\n"


@pytest.fixture(autouse=True)
def clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def refusal(target: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load_target(target)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_file_gives_its_job_named_after_the_file(tmp_path: Path) -> None:
    """The name is what `jobs` lists."""
    (tmp_path / "my_words.py").write_text(GOOD + "other = Job(map=split, name='x')\n")
    found = load_target("my_words.py")
    assert isinstance(found.job, Job) and found.name == "my_words"
    assert load_target("my_words.py:other").name == "other"


def test_a_module_gives_its_job(tmp_path: Path) -> None:
    """Jobs in packages are named as modules."""
    (tmp_path / "pack_of_jobs").mkdir()
    (tmp_path / "pack_of_jobs" / "__init__.py").touch()
    (tmp_path / "pack_of_jobs" / "count.py").write_text(GOOD)
    assert load_target("pack_of_jobs.count").name == "count"
    assert load_target("pack_of_jobs.count:job").job.step.map("a") == [("a", 3)]


def test_functions_of_a_file_travel_by_value(tmp_path: Path) -> None:
    """A worker must run what was submitted, even if the file is changed or deleted before it starts."""
    path = tmp_path / "travelling.py"
    path.write_text(GOOD)
    bundle = open_code(pack_job(load_target(str(path)).job))
    path.unlink()
    del sys.modules["travelling"]
    (step,) = bundle.load()
    assert step.map("a") == [("a", 3)]
    assert bundle.sys_path[0] == str(tmp_path)


def test_a_file_may_have_the_name_of_a_module(tmp_path: Path) -> None:
    """`json.py` would replace the standard library's for everybody else in the process."""
    (tmp_path / "json.py").write_text(GOOD)
    standard = sys.modules.get("json")
    assert load_target("./json.py").name == "json"
    assert sys.modules.get("json") is standard


def test_what_the_file_prints_does_not_reach_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`submit` prints the job id alone, `--json` one object: a user's print would break both."""
    (tmp_path / "chatty.py").write_text("print('hello')\n" + GOOD)
    load_target("chatty.py")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "hello\n"


def test_a_target_that_is_no_target_is_refused(tmp_path: Path) -> None:
    """Each line says what was found and what is allowed."""
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "several.py").write_text(GOOD.replace("job =", "first = second ="))
    (tmp_path / "number.py").write_text(GOOD + "job, real = 7, job\n")
    assert "no file 'missing.py'" in str(refusal("missing.py"))
    assert "found 'notes.txt', allowed: path/to/file.py" in str(refusal("notes.txt"))
    assert "wrong.py, line 1 is not Python" in str(refusal("wrong.py"))
    assert "there is no Job in it" in str(refusal("none.py"))
    assert "it has several.py:first, several.py:second" in str(refusal("several.py"))
    assert "no 'third' in several.py" in str(refusal("several.py:third"))
    assert "'job' in number.py is of type int, not a Job; it has number.py:real" in str(refusal("number.py"))
    assert "no module 'no_such.module'" in str(refusal("no_such.module:job"))
    assert "allowed: path/to/file.py" in str(refusal("none.py:a b"))


def test_an_error_at_import_comes_with_the_users_traceback_only(tmp_path: Path) -> None:
    """Our frames and those of importlib would hide the line that matters."""
    (tmp_path / "raising.py").write_text("def go():\n    raise ValueError('no')\ngo()\n")
    error = refusal("raising.py")
    assert "raised when it was imported: ValueError: no" in str(error)
    trace = error.fields["traceback"]
    assert "line 2, in go" in trace and "importlib" not in trace and "target.py" not in trace


def test_sys_exit_at_import_does_not_end_the_command(tmp_path: Path) -> None:
    """A script without a main guard would end `jobrunner run` with status 0 and no output."""
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    assert "SystemExit: 0" in str(refusal("leaving.py"))


def test_a_module_that_misses_another_says_which(tmp_path: Path) -> None:
    """`no module 'mine'` would be a lie: it is there."""
    (tmp_path / "missing_import.py").write_text("import no_such_thing\n")
    assert "No module named 'no_such_thing'" in str(refusal("missing_import"))
    assert "No module named 'no_such_thing'" in str(refusal("missing_import.py"))
