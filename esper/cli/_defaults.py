"""Options that were not given are what the settings say.

Settings are read when a command that has such an option runs, and only where something is
configured: in most places there is nothing, and reading them takes a tenth of a second.
"""

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from esper.cli._console import err, say
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.settings import Loaded

Setting = tuple[tuple[str, ...], Callable[["Loaded"], Any]]
"""The names of settings, and what an option takes where one of them is given."""


def _plain(name: str) -> Setting:
    return (name,), lambda loaded: loaded.value(name)


def _secret(name: str) -> Setting:
    return (name,), lambda loaded: loaded.value(name).get_secret_value()


def _place(loaded: "Loaded") -> str:
    where = loaded.settings.library.where
    if where is None:
        raise InputError(
            f"this command works on a library in a folder or behind `esper serve`, and"
            f" {loaded.origins['library.database']} names a database: give --library, or run"
            " `esper serve` where the database can be reached"
        )
    return where


def _folder(loaded: "Loaded") -> str:
    where = _place(loaded)
    if where.startswith(("http://", "https://")):
        raise InputError(
            f"this command works on a library in a folder, and {loaded.origins['library.where']}"
            f" says that it is at {where}: give --library FOLDER, or run it where the folder is"
        )
    return str(Path(where).expanduser())


def _folder_if_any(loaded: "Loaded") -> str:
    try:
        return _folder(loaded)
    except InputError:
        return NO_FOLDER


NO_FOLDER = "-"
"""The folder of a library where the settings name one that is elsewhere."""
_FOLDER: Setting = (("library.where", "library.database"), _folder)
_PLACE: Setting = (("library.where",), _place)
"""Of commands that open by themselves what has a database."""
_BUS = _secret("bus.url")

OPTIONS: Mapping[str, Mapping[str, Setting]] = {
    "kernels": {"library": _FOLDER},
    "token": {"library": (_FOLDER[0], _folder_if_any), "token_file": _plain("serve.token_file")},
    "blueprints": {"library": _PLACE, "bus": _BUS},
    "library": {"library": _PLACE},
    "grow": {"bus": _BUS, "bus_capacity": _plain("telemetry.capacity")},
    "worker": {
        "library": _PLACE,
        "bus": _BUS,
        **{name: _plain(f"worker.{name}")
           for name in ("workers", "name", "lease", "grace", "measure", "metrics",
                        "metrics_host")},
    },
    "tamiyo": {
        "bus": _BUS,
        **{name: _plain(f"tamiyo.{name}")
           for name in ("host", "port", "shadow", "learn", "policy", "most_kl", "save_every",
                        "safety", "sample", "capacity")},
        # `esper tamiyo train` has a folder of its own.
        "kept": _plain("tamiyo.folder"),
    },
    "serve": {
        "library": (("library.where",), _folder),
        "database": _secret("library.database"),
        "blobs": _plain("library.blobs"),
        **{name: _plain(f"serve.{name}")
           for name in ("host", "port", "token_file", "workers", "max_upload", "rate", "grace",
                        "open_metrics", "certificate", "key")},
    },
}  # fmt: skip
"""Which options of which command, or of all commands of a group, are settings."""


class Defaults(MutableMapping[str, Any]):
    """What click asks for the defaults of a command's options, and of the commands in a group.

    Args:
        load: reads the settings; None where nothing is configured.
        command: `esper` itself, one of its commands or groups, or a command in a group; some
            versions of typer have a click of their own, so its type is none of click's.
        settings: by the names of its options.
    """

    def __init__(
        self,
        load: "Callable[[], Loaded | None]",
        command: Any,
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        self._load = load
        self._command = command
        own = {parameter.name for parameter in command.params}
        self._settings = {key: it for key, it in (settings or {}).items() if key in own}
        self._below = settings

    def __contains__(self, name: object) -> bool:
        own = self._settings.get(str(name))
        if own is None:
            return False
        try:
            loaded = self._load()
        except InputError:
            return True  # and whoever asks for its value is told why there is none
        return loaded is not None and any(map(loaded.is_given, own[0]))

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return lambda: self._value(name)

    def _value(self, name: str) -> Any:
        try:
            loaded = self._load()
            assert loaded is not None
            return self._settings[name][1](loaded)
        except InputError as error:
            say(err, "red", str(error))
            raise typer.Exit(2) from None

    def get(self, key: str, default: Any = None) -> Any:
        """The default of an option, or the defaults of a command."""
        if key in self:
            return self[key]
        commands = self._command.commands if isinstance(self._command, TyperGroup) else {}
        if key not in commands:
            return default
        below = OPTIONS.get(key) if self._below is None else self._below
        return Defaults(self._load, commands[key], below or {})

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._settings if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("what the settings say is not changed here")

    def __delitem__(self, name: str) -> None:
        raise TypeError("what the settings say is not changed here")


def defaults_of(command: Any, config: Path | None) -> Defaults:
    """The defaults of all commands of `esper`.

    Args:
        config: the file of settings that was named, if any.
    """
    read: list[Loaded] = []

    def load() -> "Loaded | None":
        from esper.settings import is_configured

        if not is_configured(config, os.environ):
            return None
        if not read:
            from esper.settings import load_settings

            read.append(load_settings(config))
        return read[0]

    return Defaults(load, command)
