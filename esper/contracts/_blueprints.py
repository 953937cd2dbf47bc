"""Blueprints on their way to being kernels: submitted, claimed by a worker, compiled."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from esper.contracts._data import Count, Data, Label, Name, Reason, Seconds, Sha256, Size, Token
from esper.contracts._kernels import Cursor, Limit, Tags
from esper.contracts._signature import KernelSignature
from esper.contracts._states import BlueprintState

LONGEST_SOURCE = 1 << 20
LONGEST_LEASE_SECONDS = 86_400.0


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON has not")


def _check_canonical(text: str) -> str:
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the source of a blueprint is no JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not data["name"]:
        raise ValueError("the source of a blueprint is a JSON object with a `name`, a text")
    try:
        data["name"].encode()
    except UnicodeEncodeError as error:
        raise ValueError("the `name` of a blueprint holds half a character") from error
    if json.dumps(data, sort_keys=True, indent=1) != text:
        raise ValueError(
            "the source of a blueprint is not in the canonical form, so that equal blueprints"
            " would have several ids: write it by `BlueprintIR.canonical_json`"
        )
    return text


Source = Annotated[str, Field(max_length=LONGEST_SOURCE), AfterValidator(_check_canonical)]
"""As `esper.tezzeret.BlueprintIR.canonical_json` writes it."""
Sizes = Annotated[dict[Label, Size], Field(max_length=256)]
Priority = Annotated[int, Field(ge=-1_000_000, le=1_000_000)]
"""Higher ones are compiled first, and of equal ones those that came first."""


def blueprint_id(source: str, signature: KernelSignature, sizes: dict[str, int], seed: int) -> str:
    """SHA-256 over all that a kernel is compiled from, the compiler itself left out."""
    content = {
        "source": source,
        "signature": str(signature),
        "sizes": dict(sorted(sizes.items())),
        "init_seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class BlueprintRequest(Data):
    """A blueprint to compile. What is equal but for tags and priority has one id."""

    schema_version: Literal[1] = 1
    source: Source
    signature: KernelSignature
    sizes: Sizes = Field(default_factory=dict)
    init_seed: Count = 0
    tags: Tags = ()
    """The kernel gets them too."""
    priority: Priority = 0

    @property
    def blueprint_id(self) -> str:
        """By which it is submitted once, however often it is asked for."""
        return blueprint_id(self.source, self.signature, self.sizes, self.init_seed)

    @property
    def name(self) -> str:
        """The blueprint's own."""
        return json.loads(self.source)["name"]


class BlueprintRecord(Data):
    """A blueprint as the library knows it."""

    schema_version: Literal[1] = 1
    blueprint_id: Sha256
    name: Name
    source: Source
    signature: KernelSignature
    sizes: Sizes = Field(default_factory=dict)
    init_seed: Count = 0
    priority: Priority = 0
    state: BlueprintState = BlueprintState.UNVALIDATED
    attempts: Count = 0
    """How often it was claimed since it was submitted or last began anew."""
    reason: Reason = ""
    """Why it is INVALID, or why the last attempt came to nothing."""
    kernel_id: Sha256 | None = None
    """What it was compiled to."""
    tags: Tags = ()
    created: Seconds = 0.0
    changed: Seconds = 0.0
    """When its state last changed."""


class Claim(Data):
    """The right of one worker to compile a blueprint, for a time."""

    schema_version: Literal[1] = 1
    blueprint: BlueprintRecord
    worker: Label
    token: Annotated[Token, Field(repr=False)]
    """Random: who has it, has the claim, as long as nobody else has claimed the blueprint since."""
    attempt: Annotated[Count, Field(ge=1)]
    seconds: Annotated[float, Field(gt=0.0, le=LONGEST_LEASE_SECONDS)]
    """For how long, from when it was claimed or last renewed."""


class BlueprintQuery(Data):
    """Which blueprints to find: all that is given must hold. They come oldest first."""

    schema_version: Literal[1] = 1
    states: Annotated[tuple[BlueprintState, ...], Field(min_length=1)] | None = None
    """One of these; by default any."""
    name: Name | None = None
    signature: KernelSignature | None = None
    tags: Tags = ()
    """All of these."""
    limit: Limit = 100
    cursor: Cursor | None = None
    """`Page.next_cursor` of the page before, of a query that is otherwise the same."""
