"""What lies around the whole application: a number for each request, counts, and a bound.

Plain ASGI, because what wraps every request is paid by every request.
"""

import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from esper.errors import ServiceUnavailableError
from esper.urza._wire import REQUEST_HEADER
from esper.urza.service._problems import RETRY_SECONDS, problem
from esper.urza.service._state import Service, log

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_IS_NUMBER = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
_HEADER = REQUEST_HEADER.lower().encode()
_ALWAYS = [(b"x-content-type-options", b"nosniff")]


class Outside:
    """Numbers, counts and bounds requests.

    Args:
        app: what answers.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service: Service = scope["app"].state.service
        metrics = service.metrics
        began = time.perf_counter()
        number = _number(scope)
        headers = [(_HEADER, number), *_ALWAYS]
        state = scope.setdefault("state", {})
        state["request_id"] = number.decode()
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        service.running += 1
        metrics.running.inc()
        try:
            if service.running > service.limits.requests:
                metrics.refused.labels("too many").inc()
                response = problem(
                    503,
                    ServiceUnavailableError.__name__,
                    f"the service answers {service.limits.requests} requests already: try again"
                    " later",
                    headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
                    more={"begun": False},
                )
                await response(scope, receive, tell)
            else:
                await self._app(scope, receive, tell)
        except Exception:
            log.exception("a request ended in an error", extra={"request": number.decode()})
            if status:
                raise  # the connection is cut, so that nobody takes half an answer for a whole
            response = problem(500, "EsperError", "the service failed; its log says why")
            await response(scope, receive, tell)
        finally:
            service.running -= 1
            metrics.running.dec()
            route = state.get("route", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.perf_counter() - began
            metrics.requests.labels(route, method, str(status)).inc()
            metrics.seconds.labels(route, method).observe(seconds)
            if log.isEnabledFor(_INFO):
                token = state.get("token")
                log.info(
                    "%s %s %d",
                    method,
                    route,
                    status,
                    extra={
                        "request": number.decode(),
                        "milliseconds": round(1e3 * seconds, 3),
                        # The field `token` would be taken for the secret itself.
                        "token_name": None if token is None else token.name,
                    },
                )


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_INFO = 20


def _number(scope: MutableMapping[str, Any]) -> bytes:
    """What the client calls this request, where that can be shown, or a new name."""
    for name, value in scope["headers"]:
        if name == _HEADER and _IS_NUMBER(value):
            return value
    return uuid.uuid4().hex.encode()
