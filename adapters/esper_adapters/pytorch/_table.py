"""The seeds of a torch model: one state for all layers, and who is told of its changes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from esper_functional import (
    Event,
    KasminaException,
    SeedIndexError,
    SeedState,
    advance,
    apply_event,
    init_seeds,
)


class SeedTable:
    """The seeds of a torch model: one `SeedState` and the names of its layers."""

    def __init__(self, names: tuple[str, ...], num_seeds: int) -> None:
        if num_seeds < 1:
            raise SeedIndexError(f"a layer carries at least 1 seed; got {num_seeds}")
        self.names = names
        self.state: SeedState = init_seeds(len(names), num_seeds)
        self.step = 0
        """The step that the seeds have reached: what comes without a step comes at this one."""
        self.shown: np.ndarray = np.zeros((len(names), num_seeds), np.float32)
        """The alphas that the layers' blend weights stand for."""
        self.listeners: list[Callable[[Event], None]] = []
        """Told of every event. A copy of the model starts without any."""
        self.resolve: Callable[[str], Any] | None = None
        """Finds a kernel by its id; raises LookupError where there is none."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "listeners": [], "resolve": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedTable":
        twin = SeedTable(self.names, self.state.shape[1])
        memo[id(self)] = twin
        # States are immutable, and may be shared.
        twin.state, twin.step, twin.shown = self.state, self.step, self.shown.copy()
        twin.resolve = self.resolve
        return twin

    def at(self, step: int | None) -> int:
        """The step asked for, or the one reached.

        Raises:
            KasminaException: for a step that is over.
        """
        if step is None:
            return self.step
        if step < self.step:
            raise KasminaException(
                f"step {step} is over: this model's seeds have reached step {self.step}; give a"
                " later one, or none"
            )
        return step

    def apply(self, event: Event) -> None:
        """Change the state by one event and tell the listeners."""
        self.at(event.step)
        self.state = apply_event(self.state, event, layers=self.names)
        self.step = event.step
        for listener in self.listeners:
            listener(event)

    def advance(self, step: int) -> None:
        """Bring all ramps to a step."""
        self.state, self.step = advance(self.state, self.at(step)), step
