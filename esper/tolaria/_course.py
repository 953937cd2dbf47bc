"""What a trainer remembers besides the trainee: JSON values, saved with every checkpoint."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Graft:
    """A kernel on its way into the network, or in it."""

    kernel_id: str
    asked: int
    """The step of the decision."""
    target: float = 1.0
    """Where its first ramp goes."""
    initialisation: str = "as_compiled"
    due: int | None = None
    """The step at which it goes on: to be grafted, then to be blended; None once it is blended."""
    born: int | None = None
    """The step of the graft."""


@dataclasses.dataclass
class Course:
    """Where a run stands."""

    grafts: dict[int, Graft] = dataclasses.field(default_factory=dict)
    """Of every seed that holds or awaits a kernel, by slot."""
    grafted: int = 0
    """How many grafts were asked for."""
    first_loss: float | None = None
    """Mean training loss up to the first boundary that had one."""
    first_validation: float | None = None
    """Validation loss at the first boundary; None for runs begun before it was kept."""
    best_validation: float | None = None
    stale: int = 0
    """Boundaries since then."""
    flops: float = 0.0
    """Of training so far."""
    offset: int = 0
    """Steps by which the data are ahead, after batches were left out."""
    rate_scale: float = 1.0
    """By which learning rates were reduced."""
    rollbacks: list[int] = dataclasses.field(default_factory=list)
    """The steps from which the run was taken back."""
    attempts: int = 0
    """How often in a row it was taken back to the last boundary."""
    controller: Any = None
    guard: Any = None

    def state(self) -> dict[str, Any]:
        """All of it, as JSON values that later changes leave as they are."""
        grafts = {slot: vars(graft) for slot, graft in self.grafts.items()}
        return json.loads(json.dumps({**vars(self), "grafts": grafts}))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Course":
        """What `state` returned."""
        grafts = {int(slot): Graft(**own) for slot, own in state["grafts"].items()}
        return cls(**{**state, "grafts": grafts, "rollbacks": list(state["rollbacks"])})
