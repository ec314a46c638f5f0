"""Settings as TOML: `cluster.toml`, which `cluster up` writes and daemons read, and the commented files of `conf/`.

Nothing here needs pydantic: a daemon reads its resolved settings with tomllib and msgspec in a millisecond.

    python -m jobrunner.spec.settings_file conf        writes conf/*.toml anew
"""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec

from jobrunner.errors import SpecError
from jobrunner.spec.keys import Key, keys, sections
from jobrunner.spec.settings import Settings

CONF_INTROS = {
    "local.toml": "Settings for a cluster on this machine: `jobrunner run --config FILE`, `cluster up --config FILE`.",
    "cluster.toml": "Settings for daemons started by hand on several machines: copy to every cluster directory, where\n"
    "`jobrunner master --config DIR/cluster.toml` and `worker --config DIR/cluster.toml` read it.",
}
_ALL_CONF = """Every key is here, commented out, with its default, unit and reason. Precedence: flag
(--set section.key=value), environment (JOBRUNNER_SECTION__KEY), this file, default.
Made by `python -m jobrunner.spec.settings_file conf`."""


def dump_toml(settings: Settings) -> str:
    """Every value as it is resolved, with its reason: a later version's defaults do not change a running cluster."""
    intro = "Resolved settings of this cluster; its daemons read them at start."
    return _render(intro, lambda key: _line(key, getattr(getattr(settings, key.section), key.name)))


def conf_text(name: str) -> str:
    """The text of `conf/<name>`: every key commented out with its default."""
    return _render(f"{CONF_INTROS[name]}\n{_ALL_CONF}", lambda key: "# " + _line(key, key.default))


def read_settings(path: Path) -> Settings:
    """The settings in `path`; what is not there has its default. Raises SpecError naming file and key."""
    try:
        settings = msgspec.convert(tomllib.loads(path.read_text("utf-8")), Settings)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: {str(error).replace('$.', '')}") from error
    for key in keys().values():
        found = getattr(getattr(settings, key.section), key.name)
        if not key.allows(found):
            raise SpecError(f"{path}: {key.path}: found {found!r}, allowed: {key.allowed}")
    return settings


def _render(intro: str, line: Callable[[Key], str]) -> str:
    parts = ["\n".join(f"# {text}" for text in intro.splitlines())]
    for section, members in sections().items():
        rows = [f"[{section}]"]
        for key in members:
            rows += [f"# {key.about.reason}: {key.allowed}", line(key)]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _line(key: Key, value: int | str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return f"{key.name} = {json.dumps(value)}".replace("\x7f", "\\u007f")


if __name__ == "__main__":
    for name in CONF_INTROS:
        Path(sys.argv[1], name).write_text(conf_text(name), "utf-8")
