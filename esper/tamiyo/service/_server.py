"""What the service answers over HTTP: how it is, and its metrics."""

import json
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from esper.tamiyo.service._loop import TamiyoService
from esper.tamiyo.service._metrics import health_of, metrics_text

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def make_app(service: TamiyoService, *, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The application.

    Args:
        service: is asked, and changed by nothing here.
        hosts: names that the server may be addressed by.
    """

    async def health(request: Request) -> Response:
        found = health_of(service)
        status = 200 if found["status"] == "ok" else 503
        return Response(
            json.dumps(found), status, headers=_HEADERS, media_type="application/json"
        )  # fmt: skip

    async def metrics(request: Request) -> Response:
        return Response(metrics_text(service), media_type=CONTENT_TYPE_LATEST, headers=_HEADERS)

    return Starlette(
        routes=[Route("/health", health), Route("/metrics", metrics)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )
