"""Parts of content that never changes, and whether a client has it already (RFC 9110)."""

import re
from collections.abc import Mapping

from starlette.responses import Response

from esper.errors import InputError
from esper.urza.service._problems import RefusedError

IMMUTABLE = "private, max-age=31536000, immutable"
"""What is named by its digest never changes; but it is for those who have a token."""

_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII).fullmatch
_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_LONGEST = 8_000


def etag(kernel_id: str) -> str:
    """The tag of a content."""
    return f'"{kernel_id}"'


def has_it(headers: Mapping[str, str], kernel_id: str) -> bool:
    """Whether the client says that it has this content already."""
    asked = headers.get("if-none-match", "")[:_LONGEST]
    return asked.strip() == "*" or kernel_id in _TAG.findall(asked)


def not_modified(kernel_id: str) -> Response:
    """The answer to who has it already."""
    return Response(status_code=304, headers={"ETag": etag(kernel_id), "Cache-Control": IMMUTABLE})


def asked_range(headers: Mapping[str, str], kernel_id: str, size: int) -> tuple[int, int] | None:
    """The part that is asked for, as first byte and the one after the last; None for all of it.

    Several parts at once are not given: whoever asks for them gets the whole, once.

    Raises:
        RefusedError: with 416, for a part that lies beyond the end.
    """
    asked = headers.get("range")
    if asked is None:
        return None
    condition = headers.get("if-range")
    if condition is not None and condition.strip() != etag(kernel_id):
        return None
    found = _RANGE(asked[:_LONGEST].strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size or start >= end:
        raise RefusedError(
            416,
            InputError,
            f"kernel {kernel_id[:12]} has {size} bytes, and the part that was asked for lies"
            " beyond its end",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end
