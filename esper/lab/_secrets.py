"""Passwords, keys and tokens: made once, in a file that only its owner reads."""

import os
import secrets
import stat
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esper.lab._errors import LabInputError
from esper.lab._folder import write_whole


class LabSecrets(BaseModel):
    """All that a lab keeps secret. None of it may need quoting in an address or a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    postgres_superuser: str = Field(pattern="^[0-9a-zA-Z_-]{16,}$", repr=False)
    postgres: str = Field(pattern="^[0-9a-zA-Z_-]{16,}$", repr=False)
    redis: str = Field(pattern="^[0-9a-zA-Z_-]{16,}$", repr=False)
    s3_key: str = Field(pattern="^[0-9A-Z]{16,}$", repr=False)
    s3_secret: str = Field(pattern="^[0-9a-zA-Z_-]{16,}$", repr=False)
    admin_token: str = Field(pattern="^[0-9a-zA-Z_-]{32,}$", repr=False)
    user_token: str = Field(pattern="^[0-9a-zA-Z_-]{32,}$", repr=False)
    worker_token: str = Field(pattern="^[0-9a-zA-Z_-]{32,}$", repr=False)

    @classmethod
    def new(cls) -> Self:
        """Of the system's own randomness."""
        return cls(
            postgres_superuser=secrets.token_hex(16),
            postgres=secrets.token_hex(16),
            redis=secrets.token_hex(16),
            s3_key=secrets.token_hex(10).upper(),
            s3_secret=secrets.token_hex(20),
            admin_token=secrets.token_urlsafe(32),
            user_token=secrets.token_urlsafe(32),
            worker_token=secrets.token_urlsafe(32),
        )


def secrets_of(path: Path, *, used: bool) -> LabSecrets:
    """The secrets of a lab: those of its file, or new ones, written there.

    Args:
        path: the file.
        used: whether data are there already that want the old ones.

    Raises:
        LabInputError: where the file is damaged, others may read it, or it is lost.
        LabError: where it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if used:
            raise LabInputError(
                f"{path} is lost, and the data beside it were made with its passwords: put it back"
                " from a copy, or name another folder by --folder to begin a new lab"
            ) from None
        made = LabSecrets.new()
        write_whole(path, made.model_dump_json(indent=2) + "\n")
        return made
    except OSError as error:
        raise LabInputError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        text = file.read(1 << 16)
    if mode & 0o077:
        raise LabInputError(
            f"{path} has mode {mode:04o}, so that others can read its passwords: chmod 600 {path}"
        )
    try:
        return LabSecrets.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LabInputError(
            f"{path} is damaged ({where}: {first['msg']}): put it back from a copy, or name another"
            " folder by --folder to begin a new lab"
        ) from None
