"""Kernels as the library knows them: what they are, what they cost, and where they helped."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from esper.contracts._data import Count, Data, Fraction, Label, Name, Reason, Seconds, Sha256, Tag
from esper.contracts._signature import KernelSignature, SignatureText
from esper.contracts._states import KernelState

MOST_TAGS = 64
MOST_RESULTS = 1_000


def _in_order(tags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(tags)))


Tags = Annotated[tuple[Tag, ...], Field(max_length=MOST_TAGS), AfterValidator(_in_order)]
"""Each once, in order, however they were given."""
Cursor = Annotated[str, Field(min_length=1, max_length=1_000, pattern=r"^[!-~]*$")]
"""Where a page ends; only who gave it can read it."""
Limit = Annotated[int, Field(ge=1, le=MOST_RESULTS)]


class KernelRecord(Data):
    """What the library knows of a kernel without opening it.

    Version 1, which had neither a version nor what comes from `state` on, is what a library kept
    before kernels had states.
    """

    schema_version: Literal[2] = 2
    kernel_id: Sha256
    recipe: Sha256
    """What it was compiled from; see `esper.tezzeret.kernel_recipe`."""
    blueprint: Name
    """The blueprint's name; for a user's own kernel, that of the module or function."""
    signature: SignatureText
    birth: Literal["zero", "identity", "free"]
    confidence: Fraction
    init_seed: Count
    parameter_count: Count
    flops: Count
    """Floating-point operations per example, forward: counted from the blueprint, or, for a
    user's own kernel, by XLA from its StableHLO at batch 1."""
    size_bytes: Count
    """Of the artifact's file."""
    state: KernelState = KernelState.TESTING
    reason: Reason = ""
    """Why it is in its state, where whoever moved it there said so."""
    tags: Tags = ()
    ancestor: Sha256 | None = None
    """The artifact whose blueprint it was compiled from anew."""
    platforms: tuple[Label, ...] | None = None
    """Where its StableHLO runs, such as `("cpu", "cuda")`; None where that is not known."""
    created: Seconds = 0.0
    """When the library first had it; 0 where that is not known."""


class KernelMeasurementRecord(Data):
    """What one kernel costs on one device, for one size of batch."""

    schema_version: Literal[1] = 1
    kernel_id: Sha256
    backend: Annotated[Label, Field(max_length=16)]
    route: Label
    device: Annotated[Label, Field(max_length=100)]
    batch: Annotated[Count, Field(ge=1)]
    repeats: Annotated[Count, Field(ge=1)]
    forward_us: Seconds
    """Median over the repeats, in µs."""
    forward_p95_us: Seconds
    forward_backward_us: Seconds
    """Of forward and of gradients with respect to parameters and input, together."""
    forward_backward_p95_us: Seconds
    memory_bytes: Count
    parameter_count: Count
    flops: Count
    size_bytes: Count
    versions: dict[Label, Name]


class KernelQuery(Data):
    """Which kernels to find: all that is given must hold, and what is None may be anything."""

    schema_version: Literal[1] = 1
    signature: KernelSignature | None = None
    blueprint: Name | None = None
    """The blueprint's name."""
    recipe: Sha256 | None = None
    platform: Label | None = None
    """Has a program for it, such as `cuda`; kernels of which that is not known are not found."""
    states: Annotated[tuple[KernelState, ...], Field(min_length=1)] | None = None
    """One of these; by default those of `CURRENT_KERNELS`."""
    tags: Tags = ()
    """All of these."""
    ancestor: Sha256 | None = None
    max_parameters: Count | None = None
    max_flops: Count | None = None
    max_bytes: Count | None = None
    min_gain: float | None = None
    """Of the mean gain of its outcomes; kernels without any are not found."""
    order: Literal["name", "created", "flops", "parameters", "gain"] = "name"
    """By blueprint, seed and id; the newest first; the cheapest or smallest first; the greatest
    mean gain first, and those without outcomes last."""
    limit: Limit = 100
    cursor: Cursor | None = None
    """`Page.next_cursor` of the page before, of a query that is otherwise the same."""


class KernelOutcome(Data):
    """What a kernel did in one place of one run.

    Of one run, kernel, layer, seed and step there is one: recorded again, it replaces the other.
    """

    schema_version: Literal[1] = 1
    run_id: Label
    kernel_id: Sha256
    layer: Count
    """The row of the layer in the run's seed state."""
    seed: Count
    site: Name = ""
    """The layer's name, where it is known."""
    task: Label
    backend: Name = ""
    step: Count
    """At which it was measured."""
    gain: float
    """How much the held-out loss rises without it; below 0 where it does harm."""
    low: float | None = None
    """Of the 95 % interval; None where it is not known or not bounded."""
    high: float | None = None
    kept: bool
    """Whether the run kept it."""
    at: Seconds = 0.0
    """When it was recorded; 0 where the recorder leaves that to the library."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        low, high = self.low, self.high
        if (low is not None and low > self.gain) or (high is not None and high < self.gain):
            raise ValueError(
                f"the gain {self.gain} lies outside of its interval [{low}, {high}]:"
                " expected low <= gain <= high"
            )
        return self


class KernelUsage(Data):
    """What a kernel did in all runs that have told of it."""

    schema_version: Literal[1] = 1
    kernel_id: Sha256
    runs: Count
    """Which have recorded an outcome."""
    outcomes: Count
    kept: Count
    """Outcomes in which it was kept."""
    mean_gain: float | None = None
    """None where there are no outcomes."""
    low: float | None = None
    """Of the 95 % interval of the mean gain; None below two outcomes."""
    high: float | None = None
    references: Count = 0
    """Runs that refer to it now, so that it is not collected."""
    last_used: Seconds | None = None
    """When the last outcome was recorded, or a run last began to refer to it."""
