"""What a controller may not exceed, whatever it decides: the settings."""

import dataclasses
import math
from collections.abc import Mapping

from esper.tamiyo._check import require
from esper.tamiyo._controller import Action


@dataclasses.dataclass(frozen=True)
class Safety:
    """Bounds on growth; as it is without arguments, there are none.

    Which rules a decision must pass, in this order; the first one that it fails is recorded:

    | rule       | GRAFT | FOSSILIZE | RETARGET | UNLOAD | RESET |
    |------------|-------|-----------|----------|--------|-------|
    | legal      | yes   | yes       | yes      | yes    | yes   |
    | calm       | yes   | yes       | yes      |        |       |
    | stability  | yes   | yes       | yes      |        |       |
    | cooldown   | yes   | yes       | yes      |        |       |
    | rate       | yes   | yes       | yes      |        |       |
    | confidence | yes   | yes       | yes      |        |       |
    | uncertainty | yes  | yes       | yes      |        |       |
    | parameters | yes   |           |          |        |       |
    | flops      | yes   |           |          |        |       |

    `legal` holds always and has no setting: the seed is there and in the stage that the action
    needs, once what was allowed before it is done; a kernel that is grafted can be had and fits.
    UNLOAD and RESET free resources and make the network more like what it was, so nothing else
    keeps them back and they are not counted by `rate`; they do begin a cooldown.

    With `unload_below_worth`, the guard itself asks for the UNLOAD of kernels that do harm, before
    what the controller asks for.

    Raises:
        InputError: for values out of range.
    """

    cooldown_steps: int = 0
    """Steps for which a site is left alone after the last change of a stage in it, from 0."""
    max_adaptations: int | None = None
    """Decisions other than UNLOAD and RESET that are allowed in any `interval_steps`, from 0."""
    interval_steps: int = 1_000
    """From 1: at step t, what was allowed after step t - `interval_steps` counts."""
    min_confidence: float = 0.0
    """Of a decision, in [0, 1]."""
    max_uncertainty: float | None = None
    """Standard deviation of a decision's effect for want of data, from 0. A decision that says
    none passes: not every controller estimates effects."""
    max_parameters: int | None = None
    """Of the network, kernels that are loading included, from 0."""
    max_parameters_factor: float | None = None
    """The same, over the host's parameters, from 1; of both bounds the lower one holds."""
    max_flops: float | None = None
    """Of a forward pass of one example, counted, from 0."""
    max_flops_factor: float | None = None
    """The same, over the host's FLOPs, from 1."""
    calm_steps: int = 0
    """Steps without growth after a run was taken back, from 0. They are counted from the step
    that it was taken back from, so that it first gets past what went wrong as it is."""
    max_loss_spread: float | None = None
    """Of the steps' training losses since the last boundary: standard deviation over mean, from
    0. What is decided while it is greater is judged by noise. A loss that runs away spreads too,
    and one that rises slowly is overfitting, which is no instability: so there is no second bound,
    of the rise. A spread that is not known passes."""
    unload_below_worth: float | None = None
    """From 0: an ACTIVE kernel is unloaded whose worth is below minus this, of all of its 95 %
    interval. Each measurement costs a pass over held-out data; without it, none is made."""
    judge_after_steps: int = 500
    """From 1: steps at work before a kernel's worth is measured for that, and between that and
    the next time."""

    def __post_init__(self) -> None:
        def check(name: str, least: float, most: float = math.inf, *, whole: bool = False) -> None:
            value = getattr(self, name)
            if value is not None:
                require(f"{name} of the safety rules", value, least, most, whole=whole)

        check("cooldown_steps", 0, whole=True)
        check("max_adaptations", 0, whole=True)
        check("interval_steps", 1, whole=True)
        check("min_confidence", 0, 1)
        check("max_parameters", 0, whole=True)
        check("max_parameters_factor", 1)
        check("max_flops", 0)
        check("max_flops_factor", 1)
        check("calm_steps", 0, whole=True)
        check("max_uncertainty", 0)
        check("max_loss_spread", 0)
        check("unload_below_worth", 0)
        check("judge_after_steps", 1, whole=True)


ADAPTATIONS = frozenset({Action.GRAFT, Action.FOSSILIZE, Action.RETARGET})
"""What the rules are for, all but `legal`: every action but UNLOAD and RESET."""

RULES: Mapping[str, frozenset[Action]] = {
    "legal": frozenset(Action),
    "calm": ADAPTATIONS,
    "stability": ADAPTATIONS,
    "cooldown": ADAPTATIONS,
    "rate": ADAPTATIONS,
    "confidence": ADAPTATIONS,
    "uncertainty": ADAPTATIONS,
    "parameters": frozenset({Action.GRAFT}),
    "flops": frozenset({Action.GRAFT}),
}
"""The table of `Safety`: which actions each rule is for, in the order of the rules."""
