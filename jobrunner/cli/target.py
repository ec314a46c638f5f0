"""TARGET -> Job: run the user's file or module, and say in one line what is wrong with it."""

import importlib
import importlib.util
import os
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from jobrunner.api.job import Job
from jobrunner.api.pack import by_value
from jobrunner.errors import SpecError

DEFAULT_NAME = "job"
_ALLOWED = "path/to/file.py, path/to/file.py:name or package.module:name"


@dataclass(frozen=True, slots=True)
class Target:
    """A job and what to call it."""

    job: Job
    name: str


def load_target(text: str) -> Target:
    """The Job that `text` names. Runs user code: what it prints goes to stderr, a Ctrl-C passes.

    Raises SpecError; field `traceback` is the user's if the code raised.
    """
    place, name = _split(text)
    if place.endswith(".py") or os.sep in place or Path(place).is_file():
        module = _from_file(Path(place))
        label = Path(place).stem
    else:
        module = _from_module(place)
        label = place.rpartition(".")[2]
    return Target(_pick(module, name, place), label if name == DEFAULT_NAME else name)


def _split(text: str) -> tuple[str, str]:
    place, colon, name = text.rpartition(":")
    if not colon:
        return text, DEFAULT_NAME
    if not place or not name.isidentifier():
        raise SpecError(f"TARGET: found {text!r}, allowed: {_ALLOWED}")
    return place, name


def _from_file(path: Path) -> ModuleType:
    if not path.exists():
        raise SpecError(f"TARGET: no file {str(path)!r}")
    if path.suffix != ".py" or not path.is_file():
        raise SpecError(f"TARGET: found {str(path)!r}, allowed: {_ALLOWED}")
    path = path.absolute()
    directory = str(path.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)  # As `python file.py` would; workers get it too.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names or not path.stem.isidentifier()
    name = f"jobrunner_target_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses and pickle look a module up by its name.
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise _not_python(path, error) from error
    except (Exception, SystemExit) as error:
        raise _raised(str(path), error) from error
    by_value(module)
    return module


def _from_module(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise SpecError(f"TARGET: found {place!r}, allowed: {_ALLOWED}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            hint = f"; did you mean {place}.py?" if Path(place + ".py").is_file() else ""
            raise SpecError(f"TARGET: no module {place!r}{hint}") from error
        raise _raised(place, error) from error
    except SyntaxError as error:
        raise _not_python(place, error) from error
    except (Exception, SystemExit) as error:
        raise _raised(place, error) from error


def _pick(module: ModuleType, name: str, place: str) -> Job:
    found = getattr(module, name, None)
    if isinstance(found, Job):
        return found
    jobs = [key for key, value in vars(module).items() if isinstance(value, Job)]
    hint = "there is no Job in it: write `job = Job(map=...)`"
    if jobs:
        hint = "it has " + ", ".join(f"{place}:{key}" for key in jobs)
    if found is not None:
        raise SpecError(f"TARGET: {name!r} in {place} is of type {type(found).__name__}, not a Job; {hint}")
    raise SpecError(f"TARGET: no {name!r} in {place}; {hint}")


def _not_python(place: Path | str, error: SyntaxError) -> SpecError:
    where = f", line {error.lineno}" if error.lineno else ""
    return SpecError(f"TARGET: {error.filename or place}{where} is not Python: {error.msg}")


def _raised(place: str, error: BaseException) -> SpecError:
    """The error, with the user's traceback: the frames of the import machinery and ours are left out."""
    if isinstance(error, SpecError) and error.__traceback__ is None:
        return error
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    line = traceback.format_exception_only(error)[-1].strip()
    return SpecError(f"TARGET: {place} raised when it was imported: {line}", traceback=text)


_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def _is_ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE, "<frozen importlib")) or os.sep + "importlib" + os.sep in filename
