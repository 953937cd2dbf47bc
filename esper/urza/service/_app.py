"""The application: the endpoints, what lies around them, and what they share."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

import esper
from esper.urza._wire import API
from esper.urza.service import _administration, _blueprints, _kernels
from esper.urza.service._gate import GuardedRoute, needs
from esper.urza.service._limits import Limits
from esper.urza.service._memory import Changes
from esper.urza.service._openapi import describe
from esper.urza.service._outside import Outside
from esper.urza.service._problems import problem
from esper.urza.service._state import Service
from esper.urza.service._status import Readiness, metrics_router
from esper.urza.service._status import router as status_router
from esper.urza.service._tokens import TokenFile

if TYPE_CHECKING:
    from esper.urza import KernelLibrary


def make_app(
    open_library: "Callable[[], KernelLibrary]",
    tokens: TokenFile,
    *,
    limits: Limits | None = None,
    changes: Changes | None = None,
    open_metrics: bool = False,
) -> FastAPI:
    """The service over a library.

    Args:
        open_library: opens it once the application starts; it is closed when that ends.
        tokens: who may ask.
        limits: how much.
        changes: tells whether the library's database has changed, where anything does: then
            answers are remembered until it has.
        open_metrics: tell metrics to who has no token.

    Raises:
        TypeError: where an endpoint does not say which scope it needs.
    """
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(open_library(), tokens, limits, changes=changes)
        app.state.service, app.state.readiness = service, Readiness(service)
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    routes = [
        route
        for router in (
            _kernels.router,
            _blueprints.router,
            _administration.router,
            status_router,
            metrics_router(everybody=open_metrics),
        )
        for route in router.routes
        if isinstance(route, APIRoute)
    ]
    described = json.dumps(describe(routes, esper.__version__)).encode()
    routes.append(_description(described))
    # Each by itself, and not in routers of their own: one list is the shortest way to any of them.
    app.router.routes[:] = routes
    app.add_exception_handler(HTTPException, _no_endpoint)
    app.add_middleware(Outside)
    return app


def routes_of(app: FastAPI) -> list[APIRoute]:
    """The endpoints of an application."""
    return [route for route in app.router.routes if isinstance(route, APIRoute)]


def _description(text: bytes) -> APIRoute:
    @needs(None)
    async def openapi(request: Request) -> Response:
        """This service as OpenAPI."""
        return Response(text, media_type="application/json")

    return GuardedRoute(f"{API}/openapi.json", openapi, methods=["GET"], include_in_schema=False)


async def _no_endpoint(request: Request, error: Exception) -> Response:
    """The answer to who asks for what there is not."""
    assert isinstance(error, HTTPException)
    scope = {**request.scope, "method": ""}
    allowed = sorted(
        {
            method
            for route in routes_of(request.app)
            if route.matches(scope)[0] is not Match.NONE
            for method in route.methods or ()
        }
    )
    shown = f"{request.method} {request.url.path}"[:200]
    if not allowed:
        return problem(
            error.status_code,
            "InputError",
            f"this service, Esper {esper.__version__}, has nothing at {shown!r}; {API}/openapi.json"
            " tells what it has",
        )
    return problem(
        405,
        "InputError",
        f"this service, Esper {esper.__version__}, does not answer {shown!r}: expected"
        f" {', '.join(allowed)}",
        headers={"Allow": ", ".join(allowed)},
    )
