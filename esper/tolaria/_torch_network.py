"""A wrapped host on a device, and the artifacts that are grafted into it."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.execution import load_torch_kernel
from esper.tensors import to_torch
from esper.tolaria._torch_random import NOTHING
from esper.tolaria._trainee import Params, Place, muted_state
from esper_adapters.pytorch import (
    GraftedKernel,
    SeededLayer,
    TorchKernel,
    absorb_faults,
    advance_layers,
    wrap,
)
from esper_functional import (
    FAILURES_TO_RECOVERY,
    Event,
    EventKind,
    SeedLifecycleState,
    SeedState,
)


@dataclasses.dataclass(frozen=True)
class Graft:
    """What was grafted into a slot: another graft of the same artifact is another object."""

    artifact: Artifact
    kernel: TorchKernel
    """With its first parameters."""


class TorchNetwork:
    """A host with seeds in its linear layers and where it is to grow.

    Args:
        host: any module that takes a batch and returns one tensor.
        grow_at: paths of layers that carry seeds besides the linear ones.
        precision: "float32" or "bfloat16", of forward and backward passes.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        grow_at: Collection[str],
        seeds_per_layer: int,
        blend: str,
        isolate: bool,
        precision: str,
        device: torch.device,
    ) -> None:
        linear = (nn.Linear,) if any(isinstance(m, nn.Linear) for m in host.modules()) else ()
        self.device = device
        self.model: Any = wrap(
            host.to(device),
            target_layers=(*linear, *grow_at),
            seeds_per_layer=seeds_per_layer,
            blend=blend,
            isolate=isolate,
        )
        self.table = self.model.seed_table
        self.layers: list[SeededLayer] = list(self.model.kasmina_layers.values())
        self.host: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.own: list[list[nn.Parameter]] = [list(layer.parameters()) for layer in self.layers]
        """The host's parameters at each layer, by row."""
        self._buffer_names = [name for name, _ in self.model.named_buffers()]
        self.grafts: dict[int, Graft] = {}
        """By slot, of every seed that holds a kernel."""
        self.casts = precision != "float32"
        """Whether passes are in another precision than parameters."""
        self._training: bool | None = None
        self._still: SeedState | None = None
        """The state that was brought to a step last, if no ramp is under way in it."""

    @property
    def seeds(self) -> SeedState:
        """The state of all seeds, in numpy."""
        return self.table.state

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The host's buffers by name; a host may put others in their place."""
        return {name: self.model.get_buffer(name) for name in self._buffer_names}

    def place(self, slot: int) -> Place:
        """The (layer row, seed) of a slot."""
        row, seed = divmod(slot, self.seeds.shape[1])
        return row, seed

    def slot(self, row: int, seed: int) -> int:
        """The slot of a (layer row, seed)."""
        return row * self.seeds.shape[1] + seed

    def kernel(self, slot: int) -> GraftedKernel:
        """The kernel in a slot that holds one."""
        row, seed = self.place(slot)
        kernel = self.layers[row].kernel(seed)
        assert kernel is not None
        return kernel

    def kernel_params(self, slot: int) -> dict[str, nn.Parameter]:
        """A kernel's parameters by their names in the artifact."""
        kernel = self.kernel(slot)
        return dict(zip(kernel.param_names, kernel.parameters(), strict=True))

    def trains(self, slot: int) -> bool:
        """Whether a slot holds a kernel whose parameters train."""
        stage = int(self.seeds.stage[self.place(slot)])
        return slot in self.grafts and stage == SeedLifecycleState.ACTIVE

    # How seeds change

    def apply(self, event: Event, artifact: Artifact | None, params: Params | None) -> None:
        """Change a seed; see `Trainee.apply`."""
        layer, slot = self.layers[event.layer], self.slot(event.layer, event.seed)
        graft = None
        if event.kind is EventKind.ACTIVATE:
            if artifact is None:
                raise InputError(
                    f"an ACTIVATE event of layer {layer.layer_name!r}, seed {event.seed}, came"
                    " without the artifact that it grafts: pass `artifact`"
                )
            graft = make_graft(artifact, params)
        layer.apply_event(event, None if graft is None else graft.kernel)
        if graft is not None:
            self.grafts[slot] = graft
        elif layer.kernel(event.seed) is None:
            self.grafts.pop(slot, None)

    def advance(self, step: int) -> None:
        """Bring ramps to a step; costs nothing to speak of where none is under way."""
        if self._still is self.seeds:
            self.table.step = self.table.at(step)
            return
        advance_layers(self.table, self.layers, step)
        moving = np.asarray(self.seeds.ramp_span).any()
        self._still = None if moving else self.seeds

    def absorb(self, step: int) -> list[Event]:
        """Bring failures into the state; waits for the device once."""
        return absorb_faults(self.table, self.layers, step)

    def become(self, seeds: SeedState, step: int, grafts: Mapping[int, Graft]) -> None:
        """Hold these seeds and kernels at a step; new kernels have their first parameters."""
        self.table.state, self.table.step = seeds, step
        for slot in [slot for slot, own in self.grafts.items() if grafts.get(slot) is not own]:
            row, seed = self.place(slot)
            self.layers[row].remove(seed)
            del self.grafts[slot]
        for slot, graft in grafts.items():
            if slot not in self.grafts:
                row, seed = self.place(slot)
                self.layers[row].place(seed, graft.kernel)
                self.grafts[slot] = graft
        for layer in self.layers:
            layer.refresh()
        self._still = None

    # How it runs

    @property
    def incubates(self) -> bool:
        """Whether any seed trains in a shadow."""
        return bool(self.grafts) and bool(np.asarray(self.seeds.incubating).any())

    def train(self, training: bool) -> None:
        """Be in training or evaluation mode."""
        if self._training is not training:
            self.model.train(training)
            self._training = training

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes within."""
        if not self.casts:
            return NOTHING
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def shadow(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs in each shadow; see `MorphableModel.shadow_forward`."""
        return self.model.shadow_forward(x)

    def running(self) -> dict[Place, GraftedKernel]:
        """The kernels that run, in the order of layers and seeds."""
        return {
            (layer.row, seed): kernel
            for layer in self.layers
            for seed, kernel in layer.running.items()
        }

    @contextlib.contextmanager
    def muted(self, places: Collection[Place]) -> Iterator[None]:
        """Blend as if some seeds had alpha 0; their state is not changed."""
        state = muted_state(self.seeds, places)
        changed = [layer for layer in self.layers if layer.row in {row for row, _ in places}]
        try:
            for layer in changed:
                layer.show(layer.live_at(state))
            yield
        finally:
            for layer in changed:
                layer.show_state()

    def counted_once(self, parts: int, run: Callable[[int], Tensor]) -> list[Tensor]:
        """Run the parts of one step, whose failures count as those of one step.

        Args:
            run: computes a part by its number.
        """
        kernels = list(self.running().values()) if parts > 1 else []
        before = [(kernel.errors.clone(), kernel.working.clone()) for kernel in kernels]
        most = [kernel.errors * 0 for kernel in kernels]
        results = []
        for part in range(parts):
            for kernel, (errors, working) in zip(kernels, before, strict=True):
                kernel.errors.copy_(errors)
                kernel.working.copy_(working)
            results.append(run(part))
            # A part without failures sets the count to 0, one with a failure raises it by 1.
            most = [torch.maximum(m, k.errors) for m, k in zip(most, kernels, strict=True)]
        for kernel, count in zip(kernels, most, strict=True):
            take_errors(kernel, count)
        return results


def take_errors(kernel: GraftedKernel, count: Tensor) -> None:
    """Set a kernel's consecutive failures, on its device."""
    kernel.errors.copy_(count)
    kernel.working.copy_(kernel.errors < FAILURES_TO_RECOVERY)


def make_graft(artifact: Artifact, params: Params | None = None) -> Graft:
    """The kernel of an artifact, with its first parameters or with others.

    Raises:
        ArtifactError: where it is refused.
        InputError: for parameters that are not the artifact's by name and shape.
    """
    kernel = load_torch_kernel(artifact)
    if params is None:
        return Graft(artifact, kernel)
    expected = {name: tuple(p.shape) for name, p in kernel.params.items()}
    found = {name: tuple(np.shape(p)) for name, p in params.items()}
    if expected != found:
        raise InputError(
            f"the first parameters of kernel {artifact.kernel_id[:12]} do not fit it: expected"
            f" {expected}, got {found}. Give every parameter of the artifact, by its name"
        )
    own = {
        # In the dtype that they were compiled for.
        name: to_torch(np.asarray(params[name])).to(torch.as_tensor(p).dtype)
        for name, p in kernel.params.items()
    }
    return Graft(artifact, dataclasses.replace(kernel, params=own))
