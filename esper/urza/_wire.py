"""What the HTTP service and its client say to each other, besides the contracts."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from esper.contracts import (
    LONGEST_LEASE_SECONDS,
    MOST_TAGS,
    BlueprintState,
    Claim,
    Data,
    KernelOutcome,
    KernelState,
    Label,
    Name,
    Reason,
    Seconds,
    Sha256,
    Tag,
)
from esper.errors import InputError

API = "/api/v1"
VERSION_HEADER = "Esper-Version"
"""The version of Esper that answers."""
REQUEST_HEADER = "X-Request-ID"

MOST_CLAIMS = 1_000
MOST_OUTCOMES = 10_000
MOST_REFERENCES = 10_000

Tags = Annotated[tuple[Tag, ...], Field(max_length=MOST_TAGS)]


class About(Data):
    """Who answers, and what it takes the one who asks for."""

    schema_version: Literal[1] = 1
    esper: Name
    """The version of Esper."""
    token: Label
    scope: Literal["read", "write", "admin"]


class Listed(Data):
    """Ids, as few as there are."""

    schema_version: Literal[1] = 1
    ids: tuple[Label, ...]


class KernelId(Data):
    """The one kernel whose id begins as was asked."""

    schema_version: Literal[1] = 1
    kernel_id: Sha256


class KernelMove(Data):
    """A kernel is to have another state."""

    schema_version: Literal[1] = 1
    to: KernelState
    expected: KernelState | None = None
    """The state that it has now; where it has another, nothing changes."""
    reason: Reason = ""


class BlueprintMove(Data):
    """A blueprint is to have another state."""

    schema_version: Literal[1] = 1
    to: BlueprintState
    expected: BlueprintState | None = None
    """The state that it has now; where it has another, nothing changes."""
    reason: Reason = ""


class TagChange(Data):
    """Tags that a kernel is to have, and tags that it is not to have."""

    schema_version: Literal[1] = 1
    add: Tags = ()
    remove: Tags = ()


class Outcomes(Data):
    """What kernels did in a run."""

    schema_version: Literal[1] = 1
    outcomes: Annotated[tuple[KernelOutcome, ...], Field(max_length=MOST_OUTCOMES)]


class Measurement(Data):
    """What was measured of a kernel; the library says which keys it needs."""

    schema_version: Literal[1] = 1
    measurement: dict[Label, JsonValue]


class Measurements(Data):
    """All that was measured of a kernel."""

    schema_version: Literal[1] = 1
    measurements: tuple[dict[Label, JsonValue], ...]


class TokenRequest(Data):
    """A token is to be made."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    scope: Literal["read", "write", "admin"]
    expires: Seconds | None = None
    """Seconds since 1970; None for one that does not expire."""


class TokenRecord(Data):
    """What is known of a token, which is not the token."""

    schema_version: Literal[1] = 1
    name: Label
    scope: Literal["read", "write", "admin"]
    created: Seconds
    expires: Seconds | None = None


class TokenMade(Data):
    """A token: it is told this once, and nobody can find it out again."""

    schema_version: Literal[1] = 1
    token: Annotated[str, Field(repr=False)]
    record: TokenRecord


class TokensListed(Data):
    """The tokens that a service knows."""

    schema_version: Literal[1] = 1
    tokens: tuple[TokenRecord, ...]


class Status(Data):
    """Whether a service can do its work; each part is `ok`, or `failed`."""

    schema_version: Literal[1] = 1
    status: Literal["ok", "failed"]
    database: Literal["ok", "failed"] | None = None
    blobs: Literal["ok", "failed"] | None = None


class References(Data):
    """Kernels that a run refers to."""

    schema_version: Literal[1] = 1
    kernel_ids: Annotated[tuple[Sha256, ...], Field(max_length=MOST_REFERENCES)]


class ClaimRequest(Data):
    """A worker asks for blueprints to compile."""

    schema_version: Literal[1] = 1
    worker: Label
    most: Annotated[int, Field(ge=1, le=MOST_CLAIMS)] = 1
    lease_seconds: Annotated[float, Field(gt=0.0, le=LONGEST_LEASE_SECONDS)] = 60.0


class Claims(Data):
    """What a worker was given to compile."""

    schema_version: Literal[1] = 1
    claims: tuple[Claim, ...]


class Completion(Data):
    """What came of a claim: a kernel."""

    schema_version: Literal[1] = 1
    claim: Claim
    kernel_id: Sha256


class Failure(Data):
    """What came of a claim: no kernel."""

    schema_version: Literal[1] = 1
    claim: Claim
    reason: Reason
    retry: bool = False
    """Let another worker try."""


class Problem(Data):
    """What is wrong with a request, or with what was to answer it (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    """For people: what was expected, what came, and what to do next."""
    error: str
    """The class of `esper.errors` that the client raises."""
    errors: tuple[str, ...] | None = None
    """Each thing that is wrong with the request."""
    legal_moves: tuple[str, ...] | None = None
    """The states that may follow the one that it has."""
    known: tuple[str, ...] | None = None
    """The parameters that there are."""
    begun: bool | None = None
    """False where nothing of what was asked was begun, so that it may be asked again."""


def checked_claim(most: int, lease_seconds: float) -> None:
    """Refuse claims of none, of too many, or for a time that is none.

    Raises:
        InputError: saying what was expected.
    """
    if not 1 <= most <= MOST_CLAIMS:
        raise InputError(f"1 to {MOST_CLAIMS} blueprints are claimed at once, got {most}")
    if not 0.0 < lease_seconds <= LONGEST_LEASE_SECONDS:
        raise InputError(
            f"a lease lasts more than 0 and at most {LONGEST_LEASE_SECONDS:.0f} seconds, got"
            f" {lease_seconds}"
        )
