"""What controllers ask for."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from esper.contracts._columns import Columns
from esper.contracts._data import Count, Data, Fraction, Name, Sha256


class Action(StrEnum):
    """What a controller may ask for; what it does not ask for stays as it is."""

    GRAFT = "graft"
    """Load a kernel into a DORMANT seed, let it incubate where the run says so, and ramp its
    alpha to 1."""
    FOSSILIZE = "fossilize"
    """Freeze an ACTIVE seed for good."""
    UNLOAD = "unload"
    """Empty an ACTIVE seed."""
    RESET = "reset"
    """Empty a seed in ERROR_RECOVERY."""
    RETARGET = "retarget"
    """Let the alpha of an ACTIVE seed run to another value."""


Deviation = Annotated[float, Field(ge=0.0)]
Effect = tuple[float, float, float]
"""What a controller expects of a decision, in the unit of its reward, and the ends of the 95 %
interval."""
Feature = tuple[Name, float]
"""What moved a decision, and its part of the effect."""


class AdaptationDecision(Data):
    """One request of a controller; as `esper.tamiyo.Decision`, and when it was made."""

    schema_version: Literal[2] = 2
    step: Count
    """The boundary at which it was made."""
    action: Action
    layer: Count
    seed: Count
    reason: str = ""
    kernel_id: Sha256 | Literal[""] = ""
    """Of GRAFT."""
    initialisation: Name = ""
    """Of GRAFT: how the kernel's first parameters are found; "" for the run's own way."""
    alpha: Fraction = 1.0
    """Of GRAFT and RETARGET: where the ramp goes."""
    confidence: Fraction = 1.0
    uncertainty: Deviation | None = None
    """Standard deviation of the effect for want of data; None where it was not estimated."""
    effect: Effect | None = None
    features: tuple[Feature, ...] = ()
    """What moved it most, the strongest first."""


class AdaptationDecisionBatch(Columns[AdaptationDecision]):
    """Many decisions, such as those of one boundary."""

    ITEM = AdaptationDecision

    schema_version: Literal[2] = 2
    step: tuple[Count, ...]
    action: tuple[Action, ...]
    layer: tuple[Count, ...]
    seed: tuple[Count, ...]
    reason: tuple[str, ...]
    kernel_id: tuple[Sha256 | Literal[""], ...]
    initialisation: tuple[Name, ...]
    alpha: tuple[Fraction, ...]
    confidence: tuple[Fraction, ...]
    uncertainty: tuple[Deviation | None, ...]
    effect: tuple[Effect | None, ...]
    features: tuple[tuple[Feature, ...], ...]
