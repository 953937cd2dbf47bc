"""What a learner knows as one file: its arrays as safetensors, and beside them what they mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from esper._files import write_atomically
from esper.errors import InputError

SCHEMA_VERSION = 1
_KIND = "esper-online-learning"


def write_online(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write it, whole or not at all."""
    about = {"kind": _KIND, "schema_version": SCHEMA_VERSION} | about
    own = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomically(path, save(own, {"esper": json.dumps(about)}))


def read_online(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write_online` wrote.

    Raises:
        InputError: where there is no such file, it is damaged or something else, or was written by
            a newer Esper.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("esper", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path}: expected a file that a learner of `esper tamiyo serve` wrote"
        ) from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged, or holds nothing learned: {error}") from error
    if about.get("kind") != _KIND:
        raise InputError(
            f"{path} holds nothing learned: expected a file that a learner of `esper tamiyo serve`"
            " wrote"
        )
    if about["schema_version"] > SCHEMA_VERSION:
        raise InputError(
            f"{path} was written by a newer Esper, schema {about['schema_version']}; this one reads"
            f" up to {SCHEMA_VERSION}: update Esper, or begin in another folder"
        )
    return about, arrays
