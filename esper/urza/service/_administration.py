"""Endpoints: runs that refer to kernels, garbage, and tokens."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

import esper
from esper.contracts import GarbageReport, RetentionPolicy
from esper.errors import InputError
from esper.urza._wire import (
    API,
    About,
    References,
    TokenMade,
    TokenRecord,
    TokenRequest,
    TokensListed,
)
from esper.urza.service import _answers
from esper.urza.service._gate import GuardedRoute, needs
from esper.urza.service._parameters import RunId
from esper.urza.service._problems import RefusedError
from esper.urza.service._state import log, service_of
from esper.urza.service._tokens import Scope, Token

router = APIRouter(prefix=API, route_class=GuardedRoute, tags=["administration"])

NameInPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


@router.get("/about", response_model=About)
@needs(Scope.READ)
async def about(request: Request) -> Response:
    """Which Esper answers, and whom it takes the one who asks for."""
    token: Token = request.state.token
    return _answers.data(About(esper=esper.__version__, token=token.name, scope=token.scope.value))


@router.put("/references", status_code=204)
@needs(Scope.WRITE, body=References)
async def refer(request: Request, run_id: RunId) -> Response:
    """A run needs these kernels: they are not collected until it is released."""
    service = service_of(request)
    asked = await request.state.body.data(References)
    await service.ask(service.library.refer, run_id, asked.kernel_ids)
    return _answers.nothing()


@router.delete("/references", status_code=204)
@needs(Scope.WRITE)
async def release_run(request: Request, run_id: RunId) -> Response:
    """A run needs its kernels no longer."""
    service = service_of(request)
    await service.ask(service.library.release_run, run_id)
    return _answers.nothing()


@router.post("/garbage-collections", response_model=GarbageReport)
@needs(Scope.ADMIN, body=RetentionPolicy)
async def collect_garbage(request: Request) -> Response:
    """Remove what a policy says, and never what a run refers to."""
    service = service_of(request)
    asked = await request.state.body.data(RetentionPolicy)
    report = await service.run(service.library.collect_garbage, asked)
    if not report.dry_run:
        service.blobs.forget()
    return _answers.data(report)


@router.get("/tokens", response_model=TokensListed)
@needs(Scope.ADMIN)
async def tokens(request: Request) -> Response:
    """The tokens that there are, which are not told."""
    service = service_of(request)
    found = await service.ask(service.tokens.tokens)
    return _answers.data(TokensListed(tokens=tuple(_record(token) for token in found)))


@router.post("/tokens", status_code=201, response_model=TokenMade)
@needs(Scope.ADMIN, body=TokenRequest)
async def make_token(request: Request) -> Response:
    """Make a token, which is told in the answer and never again."""
    service = service_of(request)
    asked = await request.state.body.data(TokenRequest)
    secret, token = await service.ask(
        service.tokens.make, asked.name, Scope(asked.scope), expires=asked.expires
    )
    log.info("token %s made by %s", token.name, request.state.token.name)
    return _answers.data(TokenMade(token=secret, record=_record(token)), 201)


@router.delete("/tokens/{name}", status_code=204)
@needs(Scope.ADMIN)
async def revoke_token(request: Request, name: NameInPath) -> Response:
    """Make a token worthless, from the next request on."""
    service = service_of(request)
    if not await service.ask(service.tokens.revoke, name):
        raise RefusedError(
            404, InputError, f"there is no token {name!r}: GET {API}/tokens lists those there are"
        )
    log.info("token %s revoked by %s", name, request.state.token.name)
    return _answers.nothing()


def _record(token: Token) -> TokenRecord:
    return TokenRecord(
        name=token.name, scope=token.scope.value, created=token.created, expires=token.expires
    )
