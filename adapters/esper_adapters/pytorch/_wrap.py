"""`wrap` and `unwrap`: seeds for the linear layers of a torch model.

Wrapping clones the module structure and shares the tensors; the clone's class
is a subclass of the host's own, so that keys, signature, attributes and hooks
stay as they were.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from esper_adapters._naming import check_alpha, find_row, first_alpha, nothing_matched
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._layer import KasminaLayer, SeedTable
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    check_blend,
)

Resolve = Callable[[str], TorchKernel]
"""Finds a kernel by its id; raises LookupError where there is none."""


class _Shared:
    """Holds what copies of a model share instead of copying it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class MorphableModel(nn.Module):
    """What a wrapped model has beyond its host; never instantiated by itself."""

    _esper_table: SeedTable
    _esper_names: tuple[str, ...]
    _esper_resolve: _Shared

    @property
    def kasmina_layers(self) -> dict[str, KasminaLayer]:
        """The layers with seeds, by the host's own module path."""
        found = {name: self.get_submodule(name) for name in self._esper_names}
        return {name: layer for name, layer in found.items() if isinstance(layer, KasminaLayer)}

    @property
    def seeds(self) -> SeedState:
        """The state of all seeds, `[layers, seeds]`, in numpy."""
        return self._esper_table.state

    @property
    def seed_table(self) -> SeedTable:
        """The seeds with their layers' names and listeners."""
        return self._esper_table

    # A model that is itself a linear layer is a KasminaLayer too, and the methods below
    # hide that class's own: they are called by their class.

    def _layer(self, layer_name: str) -> KasminaLayer:
        names = list(self._esper_names)
        return list(self.kasmina_layers.values())[find_row(layer_name, names)]

    def load_kernel_sync(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | None = None,
        step: int = 0,
    ) -> bool:
        """Graft a kernel of the library into a DORMANT seed.

        Args:
            layer_name: the layer's module path in the host.
            kernel_artifact_id: SHA-256 of the artifact.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).

        Returns:
            False, and the seed DORMANT, where the library has no such kernel.

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError: the seed is
                as it was.
            KasminaException: where the kernel is there and cannot be read; the seed is
                then in ERROR_RECOVERY.
        """
        layer = self._begin(layer_name, seed_idx, kernel_artifact_id, alpha, step)
        return self._finish(layer, seed_idx, kernel_artifact_id, alpha, step, self._fetch)

    async def load_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | None = None,
        step: int = 0,
    ) -> bool:
        """`load_kernel_sync`, reading the library in a thread."""
        layer = self._begin(layer_name, seed_idx, kernel_artifact_id, alpha, step)
        outcome: TorchKernel | BaseException
        try:
            outcome = await asyncio.to_thread(self._fetch, kernel_artifact_id)
        except BaseException as error:  # a cancelled task included: `_finish` raises it again
            outcome = error

        def fetched(_: str) -> TorchKernel:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return self._finish(layer, seed_idx, kernel_artifact_id, alpha, step, fetched)

    def _fetch(self, kernel_id: str) -> TorchKernel:
        resolve = self._esper_resolve.value
        if resolve is None:
            raise KasminaException(
                "this model was wrapped without a library: pass `library=` to esper.wrap"
            )
        return resolve(kernel_id)

    def _begin(
        self, layer_name: str, seed_idx: int, kernel_id: str, alpha: float | None, step: int
    ) -> KasminaLayer:
        if alpha is not None:
            check_alpha(alpha)
        layer = self._layer(layer_name)
        slot = layer.row * layer.num_seeds + seed_idx
        layer.apply_event(Event(step, layer.row, seed_idx, EventKind.LOAD, kernel_id, float(slot)))
        return layer

    def _finish(
        self,
        layer: KasminaLayer,
        seed: int,
        kernel_id: str,
        alpha: float | None,
        step: int,
        fetch: Resolve,
    ) -> bool:
        def end(kind: EventKind) -> None:
            layer.apply_event(Event(step, layer.row, seed, kind, kernel_id))

        try:
            kernel = fetch(kernel_id)
            value = first_alpha(kernel.confidence) if alpha is None else alpha
            activate = Event(step, layer.row, seed, EventKind.ACTIVATE, kernel_id, value)
            layer.apply_event(activate, kernel)
        except LookupError:
            end(EventKind.CANCEL)
            return False
        except KernelMismatchError:
            end(EventKind.CANCEL)
            raise
        except asyncio.CancelledError:
            end(EventKind.CANCEL)
            raise
        except BaseException:
            # Whatever it was, the seed does not stay LOADING for good.
            end(EventKind.FAIL)
            raise
        return True

    async def unload_kernel(self, layer_name: str, seed_idx: int, *, step: int = 0) -> bool:
        """Empty an ACTIVE seed."""
        KasminaLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)
        return True

    def unload_kernel_sync(self, layer_name: str, seed_idx: int, *, step: int = 0) -> bool:
        """Empty an ACTIVE seed."""
        KasminaLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)
        return True

    def set_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, *, step: int = 0
    ) -> None:
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        KasminaLayer.set_seed_alpha(self._layer(layer_name), seed_idx, alpha, step=step)

    def fossilize(self, layer_name: str, seed_idx: int, *, step: int = 0) -> None:
        """Freeze an ACTIVE seed into the network for good."""
        KasminaLayer.fossilize(self._layer(layer_name), seed_idx, step=step)

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
        }

    def compare_with_original(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """How far the kernels move the output on one input.

        Returns:
            `max_abs` and `mean_abs` of the difference between the model with and
            without its kernels, host weights being the trained ones in both.
        """
        layers = list(self.kasmina_layers.values())
        held = [layer._runs for layer in layers]
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                grown: Tensor = self(*args, **kwargs)
                for layer in layers:
                    layer._runs = ()
                host: Tensor = self(*args, **kwargs)
        finally:
            for layer, runs in zip(layers, held, strict=True):
                layer._runs = runs
            for module, training in modes:
                module.training = training
        gap = (grown - host).abs()
        return {"max_abs": float(gap.max()), "mean_abs": float(gap.mean())}


@cache
def _morphable(host: type[nn.Module]) -> type[nn.Module]:
    return type(f"Morphable{host.__name__}", (MorphableModel, host), {})


def _clone(host: nn.Module, copy_tensors: bool) -> nn.Module:
    tensors = [*host.parameters(), *host.buffers()]
    return copy.deepcopy(host, {} if copy_tensors else {id(t): t for t in tensors})


def wrap(
    host: nn.Module,
    *,
    target_layers: Sequence[type[nn.Module]] = (nn.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    resolve: Resolve | None = None,
    copy: bool = False,
) -> Any:
    """Give the linear layers of a model seeds. The host object itself is not changed.

    Args:
        target_layers: types of layers to take; `nn.Linear` itself or its bases.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        resolve: finds kernels by id.
        copy: copy the parameters too, instead of sharing them.

    Returns:
        An instance of a subclass of the host's class and of `MorphableModel`.

    Raises:
        SeedIndexError: where no layer matches.
        BlendError: for an unknown blend.
        KasminaException: for a model that is wrapped already.
    """
    kind = check_blend(blend)
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    if any(isinstance(m, MorphableModel | KasminaLayer) for m in host.modules()):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    targets = tuple(target_layers)
    names = tuple(
        name for name, m in host.named_modules() if type(m) is nn.Linear and isinstance(m, targets)
    )
    if not names:
        raise nothing_matched(targets, (type(m).__name__ for m in host.modules()))
    model: Any = _clone(host, copy)
    table = SeedTable(names, seeds_per_layer)
    for row, name in enumerate(names):
        layer: Any = model.get_submodule(name)
        layer.__class__ = KasminaLayer
        layer._plant(table, row, kind, isolate)
    model.__class__ = _morphable(type(model))
    model._esper_table = table
    model._esper_names = names
    model._esper_resolve = _Shared(resolve)
    return model


_PLANTED = ("_table", "_row", "blend", "isolate", "_runs", "_errors", "_host_weight", "_weights",
            "_working")  # fmt: skip


def unwrap(model: nn.Module) -> nn.Module:
    """The trained host of a wrapped model, without seeds and kernels; shares its tensors.

    Raises:
        KasminaException: for a model that is not wrapped.
    """
    if not isinstance(model, MorphableModel):
        raise KasminaException(
            f"unwrap: {type(model).__name__} is not a wrapped model; pass what esper.wrap returned"
        )
    host: Any = _clone(model, False)
    layers: dict[str, Any] = host.kasmina_layers
    host.__class__ = type(host).__mro__[2]
    for attribute in ("_esper_table", "_esper_names", "_esper_resolve"):
        delattr(host, attribute)
    for layer in layers.values():
        for seed in range(layer.num_seeds):
            if layer.kernel(seed) is not None:
                delattr(layer, f"kernel_{seed}")
        for attribute in _PLANTED:
            layer.__dict__.pop(attribute, None)
        layer.__class__ = nn.Linear
    return host
