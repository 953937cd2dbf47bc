"""Settings read, each with where it comes from."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from esper.errors import InputError
from esper.settings._file import CUT, FileContent, read_settings_file, shown_key
from esper.settings._found import (
    OTHER_VARIABLES,
    PREFIX,
    file_asked_for,
    found_file,
    own_variables,
    places,
)
from esper.settings._password import HIDDEN, without_password
from esper.settings._secret import SecretUrl
from esper.settings._settings import (
    VARIABLES,
    Settings,
    section_of,
    setting_fields,
    variable_of,
)

DEFAULT = "default"

_FIELDS = dict(setting_fields())


class _FileAlone(Settings):
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class Loaded(NamedTuple):
    """Settings, and where each comes from."""

    settings: Settings
    origins: Mapping[str, str]
    """By dotted name: `default`, `esper.yaml:3`, or the name of a variable."""
    file: Path | None
    """The file that was read."""
    looked_in: tuple[Path, ...]
    """Where a file was looked for."""

    def value(self, name: str) -> Any:
        """The value of a setting by its dotted name, secrets as they are."""
        found: Any = self.settings
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def is_given(self, name: str) -> bool:
        """Whether a setting was configured, and has not its default."""
        return self.origins[name] != DEFAULT


def load_settings(config: Path | None = None) -> Loaded:
    """Read the file of settings and the environment.

    The file is the first of: `config`, `$ESPER_CONFIG`, `./esper.yaml`, and `esper/esper.yaml` in
    `$XDG_CONFIG_HOME` or `~/.config`. The first two have to be there. A variable such as
    ESPER_LIBRARY__WHERE goes before the file; one that is empty is none.

    Raises:
        InputError: naming every key and variable that is unknown and every value that is not
            valid, with its place; secrets are in no message.
    """
    environ = os.environ
    asked = file_asked_for(config, environ)
    path = asked or found_file(environ)
    content = FileContent({}, {}) if path is None else read_settings_file(path)
    variables = {name.upper(): name for name in own_variables(environ)}
    problems = _unknown_variables(variables)
    looked_in = (asked,) if asked is not None else tuple(places(environ))
    settings = _made(path, content, variables, problems)
    return Loaded(settings, _origins(path, content, variables), path, looked_in)


def check_settings_file(path: Path) -> Loaded:
    """Read a file of settings alone, without the environment.

    Raises:
        InputError: as `load_settings` does.
    """
    content = read_settings_file(path)
    settings = _made(path, content, None, [])
    return Loaded(settings, _origins(path, content, {}), path, (path,))


def _made(
    path: Path | None,
    content: FileContent,
    variables: Mapping[str, str] | None,
    problems: list[str],
) -> Settings:
    """Settings of a file and, where `variables` are given, of the environment.

    Raises:
        InputError: for all that is wrong.
    """
    data, unknown = _known(path, content, Settings, content.data, "")
    if problems or unknown:
        raise InputError("; ".join([*problems, *unknown]))
    try:
        return _FileAlone(**data) if variables is None else Settings(**data)
    except ValidationError as error:
        problems = [_told(path, content, variables or {}, each) for each in error.errors()]
    # Not from the error, which holds the values.
    raise InputError("; ".join(problems)) from None


def _known(
    path: Path | None, content: FileContent, model: type[BaseModel], data: Any, prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """What of a section is known, and complaints about the rest."""
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in model.model_fields:
            line = content.lines.get(name)
            where = f"{path}:{line}" if line else str(path)
            problems.append(_unknown_key(where, model, prefix, shown_key(str(key))))
            continue
        section = section_of(model.model_fields[key])
        if section is None:
            kept[key] = value
        elif isinstance(value, dict):
            kept[key], more = _known(path, content, section, value, f"{name}.")
            problems += more
        elif value is not None:  # `library:` with nothing below it says nothing
            problems.append(
                f"{path}:{content.lines[name]}: {name} is a section: expected settings such as"
                f" {next(iter(section.model_fields))} below it"
            )
    return kept, problems


def _unknown_key(where: str, model: type[BaseModel], prefix: str, key: str) -> str:
    known = list(model.model_fields)
    plain = key.removesuffix(CUT)
    near = difflib.get_close_matches(plain, known, n=1) or [
        own for own in known if len(plain) > 2 and plain in own
    ]
    elsewhere = [own for own in _FIELDS if own.rpartition(".")[2] == plain]
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"expected one of {', '.join(known)}"
    if key.endswith(CUT):
        hint += " (a space is wanted after the colon that ends a key)"
    return f"{where}: there is no setting '{prefix}{key}'; {hint}"


def _unknown_variables(variables: Mapping[str, str]) -> list[str]:
    # What all of them begin with would make any two of them alike.
    known = [own.removeprefix(PREFIX) for own in (*VARIABLES, *OTHER_VARIABLES)]
    problems: list[str] = []
    for upper, name in sorted(variables.items()):
        if upper in VARIABLES:
            continue
        near = difflib.get_close_matches(upper.removeprefix(PREFIX), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {PREFIX}{near[0]}?"
            if near
            else "`esper config show` lists those that are"
        )
        problems.append(f"nothing reads the environment variable {name}; {hint}")
    return problems


def _told(path: Path | None, content: FileContent, variables: Mapping[str, str], error: Any) -> str:
    """One thing that is wrong, with its place, and what came where that is no secret."""
    name = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    variable = variable_of(name)
    if variable in variables:
        where = variables[variable]
    elif name in content.lines:
        where = f"{path}:{content.lines[name]}: {name}"
    else:
        # Of a whole section: its parts may come from several places.
        where = name or "settings"
    came = error.get("input")
    shown = (
        name in _FIELDS
        and not is_secret(_FIELDS[name])
        and error["type"] != "value_error"
        and isinstance(came, str | int | float)
    )
    return f"{where}: {message}" + (
        f" (got {without_password(repr(came), whole=True)[:100]})" if shown else ""
    )


def _origins(
    path: Path | None, content: FileContent, variables: Mapping[str, str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _FIELDS:
        variable = variable_of(name)
        if variable in variables:
            found[name] = variables[variable]
        elif name in content.lines:
            found[name] = f"{path}:{content.lines[name]}"
        else:
            found[name] = DEFAULT
    return found


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting may hold a secret."""
    text = repr(field.annotation)
    return SecretStr.__name__ in text or SecretUrl.__name__ in text


def shown_value(value: Any) -> Any:
    """A setting's value as it may be shown: JSON-able, and without secrets."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, SecretUrl):
        return without_password(value.get_secret_value(), whole=True)
    return without_password(value, whole=True) if isinstance(value, str) else value
