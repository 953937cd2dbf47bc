"""What goes to a service and what comes back, without the package that carries it."""

import dataclasses
from collections.abc import Awaitable, Mapping, Sequence
from typing import NamedTuple, Protocol


class Ask(NamedTuple):
    """A request."""

    method: str
    path: str
    """Below the service's address."""
    parameters: Sequence[tuple[str, str]] = ()
    content: bytes | None = None
    kind: str = "application/json"
    """Of the content."""
    headers: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response, all of which has come."""

    status: int
    headers: Mapping[str, str]
    """By names in lower case."""
    content: bytes
    repeated: bool = False
    """Whether an earlier request may have been done already, whose answer did not come."""


class Broken(Exception):
    """A request, or its answer, did not get through.

    Args:
        reason: why, in one line.
        sent: whether the service may have got the request.
    """

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent


class DistrustedError(Exception):
    """The service's certificate is not believed; no request was sent.

    Args:
        reason: why, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Opened(Protocol):
    """An answer whose content comes piece by piece."""

    status: int
    headers: Mapping[str, str]

    def piece(self) -> "bytes | Awaitable[bytes]":
        """The next piece; nothing at the end. Raises Broken where it is cut."""
        ...

    def close(self) -> "object | Awaitable[object]":
        """Let go of the connection."""
        ...


class Transport(Protocol):
    """What carries requests: each method returns at once, or what is to be awaited."""

    def send(self, ask: Ask) -> "Answer | Awaitable[Answer]":
        """Send a request, and take in its answer. Raises Broken, DistrustedError."""
        ...

    def open(self, ask: Ask) -> "Opened | Awaitable[Opened]":
        """Send a request, and take in the head of its answer. Raises Broken, DistrustedError."""
        ...

    def close(self) -> "object | Awaitable[object]":
        """Let go of all connections."""
        ...
