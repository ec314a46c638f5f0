"""Settings for people: flag, environment, file, default, in this order; an error names its key and its source.

The pydantic models are built from `settings.py`, the only list of keys. With nothing given the defaults are returned
without importing pydantic, which would be a fifth of a tiny job's time.
"""

import functools
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from jobrunner.errors import SpecError
from jobrunner.spec.keys import Key, keys, sections
from jobrunner.spec.settings import Settings

if TYPE_CHECKING:
    from pydantic import BaseModel

_Layer = dict[str, Any]
_PREFIX = "JOBRUNNER_"


def load_settings(
    file: Path | None = None, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Settings:
    """The settings of `sets` (each `section.key=value`) over `environ` over the TOML `file` over the defaults.

    `environ` None means the process's own. Only names JOBRUNNER_SECTION__KEY are settings there.
    Raises SpecError: key path, what was found, what is allowed.
    """
    origins: dict[str, str] = {}
    layers = [
        _from_flags(sets, origins),
        _from_environment(os.environ if environ is None else environ, origins),
        _from_file(file, origins),
    ]
    if not any(layers):
        return Settings()
    return _validate(layers, origins)


def _from_flags(sets: Sequence[str], origins: dict[str, str]) -> _Layer:
    layer: _Layer = {}
    for text in sets:
        path, equals, value = text.partition("=")
        section, dot, name = path.strip().partition(".")
        if not (equals and dot and section and name):
            raise SpecError(f"--set: found {text!r}, allowed: section.key=value, e.g. input.split_bytes=1000000")
        layer.setdefault(section, {})[name] = value.strip()
        origins.setdefault(section, f"--set {path.strip()}")
        origins.setdefault(f"{section}.{name}", f"--set {path.strip()}")
    return layer


def _from_environment(environ: Mapping[str, str], origins: dict[str, str]) -> _Layer:
    # JOBRUNNER_CLUSTER, JOBRUNNER_FAILPOINTS and the like have no double underscore: they are not settings.
    layer: _Layer = {}
    for variable, value in environ.items():
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        section, _, name = variable[len(_PREFIX) :].lower().partition("__")
        layer.setdefault(section, {})[name] = value
        origins.setdefault(section, f"environment {variable}")
        origins.setdefault(f"{section}.{name}", f"environment {variable}")
    return layer


def _from_file(file: Path | None, origins: dict[str, str]) -> _Layer:
    if file is None:
        return {}
    try:
        layer = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SpecError(f"--config {file}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: not TOML: {error}") from error
    for section, members in layer.items():
        origins.setdefault(section, str(file))
        for name in members if isinstance(members, dict) else ():
            origins.setdefault(f"{section}.{name}", str(file))
    return layer


def _validate(layers: list[_Layer], origins: dict[str, str]) -> Settings:
    from pydantic import ValidationError

    from jobrunner.spec.explain import explain

    known = {key.path: key.allowed for key in keys().values()} | dict.fromkeys(sections(), "a table [section]")
    try:
        model = _loader()(_layers=layers)
    except ValidationError as error:
        line = explain(error, known=known, origin=lambda path: f" ({origins[path]})" if path in origins else "")
        raise SpecError(line) from error
    return msgspec.convert(model.model_dump(), Settings)


@functools.cache
def _loader() -> Any:
    """A BaseSettings class whose sources are the layers it is called with, the first one strongest."""
    from pydantic import create_model
    from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

    class Layered(BaseSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(init_settings, InitSettingsSource)
            layers = init_settings.init_kwargs["_layers"]
            return tuple(InitSettingsSource(settings_cls, layer) for layer in layers)

    fields: dict[str, Any] = {name: (_section_model(name), {}) for name in sections()}
    Layered.model_config["extra"] = "forbid"
    return create_model("SettingsModel", __base__=Layered, **fields)


def _section_model(name: str) -> "type[BaseModel]":
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {key.name: _field(key) for key in sections()[name]}
    return create_model(f"{name.title()}Model", __config__=ConfigDict(extra="forbid"), **fields)


def _field(key: Key) -> tuple[Any, Any]:
    from typing import Annotated

    from pydantic import BeforeValidator, Field

    bounded = Annotated[key.kind, Field(ge=key.about.ge, le=key.about.le)] if key.kind is int else key.kind
    return Annotated[bounded, BeforeValidator(_not_bool)], key.default


def _not_bool(value: object) -> object:
    # pydantic reads true as 1; in a file of counts and milliseconds it is a mistake.
    return "true" if value is True else "false" if value is False else value
