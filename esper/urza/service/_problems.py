"""Errors as problem details (RFC 9457), by which a client raises the same error again."""

import http
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from esper.contracts import BlueprintState, KernelState, moves_from
from esper.errors import (
    AccessDeniedError,
    ArtifactError,
    BlueprintNotFoundError,
    CircuitBreakerOpenError,
    ConflictError,
    IllegalTransitionError,
    InputError,
    KernelNotFoundError,
    LeaseLostError,
    LibraryError,
    ServiceUnavailableError,
)
from esper_functional import KasminaException

MEDIA_TYPE = "application/problem+json"
_MOST_REASONS = 20
_MOST_TEXT = 4000

STATUSES: Mapping[type[Exception], int] = {
    KernelNotFoundError: 404,
    BlueprintNotFoundError: 404,
    IllegalTransitionError: 409,
    ConflictError: 409,
    LeaseLostError: 409,
    InputError: 422,
    AccessDeniedError: 500,  # the library is denied something, and not who asks
    ServiceUnavailableError: 503,
    CircuitBreakerOpenError: 503,
    LibraryError: 503,
    ArtifactError: 500,
}
"""What an error of the library is answered with; that of the nearest base counts."""

RETRY_SECONDS = 1
"""After which one who was turned away may come again."""


class RefusedError(Exception):
    """A request is answered with a problem, and not with what it asks for.

    Args:
        status: of the answer.
        error: the error that a client is to raise.
        detail: what was expected, what came, and what to do.
        headers: further ones of the answer.
        more: further members of the problem.
    """

    def __init__(
        self,
        status: int,
        error: type[Exception],
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.error = error
        self.detail = detail
        self.headers = dict(headers or {})
        self.more = dict(more or {})

    @property
    def response(self) -> Response:
        """The answer."""
        return problem(
            self.status, self.error.__name__, self.detail, headers=self.headers, more=self.more
        )


def refused_move(error: IllegalTransitionError, now: BlueprintState | KernelState) -> RefusedError:
    """A state that may not follow is refused with those that may.

    Args:
        now: the state of what was to be moved.
    """
    legal = [state.value for state in moves_from(now)]
    return RefusedError(409, IllegalTransitionError, str(error), more={"legal_moves": legal})


def turned_away(status: int, detail: str, *, seconds: int = RETRY_SECONDS) -> RefusedError:
    """A request of which nothing was begun, so that it may be sent again whatever it asks for.

    Args:
        status: of the answer.
        detail: as of `RefusedError`.
        seconds: after which it may be sent again.
    """
    return RefusedError(
        status,
        ServiceUnavailableError,
        detail,
        headers={"Retry-After": str(seconds)},
        more={"begun": False},
    )


def problem(
    status: int,
    error: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    """An answer that says what is wrong.

    Args:
        error: the name of the error that a client is to raise.
    """
    body = {
        "type": f"urn:esper:error:{error}",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail[:_MOST_TEXT],
        "error": error,
        **(more or {}),
    }
    text = json.dumps(body, ensure_ascii=True, allow_nan=False)
    return Response(
        text,
        status,
        media_type=MEDIA_TYPE,
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def problem_of(error: Exception, more: Mapping[str, Any] | None = None) -> Response | None:
    """The answer to a request that ended in an error; None for one that nobody foresaw."""
    if isinstance(error, RefusedError):
        return error.response
    if isinstance(error, ValidationError):
        return malformed(reasons(error.errors(include_url=False, include_input=False)))
    if not isinstance(error, KasminaException):
        return None
    status = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
    if status == 503 and not isinstance(error, ConnectionError) and not _passes(error):
        # It will be the same the next time: whoever asks need not.
        status, headers = 500, None
    return problem(status, type(error).__name__, str(error), headers=headers, more=more)


def malformed(found: Sequence[str], *, status: int = 422) -> Response:
    """The answer to a request that is not as it has to be."""
    listed = "; ".join(found[:_MOST_REASONS])
    return problem(
        status,
        "InputError",
        f"the request is not valid: {listed}",
        more={"errors": list(found[:_MOST_REASONS])},
    )


def reasons(errors: Sequence[Any]) -> list[str]:
    """What pydantic found, in one line each, without the values that came."""
    found = []
    for error in errors[:_MOST_REASONS]:
        place = ".".join(_shown(str(part)) for part in error["loc"])
        found.append(f"{place or 'the body'}: {_shown(str(error['msg']))}")
    return found


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def _passes(error: Exception) -> bool:
    """Whether what an error of the library comes from may be over the next time."""
    cause: BaseException | None = error
    for _ in range(8):
        cause = None if cause is None else cause.__cause__
        if isinstance(cause, SQLAlchemyError | ConnectionError | TimeoutError):
            return True
    return False
