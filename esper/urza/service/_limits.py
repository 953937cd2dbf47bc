"""What a service takes from those who ask, at most."""

import dataclasses
import math

from esper.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests, each per worker process.

    Raises:
        InputError: for one that is not positive.
    """

    upload_bytes: int = 256 << 20
    """Largest kernel."""
    body_bytes: int = 4 << 20
    """Largest body of any other request."""
    requests: int = 4096
    """Requests that are answered at once; more are told to come again."""
    uploads: int = 32
    """Uploads that are received at once; more are told to come again."""
    threads: int = 8
    """Threads that ask the library."""
    rate: float = 5000.0
    """Requests a second of one token."""
    burst: float = 10_000.0
    """Requests of one token that may come at once after it was silent."""
    header_seconds: float = 10.0
    """A request's head has to be whole within."""
    idle_seconds: float = 15.0
    """A body brings some bytes within, and a client takes some of an answer within."""
    slowest: int = 8 << 10
    """Bytes a second that a body brings on average, beyond the first `idle_seconds`."""
    keep_alive_seconds: float = 30.0
    """A connection without a request is kept."""
    shutdown_seconds: float = 20.0
    """What runs may take to end once the service is to stop."""
    cache_bytes: int = 256 << 20
    """Memory for kernels that were downloaded lately."""
    cached_bytes: int = 16 << 20
    """Largest kernel that is kept in memory."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(
                    f"{field.name} of a service's limits must be more than 0 and finite, got"
                    f" {value}"
                )
