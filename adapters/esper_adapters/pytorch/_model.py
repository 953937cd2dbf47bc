"""What a wrapped model has beyond its host."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from esper_adapters._naming import find_row
from esper_adapters.pytorch import _loading
from esper_adapters.pytorch._boundaries import absorb_faults, advance_layers
from esper_adapters.pytorch._family import same_name, seeded_class
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._health import HealthSample, observe_sample, sample_health
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._layer import SeededLayer
from esper_adapters.pytorch._saved import check_seeds
from esper_adapters.pytorch._shadow import run_shadow
from esper_adapters.pytorch._sharded import refuse_sharded
from esper_adapters.pytorch._table import SeedTable
from esper_adapters.pytorch._tensors import floats_of
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    UncalledSiteWarning,
)


class MorphableModel(nn.Module):
    """What a wrapped model has beyond its host; never instantiated by itself."""

    _esper_table: SeedTable
    _esper_names: tuple[str, ...]
    _esper_left: dict[str, str]

    def _get_name(self) -> str:
        return f"Morphable{host_class(type(self)).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_sharded(self, "pickle")
        base: Any = host_class(type(self))
        if issubclass(base, SeededLayer):
            return fresh_model, (base._esper_base, base._esper_kind), self.__getstate__()
        return fresh_model, (base, "plain"), self.__getstate__()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel leaves alone: kernels, and what the host names.

        Raises:
            KasminaException: where nobody else would keep the kernels equal.
        """
        if self._esper_table.replicas is None and _has_peers():
            raise KasminaException(
                "DistributedDataParallel averages the gradients of parameters that it meets when it"
                " is made, and kernels come and go: call replicate_kernels(model) before"
            )
        own = vars(self).get(_IGNORED, getattr(host_class(type(self)), _IGNORED, ()))
        held = [m for m in self.named_modules() if isinstance(m[1], GraftedKernel)]
        # It broadcasts buffers that come later too, and what is counted is each rank's own.
        counted = [
            f"{name}.kernel_{seed}.{buffer}".removeprefix(".")
            for name, layer in self.kasmina_layers.items()
            for seed in range(layer.num_seeds)
            for buffer in ("errors", "working")
        ]
        return [*own, *counted, *(f"{n}.{key}" for n, k in held for key, _ in k.named_parameters())]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        vars(self)[_IGNORED] = names

    @property
    def kasmina_layers(self) -> dict[str, SeededLayer]:
        """The layers with seeds, by the host's own module path."""
        found = {name: self.get_submodule(name) for name in self._esper_names}
        return {name: layer for name, layer in found.items() if isinstance(layer, SeededLayer)}

    @property
    def left_alone(self) -> dict[str, str]:
        """The layers that were meant and carry no seeds, and why."""
        return dict(self._esper_left)

    @property
    def seeds(self) -> SeedState:
        """The state of all seeds, `[layers, seeds]`, in numpy."""
        return self._esper_table.state

    @property
    def seed_table(self) -> SeedTable:
        """The seeds with their layers' names and listeners."""
        return self._esper_table

    # A model that is itself a layer with seeds has that class's methods too, and those below
    # hide them: they are called by their class.

    def _layer(self, layer_name: str) -> SeededLayer:
        names = list(self._esper_names)
        if layer_name in self._esper_left:
            raise SeedIndexError(
                f"layer {layer_name!r} carries no seeds: it {self._esper_left[layer_name]}"
            )
        return self.layer_of(find_row(layer_name, names))

    def layer_of(self, row: int) -> SeededLayer:
        """The layer of a row of the seed state.

        Raises:
            SeedIndexError: for a row that is not there, or a layer that was put in its place.
        """
        if not 0 <= row < len(self._esper_names):
            raise SeedIndexError(
                f"no layer {row}: this model has {len(self._esper_names)} with seeds, from 0"
            )
        layer = self.get_submodule(self._esper_names[row])
        if not isinstance(layer, SeededLayer) or layer.seed_table is not self._esper_table:
            raise SeedIndexError(
                f"layer {self._esper_names[row]!r} was replaced by another, which has no seeds:"
                " unwrap the model, and wrap it again"
            )
        return layer

    def load_kernel_sync(
        self,
        layer_name: str,
        seed_idx: int,
        kernel: Any = None,
        *,
        kernel_artifact_id: str | None = None,
        alpha: float | None = None,
        step: int | None = None,
    ) -> bool:
        """Graft a kernel into a DORMANT seed.

        Args:
            layer_name: the layer's module path in the host.
            kernel: SHA-256 of an artifact of the library, or a kernel that is at hand.
            kernel_artifact_id: the former, by another name.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).
            step: the step before which it takes effect; by default the one reached.

        Returns:
            False, and the seed DORMANT, where the library has no such kernel.

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError: the seed is
                as it was.
            KasminaException: where the kernel is there and cannot be read; the seed is
                then in ERROR_RECOVERY.
        """
        chosen = _one_of(kernel, kernel_artifact_id)
        return _loading.load(self._layer(layer_name), seed_idx, chosen, alpha, step)

    async def load_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel: Any = None,
        *,
        kernel_artifact_id: str | None = None,
        alpha: float | None = None,
        step: int | None = None,
    ) -> bool:
        """`load_kernel_sync`, reading the library in a thread."""
        chosen, layer = _one_of(kernel, kernel_artifact_id), self._layer(layer_name)
        return await _loading.load_in_thread(layer, seed_idx, chosen, alpha, step)

    async def unload_kernel(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> bool:
        """Empty an ACTIVE seed."""
        return SeededLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)

    def unload_kernel_sync(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> bool:
        """Empty an ACTIVE seed."""
        return SeededLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)

    def set_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, *, step: int | None = None
    ) -> None:
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        SeededLayer.set_seed_alpha(self._layer(layer_name), seed_idx, alpha, step=step)

    def ramp_seed_alpha(
        self,
        layer_name: str,
        seed_idx: int,
        alpha: float,
        span: int,
        *,
        shape: str = "linear",
        step: int | None = None,
    ) -> None:
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps; see `advance`.

        Args:
            shape: "linear", "cosine" or "sigmoid".
        """
        layer = self._layer(layer_name)
        SeededLayer.ramp_seed_alpha(layer, seed_idx, alpha, span, shape=shape, step=step)

    def incubate(self, layer_name: str, seed_idx: int, *, step: int | None = None) -> None:
        """Let an ACTIVE seed at alpha 0 train in shadow forwards alone; see `shadow_forward`."""
        SeededLayer.incubate(self._layer(layer_name), seed_idx, step=step)

    def fold(self, layer_name: str, seed_idx: int, *, step: int | None = None) -> None:
        """Fold an affine kernel into the weights of its linear layer, and free its slot.

        Raises:
            FoldError: where that would change the output.
        """
        SeededLayer.fold(self._layer(layer_name), seed_idx, step=step)

    def shadow_forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """What the model would give with each incubating kernel at alpha 1, one at a time.

        Add the loss of each to that of the model. Gradients reach that kernel's parameters and
        nothing else; buffers and the random state stay as they are. Costs one forward pass for
        each incubating kernel. Activations must not be checkpointed within: what would be computed
        again in the backward pass is the model, and no shadow, and torch refuses it.

        Raises:
            KasminaException: for a model that FSDP has sharded: its forward pass puts whole
                parameters in the place of those that a shadow holds still.
        """
        refuse_sharded(self, "shadow_forward")
        return tuple(
            run_shadow(self, layer, seed, args, options)
            for layer in self.kasmina_layers.values()
            for seed in layer.incubating
        )

    def advance(self, step: int) -> bool:
        """Bring all ramps to `step`; True where any alpha moved."""
        return advance_layers(self._esper_table, list(self.kasmina_layers.values()), step)

    def absorb(self, step: int | None = None) -> list[Event]:
        """Bring the failures counted on the device into the seeds' state; waits for the device.

        Returns:
            The events of what changed.

        Warns:
            UncalledSiteWarning: where kernels run in a layer that no forward pass has called
                since the last time.
        """
        table, layers = self._esper_table, list(self.kasmina_layers.values())
        now = table.at(step)
        others = any(layer._called for layer in layers)
        idle = [layer for layer in layers if layer.passed_by(others)]
        if table.replicas is not None:
            idle = table.replicas.same_everywhere(table, now, idle)
        if idle:
            warnings.warn(
                f"kernels run in layers {[layer.layer_name for layer in idle]}, and no forward pass"
                " has called them: their host uses their weights without calling them, or not at"
                " all. Unload them",
                UncalledSiteWarning,
                stacklevel=2,
            )
        for layer in layers:
            layer._called = False
        events = [
            Event(now, layer.row, seed, EventKind.UNCALLED)
            for layer in idle
            for seed in layer.running
            if seed not in layer.incubating
        ]
        for event in events:
            table.apply(event)
        return events + absorb_faults(table, layers, now)

    def apply_event(self, event: Event, kernel: TorchKernel | None = None) -> None:
        """Change a seed by an event, such as one of a recorded run.

        Args:
            kernel: what ACTIVATE grafts; by default the one that the event's id names.

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, FoldError, LookupError:
                nothing is changed.
        """
        layer = self.layer_of(event.layer)
        if event.kind is EventKind.ACTIVATE and kernel is None:
            kernel = self._esper_table.fetch(event.kernel_id)
        SeededLayer.apply_event(layer, event, kernel)

    @contextlib.contextmanager
    def health_sample(self) -> Iterator[HealthSample]:
        """Measure the running kernels' outputs in the forward passes within, on the device.

        For sampled steps. `observe_health` takes what was measured into the seeds' averages.
        """
        with sample_health(list(self.kasmina_layers.values())) as sample:
            yield sample

    def observe_health(self, sample: HealthSample, *, step: int | None = None) -> list[Event]:
        """Take a sample into the averages of the seeds' health; waits for the device, once.

        Returns:
            The events of what was observed. Kernels that were not called, or gave what is not
            finite, have none.
        """
        layers = list(self.kasmina_layers.values())
        return observe_sample(self._esper_table, layers, sample, self._esper_table.at(step))

    def get_layer_stats(self, layer_name: str) -> dict[str, Any]:
        """What `SeededLayer.get_layer_stats` says of one layer."""
        return SeededLayer.get_layer_stats(self._layer(layer_name))

    def fossilize(self, layer_name: str, seed_idx: int, *, step: int | None = None) -> None:
        """Freeze an ACTIVE seed into the network for good."""
        SeededLayer.fossilize(self._layer(layer_name), seed_idx, step=step)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`; seeds and kernels become those that were saved.

        Kernels that the model does not hold are found by their ids, by `resolve` (or the
        library) that the model was wrapped with.

        Raises:
            KasminaException: for the seeds of another wrapping, a kernel that cannot be found,
                or (strict) kernels that the file has no word of; nothing is changed.
        """
        check_seeds(self.kasmina_layers, state_dict, strict)
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        for layer in self.kasmina_layers.values():
            # Assigned parameters may lie on another device than those that there were.
            layer.settle()
        if self._esper_table.replicas is not None:
            # Parameters may be others now.
            self._esper_table.replicas.watch()
        return keys

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *more: Any, **options: Any
    ) -> None:
        # Before anything of this model is changed, also where it is a part of another.
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        check_seeds(self.kasmina_layers, own, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *more, **options)

    def get_model_stats(self) -> dict[str, Any]:
        """Counts of layers, seeds by stage, and parameters of host and kernels."""
        stages = self.seeds.stage
        layers = self.kasmina_layers
        kernels = [
            kernel
            for layer in layers.values()
            for seed in range(layer.num_seeds)
            if (kernel := layer.kernel(seed)) is not None
        ]
        grafted = sum(p.numel() for kernel in kernels for p in kernel.parameters())
        return {
            "layers": len(layers),
            "seeds": int(stages.size),
            "seeds_by_stage": {
                stage.name: int((stages == stage).sum()) for stage in SeedLifecycleState
            },
            "host_parameters": sum(p.numel() for p in self.parameters()) - grafted,
            "kernel_parameters": grafted,
            "kernels_by_route": dict(Counter(kernel.route for kernel in kernels)),
        }

    def compare_with_original(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """How far the kernels move the output on one input.

        Returns:
            `max_abs` and `mean_abs` of the difference between the model with and
            without its kernels, host weights being the trained ones in both.
        """
        layers = list(self.kasmina_layers.values())
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                grown = self(*args, **kwargs)
                for layer in layers:
                    layer.show(None)
                host = self(*args, **kwargs)
        finally:
            for layer in layers:
                layer.show_state()
            for module, training in modes:
                module.training = training
        gaps = [
            (a.double() - b.double()).abs().flatten()
            for a, b in zip(floats_of(grown), floats_of(host), strict=True)
        ]
        if not gaps:
            raise KasminaException(
                "compare_with_original: the model returns no floating-point numbers to compare"
            )
        gap = torch.cat(gaps)
        return {"max_abs": float(gap.max()), "mean_abs": float(gap.mean())}


_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""By this name a model tells DistributedDataParallel what to leave alone."""


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_wrapped(what: str, model: Any) -> None:
    """Refuse a model that is not wrapped by Esper."""
    if not isinstance(model, MorphableModel):
        raise KasminaException(
            f"{what}: {type(model).__name__} is not a wrapped model; pass what esper.wrap returned,"
            " under DistributedDataParallel its `module`"
        )


def _one_of(kernel: Any, kernel_artifact_id: str | None) -> Any:
    chosen = kernel if kernel_artifact_id is None else kernel_artifact_id
    if chosen is None or (kernel is not None and kernel_artifact_id is not None):
        raise TypeError("load_kernel takes one kernel: an artifact's id, or a TorchKernel")
    return chosen


@cache
def morphable_class(host: type[nn.Module]) -> type[nn.Module]:
    """The class of wrapped models whose host is of class `host`."""
    body: dict[str, Any] = same_name(host)
    if issubclass(host, nn.Sequential) and not issubclass(host, SeededLayer):
        # A slice is made by the class of what is sliced, and is no wrapped model.
        body["__getitem__"] = _item
    return type(host.__name__, (MorphableModel, host), body)


def _item(self: Any, index: int | slice) -> nn.Module:
    own = list(self)
    return nn.Sequential(*own[index]) if isinstance(index, slice) else own[index]


def host_class(cls: type) -> type:
    """What a wrapped model's class is besides a `MorphableModel`."""
    # FSDP gives a model a class of its own, above this one.
    return next(own for own in cls.__mro__ if MorphableModel in own.__bases__).__bases__[1]


def fresh_model(base: type[nn.Module], kind: str | None) -> nn.Module:
    """An empty wrapped model, for copies and pickles to fill."""
    host = seeded_class(base) if kind == "seeded" else base
    cls = morphable_class(host)
    return cls.__new__(cls)
