"""Which kernels a library may forget, and what it has forgotten."""

from typing import Annotated, Literal

from pydantic import Field

from esper.contracts._data import Count, Data, Seconds, Sha256
from esper.contracts._states import KernelState


class RetentionPolicy(Data):
    """Which kernels a collection removes.

    A kernel may go when its state is one of `states`, no run refers to it and it is older than
    `grace_seconds`. Of these go the ones that are older than `max_age_seconds`, those beyond the
    newest `keep_per_signature` of their signature, and, the least recently used first, as many as
    it takes to bring the library down to `max_bytes`. Where none of the three is given, all go.
    """

    schema_version: Literal[1] = 1
    states: Annotated[tuple[KernelState, ...], Field(min_length=1)] = (
        KernelState.DEPRECATED,
        KernelState.INVALID,
    )
    max_age_seconds: Seconds | None = None
    keep_per_signature: Count | None = None
    max_bytes: Count | None = None
    """Of all kernels together."""
    grace_seconds: Seconds = 3_600.0
    """Younger kernels stay, and so do younger files without a record: a put may be under way."""
    dry_run: bool = False
    """Say what would go, and remove nothing."""


class GarbageReport(Data):
    """What a collection removed, or would remove."""

    schema_version: Literal[1] = 1
    dry_run: bool
    removed: tuple[Sha256, ...] = ()
    removed_bytes: Count = 0
    unlisted: tuple[Sha256, ...] = ()
    """Kernels of removed files that no record named, or that were not whole."""
    unlisted_bytes: Count = 0
    referenced: Count = 0
    """Kernels that would have gone, but for runs that refer to them."""
    young: Count = 0
    """Kernels and files that would have gone, but for their age."""
    kernels_left: Count = 0
    bytes_left: Count = 0
