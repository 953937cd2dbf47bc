"""Who may ask, and for what: bearer tokens, of which only digests are kept.

A token is 32 random bytes behind a prefix by which scanners of leaked secrets can know it. What is
kept is its SHA-256, which does not tell it; so the file of tokens is no secret, but whoever can
write it decides who may ask.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esper.errors import ConflictError, InputError

PREFIX = "esper_"
_RANDOM_BYTES = 32
_MOST_TEXT = 1 << 20
_MOST_TOKENS = 1000
_LAST_MOMENT = 253_402_300_799.0
"""The end of the year 9999, the last that a date is written of."""


class Scope(StrEnum):
    """What a token allows; each allows what those before it do."""

    READ = "read"
    """Look at everything, download kernels."""
    WRITE = "write"
    """Put kernels and blueprints, change their states, claim, record."""
    ADMIN = "admin"
    """Remove, collect garbage, make and revoke tokens."""

    def allows(self, other: "Scope") -> bool:
        """Whether who has this one may do what needs the other."""
        order = list(Scope)
        return order.index(self) >= order.index(other)


TokenName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Token(BaseModel):
    """What is kept of a token."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: TokenName
    """For people, logs and revoking."""
    scope: Scope
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created: float = Field(ge=0)
    """Seconds since 1970."""
    expires: float | None = Field(default=None, ge=0)
    """Seconds since 1970 from which it is refused; None where it never is."""


class _Tokens(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    tokens: tuple[Token, ...] = Field(default=(), max_length=_MOST_TOKENS)


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def token_of(
    name: str,
    scope: Scope,
    *,
    secret: str | None = None,
    expires: float | None = None,
    now: float | None = None,
) -> tuple[str, Token]:
    """A token, and what is kept of it.

    Args:
        secret: the token itself, where it is not to be made here.

    Raises:
        InputError: for a name that is none, a secret that can be guessed, or an end that no date
            has.
    """
    if expires is not None and not 0.0 <= expires <= _LAST_MOMENT:
        raise InputError(
            f"the token {name[:64]!r} cannot expire at {expires:g} seconds since 1970: expected at"
            f" most {_LAST_MOMENT:.0f}, the end of the year 9999; leave the end out for one that"
            " never expires"
        )
    if secret is None:
        secret = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]{20,200}", secret, re.ASCII):
        raise InputError(
            f"the token {name[:64]!r} is refused: expected 20 to 200 letters, digits and"
            " -._~+/= that nobody can guess; leave it to Esper to make one"
        )
    created = time.time() if now is None else now
    try:
        token = Token(
            name=name, scope=scope, sha256=digest_of(secret), created=created, expires=expires
        )
    except ValidationError as error:
        raise InputError(
            f"a token cannot be named {name[:80]!r}: expected up to 64 letters, digits, dots,"
            " dashes and underscores, a letter or digit first"
        ) from error
    return secret, token


class TokenFile:
    """The tokens that a service knows: those of a file, and some that were given.

    The file may be changed by any process at any time: what is revoked is refused with the next
    request.

    Args:
        path: the file; None where there are only those given.
        given: tokens of the settings, which cannot be revoked here.
        clock: gives seconds since 1970.
    """

    def __init__(
        self,
        path: Path | str | None,
        given: Sequence[Token] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = None if path is None else Path(path).expanduser().absolute()
        self._given = tuple(given)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._tokens: tuple[Token, ...] = ()

    def tokens(self) -> tuple[Token, ...]:
        """Those that there are now, expired ones too.

        Raises:
            InputError: for a file that cannot be read, or holds something else.
        """
        if self.path is None:
            return self._given
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return self._given
        except OSError as error:
            raise self._unreadable(error) from error
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        if stamp != self._seen:
            with self._lock:
                self._tokens = self._read()
                self._seen = stamp
        return self._given + self._tokens

    def find(self, secret: str) -> Token | None:
        """The token that this is; None where it is none, or has expired."""
        digest = digest_of(secret)
        found = None
        for token in self.tokens():
            # All are compared, and each in a time that does not tell how much of it is right.
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is not None and found.expires is not None and found.expires <= self._clock():
            return None
        return found

    def make(self, name: str, scope: Scope, *, expires: float | None = None) -> tuple[str, Token]:
        """Make a token.

        Returns:
            The token, which is told now and never again, and what is kept of it.

        Raises:
            ConflictError: where there is one of that name.
            InputError: for a name that is none, or a file that cannot be written.
        """
        secret, token = token_of(name, scope, expires=expires, now=self._clock())
        with self._changing() as tokens:
            if any(name == other.name for other in (*self._given, *tokens)):
                raise ConflictError(
                    f"there is a token {name!r} already: revoke it first, or choose another name"
                )
            self._write((*tokens, token))
        return secret, token

    def revoke(self, name: str) -> bool:
        """Make a token worthless; False where there is none of that name.

        Raises:
            InputError: for one of the settings, or a file that cannot be written.
        """
        if any(name == token.name for token in self._given):
            raise InputError(
                f"the token {name!r} is one of the settings: take it out there, and start the"
                " service again"
            )
        with self._changing() as tokens:
            kept = tuple(token for token in tokens if token.name != name)
            if len(kept) == len(tokens):
                return False
            self._write(kept)
        return True

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[Token, ...]]:
        """What the file holds while nobody else changes it."""
        if self.path is None:
            raise InputError(
                "this service has no file of tokens: name one by --token-file, or in the settings"
                " as serve.token_file"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path.with_name(f"{self.path.name}.lock"), _LOCK_FLAGS, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield self._read() if self.path.exists() else ()
        finally:
            os.close(descriptor)

    def _read(self) -> tuple[Token, ...]:
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                text = file.read(_MOST_TEXT + 1)
            if len(text) > _MOST_TEXT:
                raise ValueError(f"it is larger than {_MOST_TEXT} bytes")
            return _Tokens.model_validate_json(text).tokens
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _write(self, tokens: tuple[Token, ...]) -> None:
        assert self.path is not None
        try:
            text = _Tokens(tokens=tokens).model_dump_json(indent=1)
        except ValidationError as error:
            raise InputError(
                f"{self.path} holds {_MOST_TOKENS} tokens, and takes no more: revoke some"
            ) from error
        try:
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=".tokens-")
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(text + "\n")
                    with contextlib.suppress(FileNotFoundError):
                        # A service of another user may read it by its mode.
                        os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode))
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _unreadable(self, error: Exception) -> InputError:
        why = error.strerror if isinstance(error, OSError) else "it is no file of tokens"
        return InputError(
            f"the tokens in {self.path} cannot be read: {why}. Expected what `esper token make`"
            " writes; put the file right, or name another by --token-file."
        )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"the tokens in {self.path} cannot be written: {error.strerror or error}. Name a file"
            " in a folder that can be written by --token-file."
        )


_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
