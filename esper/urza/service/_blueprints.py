"""Endpoints: blueprints that wait to be compiled, and the claims of workers on them."""

import contextlib
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from esper.contracts import (
    BlueprintQuery,
    BlueprintRecord,
    BlueprintRequest,
    BlueprintState,
    Claim,
    Page,
)
from esper.errors import IllegalTransitionError, LeaseLostError
from esper.urza._wire import API, BlueprintMove, ClaimRequest, Claims, Completion, Failure
from esper.urza.service import _answers
from esper.urza.service._gate import GuardedRoute, needs
from esper.urza.service._parameters import (
    CursorText,
    IdInPath,
    Limit,
    SignatureText,
    TagTexts,
    Text,
    signature_of,
)
from esper.urza.service._problems import refused_move
from esper.urza.service._state import service_of
from esper.urza.service._tokens import Scope

router = APIRouter(prefix=API, route_class=GuardedRoute, tags=["blueprints"])


@router.post("/blueprints", response_model=BlueprintRecord)
@needs(Scope.WRITE, body=BlueprintRequest)
async def submit(request: Request) -> Response:
    """Ask for a blueprint to be compiled; one that is there already is not asked for twice."""
    service = service_of(request)
    asked = await request.state.body.data(BlueprintRequest)
    return _answers.data(await service.ask(service.library.submit, asked))


@router.get("/blueprints", response_model=Page[BlueprintRecord])
@needs(Scope.READ, remembered=True)
async def search(
    request: Request,
    state: Annotated[list[BlueprintState] | None, Query()] = None,
    name: Text = None,
    signature: SignatureText = None,
    tag: TagTexts = None,
    limit: Limit = 100,
    cursor: CursorText = None,
) -> Response:
    """A page of the blueprints for which all that is given holds, oldest first."""
    service = service_of(request)
    query = BlueprintQuery(
        states=tuple(state) if state else None,
        name=name,
        signature=signature_of(signature),
        tags=tuple(tag or ()),
        limit=limit,
        cursor=cursor,
    )
    return _answers.page(request, await service.ask(service.library.blueprints, query))


@router.get("/blueprints/{blueprint_id}", response_model=BlueprintRecord)
@needs(Scope.READ, remembered=True)
async def record(request: Request, blueprint_id: IdInPath) -> Response:
    """What is known of a blueprint."""
    service = service_of(request)
    return _answers.data(await service.ask(service.library.blueprint, blueprint_id))


@router.post("/blueprints/{blueprint_id}/state", response_model=BlueprintRecord)
@needs(Scope.WRITE, body=BlueprintMove)
async def move(request: Request, blueprint_id: IdInPath) -> Response:
    """Let a blueprint wait again, or give it up."""
    service, library = service_of(request), service_of(request).library
    asked = await request.state.body.data(BlueprintMove)
    try:
        found = await service.ask(
            library.set_blueprint_state,
            blueprint_id,
            asked.to,
            expected=asked.expected,
            reason=asked.reason,
        )
    except IllegalTransitionError as error:
        now = (await service.ask(library.blueprint, blueprint_id)).state
        raise refused_move(error, now) from error
    return _answers.data(found)


@router.post("/claims", response_model=Claims)
@needs(Scope.WRITE, body=ClaimRequest)
async def claim(request: Request) -> Response:
    """Take blueprints to compile; nobody else gets them before the lease has run out."""
    service, library = service_of(request), service_of(request).library
    asked = await request.state.body.data(ClaimRequest)

    def give_all_back(claims: Sequence[Claim]) -> None:
        for each in claims:
            with contextlib.suppress(LeaseLostError):
                library.give_back(each)

    found = await service.ask_or_undo(
        give_all_back,
        library.claim,
        asked.worker,
        most=asked.most,
        lease_seconds=asked.lease_seconds,
    )
    return _answers.data(Claims(claims=tuple(found)))


@router.post("/claims/renewal", response_model=Claim)
@needs(Scope.WRITE, body=Claim)
async def renew(request: Request) -> Response:
    """Have the lease of a claim begin anew."""
    service = service_of(request)
    asked = await request.state.body.data(Claim)
    return _answers.data(await service.ask(service.library.renew, asked))


@router.post("/claims/completion", response_model=BlueprintRecord)
@needs(Scope.WRITE, body=Completion)
async def complete(request: Request) -> Response:
    """A blueprint was compiled to a kernel, which was uploaded before."""
    service = service_of(request)
    asked = await request.state.body.data(Completion)
    return _answers.data(await service.ask(service.library.complete, asked.claim, asked.kernel_id))


@router.post("/claims/failure", response_model=BlueprintRecord)
@needs(Scope.WRITE, body=Failure)
async def fail(request: Request) -> Response:
    """A blueprint could not be compiled."""
    service = service_of(request)
    asked = await request.state.body.data(Failure)
    return _answers.data(
        await service.ask(service.library.fail, asked.claim, asked.reason, retry=asked.retry)
    )


@router.post("/claims/return", response_model=BlueprintRecord)
@needs(Scope.WRITE, body=Claim)
async def give_back(request: Request) -> Response:
    """Let a blueprint wait again, as if it had not been claimed."""
    service = service_of(request)
    asked = await request.state.body.data(Claim)
    return _answers.data(await service.ask(service.library.give_back, asked))
