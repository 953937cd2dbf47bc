"""Answers: data as JSON, and content in pieces that no slow reader makes pile up."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from esper.contracts import Page

_PIECE = 512 << 10
"""Bytes that are given to the connection at once."""

FRESH = {"Cache-Control": "no-store"}


def data(
    content: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Data as JSON."""
    return Response(
        content.__pydantic_serializer__.to_json(content),
        status,
        media_type="application/json",
        headers=FRESH if headers is None else {**FRESH, **headers},
    )


def page(request: Request, found: Page[Any]) -> Response:
    """A page, which says in a Link header where the next one is."""
    headers = {}
    if found.next_cursor is not None:
        url = request.url.include_query_params(cursor=found.next_cursor)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return data(found, headers=headers)


def nothing() -> Response:
    """It is done, and there is nothing to say about it."""
    return Response(status_code=204, headers=FRESH)


class Content(Response):
    """Bytes in pieces: the next is given to the connection when it has taken the one before.

    Args:
        pieces: the content.
        size: of all of it.
        counted: is told how many bytes went out.
    """

    def __init__(
        self,
        pieces: bytes | AsyncIterator[bytes],
        size: int,
        *,
        status: int,
        headers: Mapping[str, str],
        counted: Any,
    ) -> None:
        super().__init__(None, status, headers, media_type="application/octet-stream")
        self.headers["Content-Length"] = str(size)
        self._pieces = pieces
        self._size = size
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        sent = 0
        if scope["method"] == "HEAD":
            pass
        elif isinstance(self._pieces, bytes):
            view = memoryview(self._pieces)
            for start in range(0, self._size, _PIECE):
                piece = view[start : start + _PIECE]
                sent += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        else:
            async for piece in self._pieces:
                for start in range(0, len(piece), _PIECE):
                    part = piece[start : start + _PIECE]
                    sent += len(part)
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._counted(sent)
