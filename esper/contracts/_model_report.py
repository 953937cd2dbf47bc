"""A growing model at a decision boundary, for whoever decides elsewhere.

It has what a controller within the run sees: the graph of sites, what was measured of run, sites
and seeds, and the kernels that may be grafted. What was not measured, or is not finite, is null.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from esper.contracts._data import Count, Data, Fraction, Label, Sha256
from esper.contracts._ledger_entry import SeedStage

MOST_SITES = 1 << 14

SiteKind = Literal[
    "linear", "convolution", "attention", "recurrent", "embedding", "norm", "other"
]  # fmt: skip
"""What a layer may be: `esper.tamiyo.graph.KINDS`."""

_Share = Annotated[float, Field(ge=-1.0, le=1.0)]
_Amount = Annotated[float, Field(ge=0.0)]
_Losses = Annotated[tuple[float | None, ...], Field(min_length=1, max_length=64)]

_BY_SITE = (
    "kinds", "depths", "site_parameters", "site_inputs", "site_outputs", "grows", "gradient_norm",
    "weight_norm", "fits",
)  # fmt: skip
_BY_SEED = (
    "stage", "alpha", "health", "health_before", "worth", "worth_half", "age", "held"
)  # fmt: skip


class ModelReport(Data):
    """What is known of a model at a boundary. The message's key is the model's name.

    Columns `[sites]` have an entry for each site, those `[sites, seeds]` a row for each site, all
    of as many seeds. Kernels are told by rows of numbers, as a policy sees them.
    """

    schema_version: Literal[1] = 1
    step: Count
    """The boundary."""
    steps: Annotated[Count, Field(ge=1)]
    """At which the run ends."""

    sites: Annotated[tuple[Label, ...], Field(min_length=1, max_length=MOST_SITES)]
    """Names of the layers that have seeds, by row."""
    kinds: tuple[SiteKind, ...]
    depths: tuple[Count, ...]
    """Sites before each on the longest way to it."""
    senders: tuple[Count, ...]
    """Rows from which data flows, as pairs with `receivers`."""
    receivers: tuple[Count, ...]
    site_parameters: tuple[Count, ...]
    """Of the host's layer alone."""
    site_inputs: tuple[Count, ...]
    """Elements that it takes for one example; 0 where that is not known."""
    site_outputs: tuple[Count, ...]
    grows: tuple[bool, ...]
    """Whether kernels may be grafted there."""

    train_loss: _Losses
    """Means over the steps between boundaries, the newest first."""
    validation_loss: _Losses
    """At boundaries, the newest first."""
    validation_accuracy: Fraction | None
    """None for regression."""
    first_loss: float | None
    """The validation loss at the first boundary."""
    loss_spread: _Amount | None
    """Standard deviation of the losses since the last boundary, over their mean."""
    rollbacks: tuple[Count, ...]
    """The steps from which the run was taken back so far, in order."""
    host_parameters: Count
    host_flops: _Amount
    """Of a forward pass of one example, counted; `flops` too."""
    parameters: Count
    """Of the network as it is, kernels that are loading included; `flops` too."""
    flops: _Amount
    gradient_norm: tuple[_Amount | None, ...]
    """`[sites]`: of the mean loss by the host's parameters there."""
    weight_norm: tuple[_Amount | None, ...]
    """`[sites]`: of those parameters."""
    follows: tuple[tuple[_Share | None, _Share | None], ...] = ()
    """`[sites]`: how much of the loss's gradient by what a site gives a linear map of what it
    takes follows, and one with random features beside; empty where nothing measured it."""

    stage: tuple[tuple[SeedStage, ...], ...]
    """`[sites, seeds]`, as all down to `held`."""
    alpha: tuple[tuple[Fraction, ...], ...]
    health: tuple[tuple[Fraction | None, ...], ...]
    health_before: tuple[tuple[Fraction | None, ...], ...]
    """At the boundary before."""
    worth: tuple[tuple[float | None, ...], ...]
    """How much the validation loss rises without the seed's kernel."""
    worth_half: tuple[tuple[_Amount | None, ...], ...]
    """Half the width of its 95 % interval."""
    age: tuple[tuple[Count, ...], ...]
    """Boundaries since the graft; 0 without one."""
    held: tuple[tuple[Count | None, ...], ...]
    """The row of `descriptions` of the kernel in each seed; None without one."""

    descriptions: tuple[tuple[float, ...], ...]
    """`[rows, numbers]`: of kernels, those in seeds and those to choose from. Kernels that differ
    in their first parameters alone share a row."""
    fits: tuple[tuple[Count | None, ...], ...]
    """`[sites, rows]`: which of `kernel_ids` a graft of that row would take; None where none of
    them fits."""
    kernel_ids: tuple[Sha256, ...]
    kernel_parameters: tuple[Count, ...]
    """Of each of `kernel_ids`."""
    kernel_flops: tuple[Count, ...]

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        count = len(self.sites)
        for name in (*_BY_SITE, *_BY_SEED, *(("follows",) if self.follows else ())):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} rows, and there are {count} sites"
                )
        seeds = len(self.stage[0])
        if seeds < 1:
            raise ValueError("a site has at least 1 seed, got 0")
        for name in _BY_SEED:
            _same(name, getattr(self, name), seeds, "seeds")
        _same("fits", self.fits, len(self.descriptions), "descriptions")
        if self.descriptions:
            _same("descriptions", self.descriptions, len(self.descriptions[0]), "numbers")
        for name in ("kernel_parameters", "kernel_flops"):
            if len(getattr(self, name)) != len(self.kernel_ids):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, and there are"
                    f" {len(self.kernel_ids)} kernel_ids"
                )
        return self

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        count = len(self.sites)
        if self.step > self.steps:
            raise ValueError(f"step {self.step} lies behind the run's last, {self.steps}")
        if len(self.senders) != len(self.receivers):
            raise ValueError(
                f"an edge has a sender and a receiver: got {len(self.senders)} senders and"
                f" {len(self.receivers)} receivers"
            )
        _within("depths", self.depths, count, "sites")
        _within("senders", self.senders, count, "sites")
        _within("receivers", self.receivers, count, "sites")
        for row in self.held:
            _within("held", row, len(self.descriptions), "descriptions")
        for row in self.fits:
            _within("fits", row, len(self.kernel_ids), "kernel_ids")
        return self

    @property
    def seeds(self) -> int:
        """Of each site."""
        return len(self.stage[0])


def _same(name: str, rows: Sequence[Sequence[Any]], length: int, what: str) -> None:
    for row in rows:
        if len(row) != length:
            raise ValueError(
                f"a row of {name} has {len(row)} entries, and there are {length} {what}"
            )


def _within(name: str, rows: Sequence[int | None], count: int, what: str) -> None:
    most = max((row for row in rows if row is not None), default=-1)
    if most >= count:
        raise ValueError(f"{name} names row {most}, and there are {count} {what}")
