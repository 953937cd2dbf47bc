"""A YAML file of the user's."""

from pathlib import Path
from typing import Any

import yaml

from esper.errors import InputError


def read_yaml(what: str, path: Path) -> Any:
    """What a YAML file holds.

    Args:
        what: the file's name in messages, such as "configuration file".

    Raises:
        InputError: where it cannot be read, or is not YAML: in one line, with the place.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        told = error.strerror or str(error)
        raise InputError(f"the {what} {path} cannot be read: {told}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {path} is not YAML: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(
            f"the {what} {path} is not YAML{place}: {error.problem or error.context}"
        ) from error
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise InputError(f"the {what} {path} is not YAML: {line}") from error
