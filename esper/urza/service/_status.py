"""Endpoints for whoever keeps the service running: alive, ready, metrics."""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Request, Response

from esper.contracts import CURRENT_KERNELS, KernelQuery, KernelState
from esper.errors import KernelNotFoundError
from esper.urza._wire import Status
from esper.urza.service import _answers
from esper.urza.service._gate import GuardedRoute, needs
from esper.urza.service._state import Service, log, service_of
from esper.urza.service._tokens import Scope

router = APIRouter(route_class=GuardedRoute, tags=["status"])

_LOOK_SECONDS = 1.0
"""Whoever asks more often is told what was found the last time."""
_READY_SECONDS = 5.0
_NOWHERE = "0" * 64
_MOST_ASKED = 10
"""Kernels that are looked for before the store of files is taken for lost."""
Part = Literal["ok", "failed"]


@router.get("/healthz", response_model=Status)
@needs(None)
async def healthz(request: Request) -> Response:
    """The process answers."""
    return _answers.data(Status(status="ok"))


@router.get(
    "/readyz",
    response_model=Status,
    responses={503: {"model": Status, "description": "It can not."}},
)
@needs(None)
async def readyz(request: Request) -> Response:
    """Database and blobs were asked, and have answered."""
    found = await request.app.state.readiness.look()
    return _answers.data(found, 200 if found.status == "ok" else 503)


class Readiness:
    """What was found when database and blobs were last asked.

    Args:
        service: whose library is asked.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._at = float("-inf")
        self._found = Status(status="failed")

    async def look(self) -> Status:
        """Ask both, unless that was done just now."""
        async with self._lock:
            if time.monotonic() - self._at >= _LOOK_SECONDS:
                database = await self._part("database", self._ask_database)
                blobs = await self._part("blobs", self._ask_blobs)
                ready = database == blobs == "ok"
                self._found = Status(
                    status="ok" if ready else "failed", database=database, blobs=blobs
                )
                self._at = time.monotonic()
            return self._found

    async def _part(self, name: str, ask: Callable[[], None]) -> Part:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._service.run(ask)
        except Exception as error:
            # Why it failed may name what is nobody else's business.
            log.error("not ready: the %s: %s: %s", name, type(error).__name__, error)
            return "failed"
        return "ok"

    def _ask_database(self) -> None:
        self._service.library.search(KernelQuery(limit=1))

    def _ask_blobs(self) -> None:
        library = self._service.library
        states = (*CURRENT_KERNELS, KernelState.DEPRECATED, KernelState.INVALID)
        query = KernelQuery(limit=_MOST_ASKED, order="parameters", states=states)
        found = library.search(query).items
        if not found:
            try:
                library.read_bytes(_NOWHERE)
            except KernelNotFoundError:
                return
        missing: KernelNotFoundError | None = None
        for kernel in found:
            try:
                pieces = library.iter_bytes(kernel.kernel_id)
            except KernelNotFoundError as error:
                # One kernel lacks its file; a store that lacks all of them is the wrong one.
                missing = error
                continue
            next(pieces, b"")
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
            return
        if missing is not None:
            raise missing


def metrics_router(*, everybody: bool) -> APIRouter:
    """The endpoint of metrics.

    Args:
        everybody: tell them to who has no token.
    """
    of_metrics = APIRouter(route_class=GuardedRoute, tags=["status"])

    @of_metrics.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "Metrics.", "content": {"text/plain": {}}}},
    )
    @needs(None if everybody else Scope.READ)
    async def metrics(request: Request) -> Response:
        """Counts and times in Prometheus's format."""
        service = service_of(request)
        text = await service.run(service.metrics.text)
        return Response(
            text, headers=_answers.FRESH | {"Content-Type": service.metrics.content_type}
        )

    return of_metrics
