"""Folders that one process writes to at a time."""

import fcntl
import os
from pathlib import Path

from esper.errors import InputError


def made_own(folder: Path, kept: str, other: str) -> int:
    """A folder that no other learner writes to while the descriptor is open; made if need be.

    Args:
        kept: what is to be kept there, for an error.
        other: who else may do so.

    Raises:
        InputError: where it cannot be made or opened, or another one has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"{kept} cannot be kept in {folder}: {error}; name another folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"{kept} cannot be kept in {folder}: {other} keeps its own there; stop it first, or"
            " name another folder"
        ) from error
    return descriptor
