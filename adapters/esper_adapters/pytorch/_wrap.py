"""`wrap` and `unwrap`: seeds for the layers of a torch model.

Wrapping clones the module structure and shares the tensors; the clone's class
is a subclass of the host's own, so that keys, signature, attributes and hooks
stay as they were.
"""

import asyncio
import copy
import warnings
from collections import Counter as PyCounter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from esper_adapters._naming import check_alpha, find_row, first_alpha
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._layer import (
    EXTRA,
    SeededLayer,
    absorb_faults,
    advance_layers,
    base_class,
    is_seeds,
    seeded_class,
)
from esper_adapters.pytorch._sites import Target, check_targets, fused_hosts, select_sites
from esper_adapters.pytorch._table import SeedTable
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    UncalledSiteWarning,
    check_blend,
)

Resolve = Callable[[str], TorchKernel]
"""Finds a kernel by its id; raises LookupError where there is none."""


class MorphableModel(nn.Module):
    """What a wrapped model has beyond its host; never instantiated by itself."""

    _esper_table: SeedTable
    _esper_names: tuple[str, ...]
    _esper_left: dict[str, str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        base: Any = _host_class(type(self))
        if issubclass(base, SeededLayer):
            return _fresh, (base._esper_base, base._esper_kind), self.__getstate__()
        return _fresh, (base, "plain"), self.__getstate__()

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
        return list(self.kasmina_layers.values())[find_row(layer_name, names)]

    def load_kernel_sync(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | None = None,
        step: int | None = None,
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
        step: int | None = None,
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
        resolve = self._esper_table.resolve
        if resolve is None:
            raise KasminaException(
                "this model was wrapped without a library: pass `library=` to esper.wrap"
            )
        return resolve(kernel_id)

    def _begin(
        self, layer_name: str, seed_idx: int, kernel_id: str, alpha: float | None, step: int | None
    ) -> SeededLayer:
        if alpha is not None:
            check_alpha(alpha)
        layer = self._layer(layer_name)
        slot = layer.row * layer.num_seeds + seed_idx
        now = self._esper_table.at(step)
        layer.apply_event(Event(now, layer.row, seed_idx, EventKind.LOAD, kernel_id, float(slot)))
        return layer

    def _finish(
        self,
        layer: SeededLayer,
        seed: int,
        kernel_id: str,
        alpha: float | None,
        step: int | None,
        fetch: Resolve,
    ) -> bool:
        # While the library was read, the model may have gone on.
        table = self._esper_table
        now = table.step if step is None else max(step, table.step)

        def end(kind: EventKind) -> None:
            layer.apply_event(Event(now, layer.row, seed, kind, kernel_id))

        try:
            kernel = fetch(kernel_id)
            value = first_alpha(kernel.confidence) if alpha is None else alpha
            activate = Event(now, layer.row, seed, EventKind.ACTIVATE, kernel_id, value)
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

    async def unload_kernel(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> bool:
        """Empty an ACTIVE seed."""
        SeededLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)
        return True

    def unload_kernel_sync(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> bool:
        """Empty an ACTIVE seed."""
        SeededLayer.unload_kernel_sync(self._layer(layer_name), seed_idx, step=step)
        return True

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
        step: int | None = None,
    ) -> None:
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps; see `advance`."""
        SeededLayer.ramp_seed_alpha(self._layer(layer_name), seed_idx, alpha, span, step=step)

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
        each incubating kernel.
        """
        return tuple(
            _run_shadow(self, layer, seed, args, options)
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
        others = any(layer._called for layer in layers)
        idle = [layer.layer_name for layer in layers if layer.passed_by(others)]
        if idle:
            warnings.warn(
                f"kernels run in layers {idle}, and no forward pass has called them: their host"
                " uses their weights without calling them, or not at all. Unload them",
                UncalledSiteWarning,
                stacklevel=2,
            )
        for layer in layers:
            layer._called = False
        return absorb_faults(table, layers, table.at(step))

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
            KasminaException: for the seeds of another wrapping, or a kernel that cannot be
                found; nothing is changed.
        """
        for name, layer in self.kasmina_layers.items():
            extra = state_dict.get(f"{name}.{EXTRA}" if name else EXTRA)
            if extra is not None:
                layer.find_kernels(extra)
        prefixes = [f"{name}.{EXTRA}" if name else EXTRA for name in self.kasmina_layers]
        foreign = [k for k in state_dict if k.endswith(f".{EXTRA}") and k not in prefixes]
        foreign = [k for k in foreign if is_seeds(state_dict[k])]
        if foreign:
            raise KasminaException(
                f"load_state_dict: it has seeds of {[k[: -len(EXTRA) - 1] for k in foreign]}, and"
                f" this model's layers with seeds are {list(self.kasmina_layers)}: wrap with the"
                " target_layers that the saved model was wrapped with"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

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


def _run_shadow(
    model: Any, layer: SeededLayer, seed: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    kernel = layer.kernel(seed)
    own = set() if kernel is None else {id(p) for p in kernel.parameters()}
    tensors = {
        name: p if id(p) in own else p.detach()
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    tensors |= {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)}
    stopped = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, options))
    # Layers that incubate and blend nothing have no kernels in their forward but here.
    held = layer._runs
    layer._shadowed, layer._runs = seed, tuple(c.kernel for c in layer._counters.values())
    try:
        with torch.random.fork_rng():
            return torch.func.functional_call(model, tensors, *stopped)
    finally:
        layer._shadowed, layer._runs = None, held


@cache
def _morphable(host: type[nn.Module]) -> type[nn.Module]:
    return type(f"Morphable{host.__name__}", (MorphableModel, host), {"__module__": __name__})


def _host_class(cls: type) -> type:
    """What a wrapped model's class is besides a `MorphableModel`."""
    return cls.__bases__[1]


def _fresh(base: type[nn.Module], kind: str | None) -> nn.Module:
    """An empty wrapped model, for copies and pickles to fill."""
    host = seeded_class(base) if kind == "seeded" else base
    cls = _morphable(host)
    return cls.__new__(cls)


def _clone(host: nn.Module, copy_tensors: bool) -> nn.Module:
    tensors = [*host.parameters(), *host.buffers()]
    return copy.deepcopy(host, {} if copy_tensors else {id(t): t for t in tensors})


def wrap(
    host: nn.Module,
    *,
    target_layers: Target | Sequence[Target] = (nn.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    resolve: Resolve | None = None,
    copy: bool = False,
) -> Any:
    """Give layers of a model seeds. The host object itself is not changed.

    Args:
        target_layers: classes of layers, module paths such as `"blocks.*.mlp"`, and predicates
            of (path, module). What cannot carry seeds is left alone; see
            `MorphableModel.left_alone`.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        resolve: finds kernels by id.
        copy: copy the parameters too, instead of sharing them.

    Returns:
        An instance of a subclass of the host's class and of `MorphableModel`.

    Raises:
        SeedIndexError: for a target that no layer matches.
        BlendError: for an unknown blend.
        KasminaException: for a model that is wrapped already.
    """
    kind = check_blend(blend)
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    if any(isinstance(m, MorphableModel | SeededLayer) for m in host.modules()):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    names, left = select_sites(host, check_targets(target_layers))
    model: Any = _clone(host, copy)
    table = SeedTable(names, seeds_per_layer)
    table.resolve = resolve
    holders = [p for m in model.modules() for p in m.parameters(recurse=False)]
    shared = {i for i, n in PyCounter(map(id, holders)).items() if n > 1}
    for row, name in enumerate(names):
        layer: Any = model.get_submodule(name)
        layer.__class__ = seeded_class(type(layer))
        layer._plant(table, row, kind, isolate)
        layer._fused = fused_hosts(model, name)
        layer._tied = any(id(p) in shared for p in layer.parameters(recurse=False))
    model.__class__ = _morphable(type(model))
    model._esper_table = table
    model._esper_names = names
    model._esper_left = left
    return model


_PLANTED = (
    *("_table", "_row", "blend", "isolate", "_runs", "_counters", "_blended", "_host_weight"),
    *("_weights", "_called", "_fused", "_hook", "_tied", "_shadowed", "_returns_several"),
)


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
    host.__class__ = _host_class(type(host))
    for attribute in ("_esper_table", "_esper_names", "_esper_left"):
        delattr(host, attribute)
    for layer in layers.values():
        layer._runs = ()
        layer.lift_fused_path()
        for seed in range(layer.num_seeds):
            if layer.kernel(seed) is not None:
                delattr(layer, f"kernel_{seed}")
        for attribute in _PLANTED:
            layer.__dict__.pop(attribute, None)
        layer.__class__ = base_class(type(layer))
    return host
