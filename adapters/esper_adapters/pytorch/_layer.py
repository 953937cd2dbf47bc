"""KasminaLayer: an nn.Linear that can carry seeds.

    y = blend(x·Wᵀ + b, k_1(x), …, k_n(x))

over the seeds that run; with none it is its base class and one attribute test.
All life-cycle code is the core's, called on numpy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_adapters._naming import check_alpha, first_alpha, load_events
from esper_adapters.pytorch._kernel import GraftedKernel, TorchKernel, check_torch_kernel
from esper_functional import (
    FAILURES_TO_RECOVERY,
    Blend,
    Event,
    EventKind,
    KasminaException,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    advance,
    apply_event,
    blend_weights,
    check_blend,
    fault_events,
    init_seeds,
    mix,
    running,
)


class SeedTable:
    """The seeds of a torch model: one `SeedState` and the names of its layers."""

    def __init__(self, names: tuple[str, ...], num_seeds: int) -> None:
        if num_seeds < 1:
            raise SeedIndexError(f"a layer carries at least 1 seed; got {num_seeds}")
        self.names = names
        self.state: SeedState = init_seeds(len(names), num_seeds)
        self.shown: np.ndarray = np.zeros((len(names), num_seeds), np.float32)
        """The alphas that the layers' blend weights stand for."""
        self.listeners: list[Callable[[Event], None]] = []
        """Told of every event. A copy of the model starts without any."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeedTable":
        twin = SeedTable(self.names, self.state.shape[1])
        memo[id(self)] = twin
        # States are immutable, and may be shared.
        twin.state, twin.shown = self.state, self.shown.copy()
        return twin

    def apply(self, event: Event) -> None:
        """Change the state by one event and tell the listeners."""
        self.state = apply_event(self.state, event, layers=self.names)
        for listener in self.listeners:
            listener(event)


class KasminaLayer(nn.Linear):
    """A linear layer with seeds.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        num_seeds: how many kernels it can carry.
        layer_name: its name in events and messages.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layer's input.

    In training mode every call counts as a step of its kernels' consecutive failures.

    A stand-alone layer holds a seed state of one row. In a wrapped model the
    layers share one state, and each refers to its row.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_seeds: int = 4,
        layer_name: str = "kasmina_layer",
        blend: str = "convex",
        isolate: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._plant(SeedTable((layer_name,), num_seeds), 0, check_blend(blend), isolate)

    def _plant(self, table: SeedTable, row: int, blend: Blend, isolate: bool) -> None:
        self._table = table
        self._row = row
        self.blend: Blend = blend
        self.isolate = isolate
        self._runs: tuple[GraftedKernel, ...] = ()
        self._errors: tuple[Tensor, ...] = ()

    @property
    def layer_name(self) -> str:
        """The layer's name in its model."""
        return self._table.names[self._row]

    @property
    def num_seeds(self) -> int:
        """How many kernels the layer can carry."""
        return self._table.state.shape[1]

    @property
    def seeds(self) -> SeedState:
        """The model's seed state (this layer's row is `row`), in numpy."""
        return self._table.state

    @property
    def row(self) -> int:
        """The layer's row in the seed state."""
        return self._row

    def forward(self, input: Tensor) -> Tensor:
        """`[*, in_features]` to `[*, out_features]`."""
        if not self._runs:
            return F.linear(input, self.weight, self.bias)
        return self._grafted_forward(input)

    def _grafted_forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        source = x.detach() if self.isolate else x
        outputs: list[Tensor] = []
        finite: list[Tensor] = []
        for i, kernel in enumerate(self._runs):
            k, ok = kernel(source)
            outputs.append(k)
            finite.append(ok & self._working[i])
            if self.training:
                self._count(i, ok)
        return mix(self.blend, h, outputs, finite, self._host_weight, self._weights, torch.where)

    def _count(self, i: int, ok: Tensor) -> None:
        """Count a failed call, on the device: no forward pass waits for it."""
        errors = self._errors[i]
        counted = torch.where(ok.all(), 0, errors + 1)
        errors.copy_(torch.where(self._working[i], counted, errors))
        self._working[i].copy_(errors < FAILURES_TO_RECOVERY)

    def kernel(self, seed: int) -> GraftedKernel | None:
        """The kernel that a seed carries, or None."""
        return self._modules.get(f"kernel_{seed}")  # pyright: ignore[reportReturnType]

    def capture(self, x: Tensor) -> list[Tensor]:
        """The outputs of the running kernels on a layer input, without gradients."""
        with torch.no_grad():
            # TorchScript that has run with gradients keeps recording them.
            return [kernel(x.detach())[0].detach() for kernel in self._runs]

    def apply_event(self, event: Event, kernel: TorchKernel | None = None) -> None:
        """Change a seed by an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError: for a kernel that does not fit; nothing is changed.
            SeedLifecycleError: for an event that the seed's stage does not allow.
            KasminaException: for incubation and folding, which this layer does not do.
        """
        if event.kind in (EventKind.INCUBATE, EventKind.FOLD):
            raise KasminaException(
                f"a torch layer does not {event.kind.value} kernels: layer {self.layer_name!r} is"
                " unchanged. Set an alpha above 0, or fossilise; the jax faces incubate and fold"
            )
        if event.kind is EventKind.ACTIVATE:
            if kernel is None:
                raise ValueError("an ACTIVATE event needs the kernel that it grafts")
            check_torch_kernel(kernel, self, f"layer {self.layer_name!r}")
        self._table.apply(event)
        if event.kind is EventKind.ACTIVATE and kernel is not None:
            self.place(event.seed, kernel)
        self.refresh()

    def place(self, seed: int, kernel: TorchKernel) -> GraftedKernel:
        """Register a kernel's parameters for a seed whose state says that it holds one.

        Call `refresh` after the last: a graft is an event (`apply_event`), and this is
        for restoring what events have led to.
        """
        grafted = GraftedKernel(kernel, self.weight.device)
        self.add_module(f"kernel_{seed}", grafted)
        return grafted

    def refresh(self) -> None:
        """Bring what forward reads up to the seed state, after the state has changed."""
        state, row = self._table.state, self._row
        for seed in range(self.num_seeds):
            stage = SeedLifecycleState(int(state.stage[row, seed]))
            kernel = self.kernel(seed)
            if kernel is None:
                continue
            if stage in (SeedLifecycleState.DORMANT, SeedLifecycleState.LOADING):
                delattr(self, f"kernel_{seed}")
            elif stage is SeedLifecycleState.FOSSILIZED:
                kernel.frozen = True
                kernel.requires_grad_(False)
        own = np.asarray(running(state))[row]
        held = {id(kernel): i for i, kernel in enumerate(self._runs)}
        grafted = {int(s): k for s in np.flatnonzero(own) if (k := self.kernel(int(s))) is not None}
        runs = tuple(grafted.values())
        if runs != self._runs:
            device = self.weight.device
            errors: list[Tensor] = []
            working: list[Tensor] = []
            for seed, kernel in grafted.items():
                if id(kernel) in held:
                    # It runs on, with failures that the state has not absorbed yet.
                    errors.append(self._errors[held[id(kernel)]])
                    working.append(self._working[held[id(kernel)]])
                else:
                    count = int(state.error_count[row, seed])
                    errors.append(torch.tensor(count, dtype=torch.int32, device=device))
                    working.append(torch.tensor(count < FAILURES_TO_RECOVERY, device=device))
            self._errors, self._working = tuple(errors), tuple(working)
            self._host_weight = torch.ones((), device=device)
            self._weights = tuple(torch.zeros((), device=device) for _ in runs)
            self._runs = runs
        self.refresh_alpha()

    def refresh_alpha(self) -> None:
        """Bring the blend weights alone up to the seed state, along a ramp."""
        state, row = self._table.state, self._row
        alpha = np.asarray(state.alpha)[row]
        self._table.shown[row] = alpha
        if not self._runs:
            return
        own = np.asarray(running(state))[row]
        host, kernels = blend_weights(self.blend, alpha, own)
        # In place: a compiled forward keeps reading the same tensors.
        self._host_weight.fill_(float(host))
        for tensor, weight in zip(self._weights, kernels[own], strict=True):
            tensor.fill_(float(weight))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "KasminaLayer":
        super()._apply(fn, recurse)
        if self._runs:
            # Only where they lie changes: blend weights and counts keep their dtypes.
            device = self.weight.device
            self._host_weight = self._host_weight.to(device)
            self._weights = tuple(t.to(device) for t in self._weights)
            self._errors = tuple(t.to(device) for t in self._errors)
            self._working = tuple(t.to(device) for t in self._working)
        return self

    def error_counts(self) -> np.ndarray:
        """Consecutive failures of the running seeds, in seed order; waits for the device."""
        if not self._runs:
            return np.zeros(0, np.int32)
        return torch.stack(list(self._errors)).cpu().numpy()

    def load_kernel_sync(
        self, seed_idx: int, kernel: TorchKernel, *, step: int = 0, alpha: float | None = None
    ) -> bool:
        """Graft a kernel that is at hand into a DORMANT seed.

        Args:
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError: nothing is
                changed.
        """
        if not 0 <= seed_idx < self.num_seeds:
            raise SeedIndexError(
                f"no seed {seed_idx} in layer {self.layer_name!r}: it has {self.num_seeds},"
                " counted from 0"
            )
        check_torch_kernel(kernel, self, f"layer {self.layer_name!r}")
        value = check_alpha(first_alpha(kernel.confidence) if alpha is None else alpha)
        slot = self._row * self.num_seeds + seed_idx
        load, activate = load_events(step, self._row, seed_idx, slot, kernel.kernel_id, value)
        self.apply_event(load)
        self.apply_event(activate, kernel)
        return True

    def unload_kernel_sync(self, seed_idx: int, *, step: int = 0) -> None:
        """Empty an ACTIVE seed; a FOSSILIZED one refuses."""
        self.apply_event(Event(step, self._row, seed_idx, EventKind.UNLOAD))

    def set_seed_alpha(self, seed_idx: int, alpha: float, *, step: int = 0) -> None:
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        self.apply_event(Event(step, self._row, seed_idx, EventKind.ALPHA, value=alpha))

    def fossilize(self, seed_idx: int, *, step: int = 0) -> None:
        """Freeze an ACTIVE seed into the network for good: alpha and parameters."""
        self.apply_event(Event(step, self._row, seed_idx, EventKind.FOSSILIZE))


def advance_layers(table: SeedTable, layers: list[KasminaLayer], step: int) -> bool:
    """Bring all ramps to `step`; returns whether any layer's alphas moved.

    An event on one layer brings the ramps of all to its step, so what is compared is
    what each layer shows, not whether a ramp is under way.
    """
    table.state = advance(table.state, step)
    stale = (np.asarray(table.state.alpha) != table.shown).any(axis=1)
    for layer in layers:
        if stale[layer.row]:
            layer.refresh_alpha()
    return bool(stale.any())


def absorb_faults(table: SeedTable, layers: list[KasminaLayer], step: int) -> list[Event]:
    """Bring the failure counts of all layers into the seed state.

    One transfer for the whole model; waits for the device, so it is called at
    decision boundaries and never in a step.
    """
    on_device = [errors for layer in layers for errors in layer._errors]
    if not on_device:
        return []
    counts = torch.stack(on_device).cpu().numpy()
    events = fault_events(table.state, counts, step=step)
    for event in events:
        table.apply(event)
    if events:
        for layer in layers:
            layer.refresh()
    return events
