"""The seeds of a torch model: one state for all layers, and who is told of its changes."""

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from esper_adapters._naming import step_reached
from esper_adapters.pytorch._kernel import Resolve, TorchKernel
from esper_adapters.pytorch._recent import RecentKernels
from esper_functional import (
    Event,
    HealthStatistics,
    KasminaException,
    SeedIndexError,
    SeedState,
    advance,
    apply_event,
    init_seeds,
    init_statistics,
)

if TYPE_CHECKING:
    from esper_adapters.pytorch._replicas import Replicas


class SeedTable:
    """The seeds of a torch model: one `SeedState` and the names of its layers.

    Changes of layers and seeds hold its lock; forward passes never do.
    """

    def __init__(self, names: tuple[str, ...], num_seeds: int, cache_size_mb: int = 128) -> None:
        if num_seeds < 1:
            raise SeedIndexError(f"a layer carries at least 1 seed; got {num_seeds}")
        self.names = names
        self.state: SeedState = init_seeds(len(names), num_seeds)
        self.statistics: HealthStatistics = init_statistics(len(names), num_seeds)
        """What health was made of, by moving averages; it describes, and decides nothing."""
        self.step = 0
        """The step that the seeds have reached: what comes without a step comes at this one."""
        self.shown: np.ndarray = np.zeros((len(names), num_seeds), np.float32)
        """The alphas that the layers' blend weights stand for."""
        self.listeners: list[Callable[[Event], None]] = []
        """Told of every event. A copy of the model starts without any."""
        self.resolve: Resolve | None = None
        """Finds a kernel by its id; raises LookupError where there is none."""
        self.replicas: Replicas | None = None
        """The ranks on which the kernels are kept equal. A copy of the model is by itself."""
        self.recent = RecentKernels(cache_size_mb)
        self.loading: dict[tuple[int, int], object] = {}
        """By (row, seed), the load that is under way."""
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "lock"}
        recent = RecentKernels(self.recent.size_mb)
        return {
            **kept,
            "listeners": [],
            "resolve": None,
            "replicas": None,
            "recent": recent,
            "loading": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedTable":
        twin = SeedTable(self.names, self.state.shape[1], self.recent.size_mb)
        memo[id(self)] = twin
        # States are immutable, and may be shared.
        twin.state, twin.step, twin.shown = self.state, self.step, self.shown.copy()
        twin.statistics, twin.resolve = self.statistics, self.resolve
        return twin

    def at(self, step: int | None) -> int:
        """The step asked for, or the one reached.

        Raises:
            KasminaException: for a step that is over.
        """
        return step_reached(step, self.step)

    def fetch(self, kernel_id: str) -> TorchKernel:
        """The kernel of an id: a recent one, or what `resolve` finds.

        Raises:
            LookupError: where there is none.
            KasminaException: where there is nothing to find kernels with.
        """
        held = self.recent.get(kernel_id)
        if held is not None:
            return held
        if self.resolve is None:
            raise KasminaException(
                "kernels can be loaded by their ids where there is a library: pass `library=` to"
                " esper.wrap, or `resolve=`, a function from ids to kernels"
            )
        kernel = self.resolve(kernel_id)
        # What was asked for is what a file will ask for.
        kernel = dataclasses.replace(kernel, kernel_id=kernel_id)
        self.recent.put(kernel_id, kernel)
        return kernel

    def apply(self, event: Event) -> None:
        """Change the state by one event and tell the listeners."""
        self.change(event)
        self.tell(event)

    def change(self, event: Event) -> None:
        """Change the state by one event; the listeners are told when all of it is done."""
        with self.lock:
            self.at(event.step)
            self.state = apply_event(self.state, event, layers=self.names)
            self.step = event.step

    def tell(self, event: Event) -> None:
        """Tell the listeners of an event."""
        for listener in self.listeners:
            listener(event)

    def advance(self, step: int) -> None:
        """Bring all ramps to a step."""
        with self.lock:
            self.state, self.step = advance(self.state, self.at(step)), step
