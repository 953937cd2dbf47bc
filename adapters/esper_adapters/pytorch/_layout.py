"""Seeds as torch tensors, with the queries of the owner's `KasminaStateLayout`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_adapters._naming import first_alpha
from esper_adapters.pytorch._table import SeedTable
from esper_functional import FAILURES_TO_RECOVERY, Event, EventKind, SeedIndexError, apply_event
from esper_functional import SeedLifecycleState as S

_KINDS: dict[tuple[S, S], EventKind] = {
    (S.LOADING, S.DORMANT): EventKind.CANCEL,
    (S.ERROR_RECOVERY, S.DORMANT): EventKind.RESET,
    (S.ACTIVE, S.ERROR_RECOVERY): EventKind.ERRORS,
}
"""By what a seed moves, where its target alone does not say it."""

_BY_TARGET: dict[S, EventKind] = {
    S.DORMANT: EventKind.UNLOAD,
    S.LOADING: EventKind.LOAD,
    S.ACTIVE: EventKind.ACTIVATE,
    S.ERROR_RECOVERY: EventKind.FAIL,
    S.FOSSILIZED: EventKind.FOSSILIZE,
}


class KasminaStateLayout:
    """The seeds of one layer, as tensors `[num_seeds]`.

    A layer's own (`layer.state_layout`) shows that layer's row of the model's state, and changes
    it by events, as every other change is made. One that is made by itself has a state of its own.
    The tensors are copies of what is so now: writing into them changes nothing.

    Args:
        num_seeds: how many.
        device: where the tensors are shown; the CPU by default. The state lies on the host.
    """

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        place = torch.device("cpu" if device is None else device)
        table = SeedTable(("layer",), num_seeds)
        self._bind(table, 0, lambda: place, table.apply)

    @classmethod
    def of(
        cls,
        table: SeedTable,
        row: int,
        device: Callable[[], torch.device],
        apply: Callable[[Event], None],
    ) -> "KasminaStateLayout":
        """The view of one row of a table."""
        layout = cls.__new__(cls)
        layout._bind(table, row, device, apply)
        return layout

    def _bind(
        self,
        table: SeedTable,
        row: int,
        device: Callable[[], torch.device],
        apply: Callable[[Event], None],
    ) -> None:
        self._table = table
        self._row = row
        self._device = device
        self._apply = apply

    @property
    def num_seeds(self) -> int:
        """How many seeds there are."""
        return self._table.state.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are shown."""
        return self._device()

    def _shown(self, array: Any) -> Tensor:
        return torch.tensor(np.asarray(array)[self._row], device=self.device)

    @property
    def lifecycle_states(self) -> Tensor:
        """u8: `SeedLifecycleState`."""
        return self._shown(self._table.state.stage)

    @property
    def active_kernel_id(self) -> Tensor:
        """i64: the first 63 bits of the kernel's SHA-256, 0 where there is none."""
        words = np.asarray(self._table.state.kernel_id).astype(np.int64)
        return self._shown((words[..., 0] << 32) | (words[..., 1] & 0xFFFFFFFF))

    @property
    def alpha_blend(self) -> Tensor:
        """f32: blending coefficients in [0, 1]."""
        return self._shown(self._table.state.alpha)

    @property
    def health_accumulator(self) -> Tensor:
        """f32: moving averages of health in [0, 1]; NaN before the first."""
        return self._shown(self._table.state.health)

    @property
    def last_update_epoch(self) -> Tensor:
        """i32: the step of the last change."""
        return self._shown(self._table.state.last_update)

    @property
    def exec_latency_us(self) -> Tensor:
        """f32: moving averages of the execution time in µs; NaN before the first."""
        return self._shown(self._table.state.latency)

    @property
    def error_count(self) -> Tensor:
        """i32: consecutive failures."""
        return self._shown(self._table.state.error_count)

    @property
    def fallback_active(self) -> Tensor:
        """bool: where the host stands in for the kernel."""
        return self._shown(self._table.state.fallback)

    def get_active_seeds(self) -> Tensor:
        """Mask of the ACTIVE seeds."""
        return self.lifecycle_states == int(S.ACTIVE)

    def get_dormant_seeds(self) -> Tensor:
        """Mask of the DORMANT seeds."""
        return self.lifecycle_states == int(S.DORMANT)

    def has_active_seeds(self) -> bool:
        """Whether any seed is ACTIVE; asks no device."""
        return bool((self._row_of("stage") == int(S.ACTIVE)).any())

    def get_stats(self) -> dict[str, Any]:
        """Counts of seeds by stage, errors, and the averages of those that were measured."""
        stages = self._row_of("stage")
        counts = {f"{s.name.lower()}_seeds": int((stages == int(s)).sum()) for s in S}
        return {
            "num_seeds": self.num_seeds,
            **counts,
            "fallback_seeds": int(self._row_of("fallback").sum()),
            "total_errors": int(self._row_of("error_count").sum()),
            "avg_health": _mean(self._row_of("health")),
            "avg_latency_us": _mean(self._row_of("latency")),
        }

    def _row_of(self, field: str) -> np.ndarray:
        return np.asarray(getattr(self._table.state, field))[self._row]

    def transition_seed_state(
        self, seed_idx: int, new_state: S | int, kernel_id: str | None = None
    ) -> None:
        """Move a seed, by the event that such a move is.

        Args:
            kernel_id: of the kernel that is loaded or activated.

        Raises:
            SeedIndexError: for a seed that is not there.
            SeedLifecycleError: for a move that the table does not have; nothing is changed.
            ValueError: for a layer's seed that is to become ACTIVE: `load_kernel` gives it the
                kernel which that needs.
        """
        stage, target = self._stage(seed_idx), S(new_state)
        kind = _KINDS.get((stage, target), _BY_TARGET[target])
        value = 0.0
        if kind is EventKind.LOAD:
            value = float(self._row * self.num_seeds + seed_idx)
        elif kind is EventKind.ACTIVATE:
            value = first_alpha(0.5)
        elif kind is EventKind.ERRORS:
            value = float(FAILURES_TO_RECOVERY)
        self._event(kind, seed_idx, value, kernel_id or "")

    def increment_error_count(self, seed_idx: int) -> int:
        """Count one more consecutive failure of a running seed; the third stops it.

        Returns:
            The new count.
        """
        self._stage(seed_idx)
        count = int(self._row_of("error_count")[seed_idx]) + 1
        self._event(EventKind.ERRORS, seed_idx, float(count))
        return count

    def update_telemetry(self, seed_idx: int, latency_us: float, health_score: float) -> None:
        """Take an execution time and a health score of a running seed into their averages.

        Averages with factor 0.1, whose first values are taken as they are.

        Args:
            latency_us: in µs, at least 0.
            health_score: in [0, 1].
        """
        self._stage(seed_idx)
        events = [
            Event(self._table.step, self._row, seed_idx, EventKind.HEALTH, value=health_score),
            Event(self._table.step, self._row, seed_idx, EventKind.LATENCY, value=latency_us),
        ]
        # Both or neither.
        for event in events:
            apply_event(self._table.state, event, layers=self._table.names)
        for event in events:
            self._apply(event)

    def reset_seed(self, seed_idx: int) -> None:
        """Empty a seed, whatever it holds; a FOSSILIZED one refuses."""
        if self._stage(seed_idx) is not S.DORMANT:
            self.transition_seed_state(seed_idx, S.DORMANT)

    def _stage(self, seed_idx: int) -> S:
        if not 0 <= seed_idx < self.num_seeds:
            raise SeedIndexError(
                f"no seed {seed_idx} in layer {self._table.names[self._row]!r}: it has"
                f" {self.num_seeds}, counted from 0"
            )
        return S(int(self._row_of("stage")[seed_idx]))

    def _event(self, kind: EventKind, seed: int, value: float = 0.0, kernel_id: str = "") -> None:
        self._apply(Event(self._table.step, self._row, seed, kind, kernel_id, value))


def _mean(values: np.ndarray) -> float:
    """Of what was measured; NaN where nothing was."""
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else float("nan")
