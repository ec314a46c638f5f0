"""The repository keeps its own rules: layers, sizes, words."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "jobrunner").rglob("*.py"))
LINES_MAX, FUNCTION_LINES_MAX = 500, 70
# Files longer than that, each of which says on top why it is one thing.
LONG = {"control/messages.py", "raft/engine.py"}
FORBIDDEN_NAMES = re.compile(r"^(utils?|common|helpers?|base|managers?|.*_v2)$")


def test_imports_point_down() -> None:
    """A layer that reaches up can no longer be tested, or replaced, without what is above it."""
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_of_a_readable_size_and_says_what_it_is(path: Path) -> None:
    """A file that grows past its purpose is where bugs hide."""
    text = path.read_text()
    tree = ast.parse(text)
    name = str(path.relative_to(ROOT / "jobrunner"))
    assert ast.get_docstring(tree), f"{name} has no page"
    assert not FORBIDDEN_NAMES.match(path.stem), f"{name}: a name that says nothing"
    assert len(text.splitlines()) <= LINES_MAX or name in LONG, f"{name} is too long: split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{name}: {node.name} has {lines} lines"


def test_importing_jobrunner_is_cheap() -> None:
    """A user's module that only names Job would cost half a second in every process."""
    heavy = ["pyarrow", "numpy", "pydantic", "aiohttp", "typer", "rich", "cloudpickle", "asyncio"]
    code = f"import jobrunner, sys; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_master_imports_neither_arrow_nor_pydantic() -> None:
    """Three masters on a laptop must stay small."""
    code = "import jobrunner.master.server, sys; print([m for m in ('pyarrow','numpy','pydantic') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
