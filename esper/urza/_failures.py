"""What went wrong with a database or a store of files, as an error of Esper's."""

import contextlib
import sqlite3
from collections.abc import Iterator

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionFreeError

from esper.errors import AccessDeniedError, EsperError, LibraryError, ServiceUnavailableError

FAILURES = (OSError, OverflowError, BaseError, SQLAlchemyError, sqlite3.Error)
"""What databases and stores of files raise."""

_AWAY = ("08", "57P", "53300")
"""Beginnings of PostgreSQL's codes: no connection; it is going down or coming up; too many."""
_DENIED = ("28", "42501")


def reason(error: BaseException) -> str:
    """An error in one line, without what SQLAlchemy and obstore add to it."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]


def is_away(error: BaseException) -> bool:
    """Whether a server cannot be reached, and may be reached later."""
    if isinstance(error, NoConnectionFreeError):
        return True
    if isinstance(error, DBAPIError):
        code = getattr(error.orig, "sqlstate", "")
        if isinstance(error.orig, sqlite3.Error):
            return False
        return error.connection_invalidated or (
            code.startswith(_AWAY) if code else type(error).__name__ == "OperationalError"
        )
    if isinstance(error, BaseError):
        text = reason(error)
        return "HTTP error" in text or any(
            f"status code: {code}" in text for code in (500, 502, 503, 504, 429)
        )
    return False


def is_denied(error: BaseException) -> bool:
    """Whether a server refused who asks."""
    if isinstance(error, DBAPIError):
        code = getattr(error.orig, "sqlstate", None) or ""
        # libpq gives no code for a connection that was refused.
        return code.startswith(_DENIED) or "authentication failed" in str(error.orig)
    denied = (PermissionDeniedError, UnauthenticatedError)
    return isinstance(error, denied) or (
        isinstance(error, BaseError) and "status code: 403" in reason(error)
    )


def failure(what: str, error: BaseException) -> EsperError:
    """The error to raise for one of `FAILURES`.

    Args:
        what: what could not be done, and where.
    """
    if is_denied(error):
        return AccessDeniedError(
            f"{what}: {reason(error)}. Check the name and the secret that the library is given."
        )
    if is_away(error):
        return ServiceUnavailableError(f"{what}: {reason(error)}. Try again later.")
    return LibraryError(f"{what}: {reason(error)}")


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Raise what a database or a store raises inside as an error of Esper's."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, EsperError):
            raise
        raise failure(what, error) from error
