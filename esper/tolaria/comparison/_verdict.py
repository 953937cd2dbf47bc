"""What a comparison found, or why it says nothing."""

import dataclasses
from typing import Self

from esper.errors import EsperError
from esper.tolaria.comparison._arms import ArmSummary
from esper.tolaria.comparison._design import Design
from esper.tolaria.comparison._pair import Pair


class VerdictRefused(EsperError):
    """The runs do not allow a verdict; the command exits 1. The message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found under one budget; with `refusals` there are no pairs, and nothing is."""

    design: Design
    refusals: tuple[str, ...]
    """Why there is no verdict; empty where there is one."""
    pairs: tuple[Pair, ...]
    """One for each control, in the design's order; empty where it is refused."""
    arms: tuple[ArmSummary, ...]
    """What the arms' runs came to, those that there are, in the design's order."""
    assumptions: tuple[str, ...]
    """What must be believed for the pairs' words to hold."""
    caveats: tuple[str, ...]
    """What these runs in particular leave open."""

    @property
    def refused(self) -> bool:
        """Whether there is no verdict."""
        return bool(self.refusals)

    def require(self) -> Self:
        """This verdict, where there is one.

        Raises:
            VerdictRefused: where it was refused, with every reason.
        """
        if self.refused:
            reasons = "".join(f"\n- {reason}" for reason in self.refusals)
            raise VerdictRefused(f"no verdict under equal {self.design.budget}:{reasons}")
        return self

    def pair(self, control: str) -> Pair:
        """The treatment beside one control.

        Raises:
            VerdictRefused: where there is no verdict.
            KeyError: for an arm that is no control of the design.
        """
        pairs = {pair.control: pair for pair in self.require().pairs}
        if control not in pairs:
            raise KeyError(
                f"expected one of the controls {', '.join(pairs)}, got {control!r}; judge a design"
                " that has it"
            )
        return pairs[control]
