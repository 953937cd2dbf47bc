"""Endpoints: kernels, their content, and what is known of them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from esper.artifacts import Artifact
from esper.contracts import (
    KernelQuery,
    KernelRecord,
    KernelState,
    KernelUsage,
    Page,
)
from esper.errors import (
    ConflictError,
    IllegalTransitionError,
    KernelNotFoundError,
)
from esper.urza._wire import (
    API,
    KernelId,
    KernelMove,
    Listed,
    Measurement,
    Measurements,
    Outcomes,
    TagChange,
)
from esper.urza.service import _answers
from esper.urza.service._gate import GuardedRoute, needs
from esper.urza.service._parameters import (
    CursorText,
    Digest,
    IdInPath,
    Limit,
    Number,
    SignatureText,
    TagTexts,
    Text,
    signature_of,
)
from esper.urza.service._problems import refused_move
from esper.urza.service._ranges import IMMUTABLE, asked_range, etag, has_it, not_modified
from esper.urza.service._state import service_of
from esper.urza.service._tokens import Scope
from esper.urza.service._upload import take_in

router = APIRouter(prefix=API, route_class=GuardedRoute, tags=["kernels"])

_CONTENT = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
_ID = r"^[0-9a-f]{1,64}$"


@router.get("/kernels/{kernel_id}", response_model=KernelRecord)
@needs(Scope.READ, remembered=True)
async def record(request: Request, kernel_id: IdInPath) -> Response:
    """What is known of a kernel."""
    service = service_of(request)
    return _answers.data(await service.ask(service.library.record, kernel_id))


@router.get(
    "/kernels/{kernel_id}/artifact",
    response_class=Response,
    responses={
        200: {"description": "The artifact.", **_CONTENT},
        206: {"description": "The part of it that was asked for.", **_CONTENT},
        304: {"description": "The client has it."},
    },
)
@needs(Scope.READ)
async def artifact(request: Request, kernel_id: IdInPath) -> Response:
    """A kernel's artifact, or a part of it; its ETag is its id, and it never changes."""
    service = service_of(request)
    kept = await service.blobs.find(kernel_id)
    if has_it(request.headers, kernel_id):
        return not_modified(kernel_id)
    headers = {"ETag": etag(kernel_id), "Cache-Control": IMMUTABLE, "Accept-Ranges": "bytes"}
    part = asked_range(request.headers, kernel_id, kept.size)
    start, end = part or (0, kept.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{kept.size}"
    pieces = (
        service.blobs.stream(kernel_id, start, end)
        if kept.data is None
        else kept.data
        if part is None
        else kept.data[start:end]
    )
    return _answers.Content(
        pieces,
        end - start,
        status=200 if part is None else 206,
        headers=headers,
        counted=service.metrics.sent.inc,
    )


router.add_api_route(
    "/kernels/{kernel_id}/artifact", artifact, methods=["HEAD"], include_in_schema=False
)
router.add_api_route("/kernels/{kernel_id}", record, methods=["HEAD"], include_in_schema=False)


@router.put(
    "/kernels/{kernel_id}",
    response_model=KernelRecord,
    responses={201: {"model": KernelRecord, "description": "It is new."}},
    openapi_extra={"requestBody": {"required": True, **_CONTENT}},
)
@needs(Scope.WRITE, upload=True)
async def put(
    request: Request,
    kernel_id: IdInPath,
    tag: TagTexts = None,
    state: KernelState | None = None,
    trusted: Annotated[bool, Query(description="who uploads it has verified it")] = False,
) -> Response:
    """Upload a kernel's artifact, which is read as data and never loaded here.

    It is TESTING unless whoever uploads it says otherwise. Uploaded again, it changes nothing but
    that the tags are added, and, where it is trusted and not put as TESTING, that TESTING becomes
    VALIDATED.
    """
    service, library = service_of(request), service_of(request).library
    checked = TagChange(add=tuple(tag or ()))
    first = state or (KernelState.VALIDATED if trusted else KernelState.TESTING)

    def keep(read: Artifact) -> bool:
        """Whether it is new."""
        try:
            library.record(kernel_id)
            new = False
        except KernelNotFoundError:
            new = True
        library.put(read, tags=checked.add, state=first)
        return new

    kind = request.headers.get("content-type", "")
    new = await take_in(service, kernel_id, request.state.body, kind, keep)
    after = await service.ask(library.record, kernel_id)
    if trusted and state is not KernelState.TESTING and after.state is KernelState.TESTING:
        try:
            after = await service.ask(
                library.set_state,
                kernel_id,
                KernelState.VALIDATED,
                expected=KernelState.TESTING,
                reason="uploaded again by one who has verified it",
            )
        except (ConflictError, IllegalTransitionError):  # somebody else has said more of it
            after = await service.ask(library.record, kernel_id)
    where = {"Location": f"{API}/kernels/{kernel_id}"} if new else None
    return _answers.data(after, 201 if new else 200, where)


@router.delete("/kernels/{kernel_id}", status_code=204)
@needs(Scope.ADMIN)
async def remove(request: Request, kernel_id: IdInPath) -> Response:
    """Remove a kernel, whoever uses it. One that is not there is no error."""
    service = service_of(request)
    await service.ask(service.library.remove, kernel_id)
    service.blobs.forget(kernel_id)
    return _answers.nothing()


@router.get("/kernels", response_model=Page[KernelRecord])
@needs(Scope.READ, remembered=True)
async def search(
    request: Request,
    signature: SignatureText = None,
    blueprint: Text = None,
    recipe: Digest = None,
    platform: Text = None,
    state: Annotated[list[KernelState] | None, Query()] = None,
    tag: TagTexts = None,
    ancestor: Digest = None,
    max_parameters: Number = None,
    max_flops: Number = None,
    max_bytes: Number = None,
    min_gain: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    order: Literal["name", "created", "flops", "parameters", "gain"] = "name",
    limit: Limit = 100,
    cursor: CursorText = None,
) -> Response:
    """A page of the kernels for which all that is given holds.

    Those that are deprecated or invalid are found only where `state` asks for them.
    """
    service = service_of(request)
    query = KernelQuery(
        signature=signature_of(signature),
        blueprint=blueprint,
        recipe=recipe,
        platform=platform,
        states=tuple(state) if state else None,
        tags=tuple(tag or ()),
        ancestor=ancestor,
        max_parameters=max_parameters,
        max_flops=max_flops,
        max_bytes=max_bytes,
        min_gain=min_gain,
        order=order,
        limit=limit,
        cursor=cursor,
    )
    return _answers.page(request, await service.ask(service.library.search, query))


@router.get("/kernel-ids", response_model=KernelId)
@needs(Scope.READ, remembered=True)
async def full_id(request: Request, beginning: Annotated[str, Query(pattern=_ID)]) -> Response:
    """The one kernel whose id begins so."""
    service = service_of(request)
    found = await service.ask(service.library.full_id, beginning)
    return _answers.data(KernelId(kernel_id=found))


@router.post("/kernels/{kernel_id}/state", response_model=KernelRecord)
@needs(Scope.WRITE, body=KernelMove)
async def move(request: Request, kernel_id: IdInPath) -> Response:
    """Give a kernel another state; what may not follow is refused with what may."""
    service, library = service_of(request), service_of(request).library
    asked = await request.state.body.data(KernelMove)
    try:
        found = await service.ask(
            library.set_state, kernel_id, asked.to, expected=asked.expected, reason=asked.reason
        )
    except IllegalTransitionError as error:
        now = (await service.ask(library.record, kernel_id)).state
        raise refused_move(error, now) from error
    return _answers.data(found)


@router.post("/kernels/{kernel_id}/tags", response_model=KernelRecord)
@needs(Scope.WRITE, body=TagChange)
async def tag(request: Request, kernel_id: IdInPath) -> Response:
    """Give a kernel tags, and take some from it."""
    service = service_of(request)
    asked = await request.state.body.data(TagChange)
    found = await service.ask(service.library.tag, kernel_id, add=asked.add, remove=asked.remove)
    return _answers.data(found)


@router.get("/kernels/{kernel_id}/measurements", response_model=Measurements)
@needs(Scope.READ, remembered=True)
async def measurements(request: Request, kernel_id: IdInPath) -> Response:
    """What was measured of a kernel, by backend, device and batch."""
    service = service_of(request)
    found = await service.ask(service.library.measurements, kernel_id)
    return _answers.data(Measurements(measurements=tuple(found)))


@router.post("/measurements", status_code=204)
@needs(Scope.WRITE, body=Measurement)
async def record_measurement(request: Request) -> Response:
    """Keep what a kernel cost on some device; an older one of equal kernel and device goes."""
    service = service_of(request)
    asked = await request.state.body.data(Measurement)
    await service.ask(service.library.record_measurement, asked.measurement)
    return _answers.nothing()


@router.post("/outcomes", status_code=204)
@needs(Scope.WRITE, body=Outcomes)
async def record_outcomes(request: Request) -> Response:
    """Keep what kernels did in runs: all or none of it."""
    service = service_of(request)
    asked = await request.state.body.data(Outcomes)
    await service.ask(service.library.record_outcomes, asked.outcomes)
    return _answers.nothing()


@router.get("/kernels/{kernel_id}/outcomes", response_model=Outcomes)
@needs(Scope.READ, remembered=True)
async def outcomes(request: Request, kernel_id: IdInPath) -> Response:
    """What a kernel did in runs; at most the last 1,000."""
    service = service_of(request)
    found = await service.ask(service.library.outcomes, kernel_id)
    return _answers.data(Outcomes(outcomes=tuple(found)))


@router.get("/kernels/{kernel_id}/usage", response_model=KernelUsage)
@needs(Scope.READ, remembered=True)
async def usage(request: Request, kernel_id: IdInPath) -> Response:
    """What a kernel did in all runs that have told of it."""
    service = service_of(request)
    return _answers.data(await service.ask(service.library.usage, kernel_id))


@router.get("/kernels/{kernel_id}/references", response_model=Listed)
@needs(Scope.READ, remembered=True)
async def references(request: Request, kernel_id: IdInPath) -> Response:
    """The runs that refer to a kernel."""
    service = service_of(request)
    found = await service.ask(service.library.references, kernel_id)
    return _answers.data(Listed(ids=tuple(found)))
