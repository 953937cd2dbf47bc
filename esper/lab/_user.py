"""Who PostgreSQL runs as: it refuses to run as root."""

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from esper.lab._errors import LabInputError

_USERS = ("postgres", "nobody")
"""Tried in this order; Debian's package makes the first, each system has the second."""


@dataclass(frozen=True)
class User:
    """A user other than root."""

    name: str
    uid: int
    gid: int


def server_user(data: Path) -> User | None:
    """The user for a server whose data are or will be in a folder; None to stay who this is.

    Raises:
        LabInputError: where root owns the data, there is no such user, or it cannot come there.
    """
    if os.geteuid() != 0:
        return None
    user = _owner(data) if data.exists() else _first()
    _refuse_unreachable(data.parent, user)
    return user


def _first() -> User:
    for name in _USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return User(name, entry.pw_uid, entry.pw_gid)
    raise LabInputError(
        f"PostgreSQL does not run as root, and this system has no user {' or '.join(_USERS)}:"
        " bring the lab up as another user"
    )


def _owner(data: Path) -> User:
    found = data.stat()
    if found.st_uid == 0:
        raise LabInputError(
            f"{data} belongs to root, and PostgreSQL does not run as root: chown -R postgres {data}"
        )
    try:
        name = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        name = f"number {found.st_uid}"
    return User(name, found.st_uid, found.st_gid)


def _refuse_unreachable(folder: Path, user: User) -> None:
    tried = subprocess.run(
        ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)],
        user=user.uid,
        group=user.gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        check=False,
    )
    if tried.returncode:
        closed = [str(part) for part in (*reversed(folder.parents), folder) if _shut(part)]
        raise LabInputError(
            f"PostgreSQL does not run as root, and the user {user.name} cannot reach {folder}"
            + (f" ({closed[0]} is closed to others)" if closed else "")
            + ": name a folder elsewhere by --folder, or let others pass through by chmod o+x"
        )


def _shut(folder: Path) -> bool:
    return not folder.stat().st_mode & 0o001
