"""The rules of safety of a service, from a file."""

import dataclasses
from pathlib import Path

import yaml

from esper.errors import InputError
from esper.tamiyo._check import require_keys
from esper.tamiyo._safety import Safety


def read_safety(path: Path) -> Safety:
    """The rules that a YAML file asks for, by the names that `Safety` has for them.

    Raises:
        InputError: where it cannot be read, is not YAML, names a rule that there is not, or gives
            one a value out of range.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the file of safety rules {path} cannot be read: {error.strerror or error}"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"the file of safety rules {path} is not YAML: {told}") from error
    if not isinstance(found, dict):
        raise InputError(
            f"the file of safety rules {path} is to be a mapping such as `cooldown_steps: 100`, and"
            f" holds {type(found).__name__}"
        )
    names = [field.name for field in dataclasses.fields(Safety)]
    given = {str(name): value for name, value in found.items()}
    require_keys(f"the file of safety rules {path}", given, names)
    return Safety(**given)
