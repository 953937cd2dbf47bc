"""Whether anything is configured, and where: cheap to ask, for commands that mostly are not."""

from collections.abc import Mapping
from pathlib import Path

FILE = "esper.yaml"
PREFIX = "ESPER_"
CONFIG = "ESPER_CONFIG"
OTHER_VARIABLES = (CONFIG, "ESPER_CACHE_DIR")
"""Variables that are no settings: the file of settings, and the folder of verdicts."""


def places(environ: Mapping[str, str]) -> list[Path]:
    """Where a file of settings is looked for that nobody has named."""
    own = environ.get("XDG_CONFIG_HOME")
    home = environ.get("HOME")
    folders = [Path(own)] if own else [Path(home, ".config")] if home else []
    return [Path(FILE), *(folder / "esper" / FILE for folder in folders)]


def file_asked_for(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file that is named, which has to be there."""
    named = environ.get(CONFIG)
    return config if config is not None else Path(named) if named else None


def found_file(environ: Mapping[str, str]) -> Path | None:
    """The first file of settings that is there, of those that nobody has named."""
    # Whoever reads it refuses what is there and no file, such as a folder of that name.
    return next((path for path in places(environ) if path.exists()), None)


def own_variables(environ: Mapping[str, str]) -> list[str]:
    """The variables of the environment that say something to Esper and are no settings' file."""
    return [
        name
        for name, value in environ.items()
        if name.upper().startswith(PREFIX) and name.upper() not in OTHER_VARIABLES and value
    ]


def is_configured(config: Path | None, environ: Mapping[str, str]) -> bool:
    """Whether there is a setting anywhere, or what wants to be one."""
    return bool(file_asked_for(config, environ) or own_variables(environ) or found_file(environ))
