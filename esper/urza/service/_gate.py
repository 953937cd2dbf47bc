"""What every request passes before anything is done for it.

Every endpoint says by `needs` which scope it takes; an application with one that does not say so
cannot be made.
"""

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import esper
from esper.contracts import Data
from esper.errors import AccessDeniedError, InputError
from esper.urza._wire import VERSION_HEADER
from esper.urza.service._body import Body, CutShortError
from esper.urza.service._problems import (
    RefusedError,
    malformed,
    problem,
    problem_of,
    reasons,
    turned_away,
)
from esper.urza.service._state import Service, log, service_of
from esper.urza.service._tokens import Scope, Token

E = TypeVar("E", bound=Callable[..., Any])

_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="esper"'}


class Needs(NamedTuple):
    """What an endpoint needs."""

    scope: Scope | None
    body: type[Data] | None
    upload: bool
    remembered: bool


_NEEDS: dict[Callable[..., Any], Needs] = {}


def needs(
    scope: Scope | None,
    *,
    body: type[Data] | None = None,
    upload: bool = False,
    remembered: bool = False,
) -> Callable[[E], E]:
    """Say what an endpoint needs.

    Args:
        scope: that a token must have; None for an endpoint that everybody may ask.
        body: what its body is, for its description.
        upload: its body is a kernel.
        remembered: its answer follows from its address and the database alone.
    """

    def mark(endpoint: E) -> E:
        _NEEDS[endpoint] = Needs(scope, body, upload, remembered)
        return endpoint

    return mark


def needs_of(route: APIRoute) -> Needs:
    """What an endpoint needs.

    Raises:
        TypeError: for an endpoint that does not say.
    """
    try:
        return _NEEDS[route.endpoint]
    except KeyError:
        raise TypeError(
            f"the endpoint {route.path} does not say what it needs: mark it by @needs(Scope...)"
        ) from None


class GuardedRoute(APIRoute):
    """An endpoint behind the gate: token, scope, rate, parameters, size, then the endpoint."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler for the endpoint, behind the gate."""
        answer = super().get_route_handler()
        scope, _, uploads, remembered = needs_of(self)
        known = {
            field.alias: _takes_several(field.field_info.annotation)
            for field in self.dependant.query_params
        }

        async def guarded(request: Request) -> Response:
            service = service_of(request)
            limits = service.limits
            request.state.route = self.path
            body = Body(request, limits, limits.upload_bytes if uploads else limits.body_bytes)
            request = Request(request.scope, body)
            request.state.body = body
            token = None
            try:
                token = _admit(service, request, scope)
                changes = service.memory.changes() if remembered and body.ended else None
                asked = (request.scope["path"], request.scope["query_string"])
                given = service.memory.recall(asked, changes)
                if given is not None:
                    return given
                _check_query(request, known)
                body.check()
                response = await answer(request)
                service.memory.note(asked, changes, response)
            except (CutShortError, ClientDisconnect):
                # Nobody hears it.
                service.metrics.refused.labels("cut short").inc()
                body.ended = True
                response = problem(400, "ServiceUnavailableError", "the request was cut short")
            except Exception as error:
                response = _answer(service, error)
            if not body.ended:
                await body.drain(known=token is not None)
                response.headers["Connection"] = "close"
            if token is not None:
                response.headers[VERSION_HEADER] = esper.__version__
            return response

        return guarded


def _answer(service: Service, error: Exception) -> Response:
    """What a request that ended in an error is answered with."""
    if isinstance(error, RequestValidationError):
        return malformed(reasons(error.errors()))
    if isinstance(error, RefusedError):
        service.metrics.refused.labels(str(error.status)).inc()
    found = problem_of(error)
    if found is None and isinstance(error, HTTPException):
        found = problem(error.status_code, "InputError", str(error.detail))
    if found is None:
        log.exception("a request ended in an error that nobody foresaw")
        found = problem(
            500, "EsperError", "the service failed; its log says why, under the X-Request-ID"
        )
    elif found.status_code >= 500:
        log.error("%s: %s", type(error).__name__, error)
    return found


def _admit(service: Service, request: Request, scope: Scope | None) -> Token | None:
    """The token of who asks.

    Raises:
        RefusedError: with 401, 403 or 429; with 503 where the file of tokens cannot be read.
    """
    if scope is None:
        return None
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise RefusedError(
            401,
            AccessDeniedError,
            "this service answers who has a token, and none came: send `Authorization: Bearer"
            " TOKEN`; `esper token make` makes one",
            headers=_CHALLENGE,
        )
    try:
        token = service.tokens.find(secret.strip())
    except InputError as error:
        # Who asks has done nothing wrong, and is not told where the service keeps its files.
        log.error("%s", error)
        raise turned_away(
            503,
            "the service cannot read its tokens, and its log says why: tell its admin, and try"
            " again later",
        ) from error
    if token is None:
        raise RefusedError(
            401,
            AccessDeniedError,
            "the token that came is none of this service, was revoked, or has expired: ask its"
            " admin for another",
            headers={
                "WWW-Authenticate": f'{_CHALLENGE["WWW-Authenticate"]}, error="invalid_token"'
            },
        )
    request.state.token = token
    if not token.scope.allows(scope):
        raise RefusedError(
            403,
            AccessDeniedError,
            f"the token {token.name!r} has the scope {token.scope.value}, and this needs"
            f" {scope.value}: ask with another token",
            headers={
                "WWW-Authenticate": f'{_CHALLENGE["WWW-Authenticate"]}, error="insufficient_scope",'
                f' scope="{scope.value}"'
            },
        )
    wait = service.rate.take(token.name)
    if wait:
        raise turned_away(
            429,
            f"the token {token.name!r} asks more than {service.limits.rate:g} times a second: come"
            f" again in {wait:.2f} s",
            seconds=max(1, round(wait)),
        )
    return token


def _takes_several(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_takes_several, get_args(annotation)))


def _check_query(request: Request, known: dict[str, bool]) -> None:
    """Refuse parameters that nobody reads: whoever sends one means something by it."""
    if not request.url.query:
        return
    seen: set[str] = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            told = f"known are {', '.join(known)}" if known else "there is none here"
            reason = f"the parameter {name[:80]!r} is unknown: {told}"
        elif name in seen and not known[name]:
            reason = f"the parameter {name!r} came twice, and has one value"
        else:
            seen.add(name)
            continue
        raise RefusedError(422, InputError, reason, more={"known": list(known)})
