"""`wrap` for Equinox: a model, its seeds and its kernels, as one immutable value.

The model that trains is `SeededModel.module`. Dormant, it *is* the host, the
same tree of the same layers, so that a compiled step is the bare one's; a graft
puts a `GraftedLinear` in a layer's place.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esper_adapters._naming import (
    check_alpha,
    find_row,
    first_alpha,
    load_events,
    nothing_matched,
)
from esper_adapters.equinox._layer import GraftedLinear, is_linear, is_site, path_name
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    Kernel,
    Live,
    Plan,
    SeedIndexError,
    SeedState,
    apply_event,
    check_blend,
    check_kernel,
    gather,
    init_seeds,
    plan,
    running_seeds,
)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A kernel found by its id, and the confidence of its manifest."""

    kernel: Kernel
    confidence: float = 0.5


Resolve = Callable[[str], Resolved]
"""Finds a kernel by its id; raises LookupError where there is none."""


@dataclasses.dataclass(frozen=True)
class SeededModel:
    """An Equinox model with seeds. Every change returns a new one.

    Train `module` as you would the host, and put what comes out back with
    `with_module`. The seed state is not part of `module`: it lives on the host,
    where what runs is decided. Calling `module` contains faults and cannot count them, for
    a call returns an output and nothing else; `to_functional` with the core's `run` does.
    """

    host: Any
    """The host with its current parameters; bare layers throughout."""
    seeds: SeedState
    """`[sites, seeds]`, in numpy."""
    kernels: Mapping[int, Kernel]
    """The kernels that seeds hold, with their current parameters, by slot."""
    sites: tuple[str, ...]
    """The path of each layer with seeds."""
    blend: str
    isolate: bool
    resolve: Resolve | None = None

    @property
    def plan(self) -> Plan:
        """What runs."""
        return plan(self.seeds, self.kernels, self.sites, blend=self.blend, isolate=self.isolate)

    @property
    def live(self) -> Live | None:
        """The data of the running seeds; None where none runs."""
        return gather(self.seeds, self.kernels, self.plan)

    @property
    def module(self) -> Any:
        """The network that runs: the host, with a `GraftedLinear` wherever kernels run."""
        planned, live = self.plan, self.live
        grafts: dict[str, Callable[[eqx.nn.Linear], GraftedLinear]] = {}
        first = busy = 0
        for name, runs in planned.sites:
            if runs and live is not None:
                chosen = slice(first, first + len(runs))
                grafts[name] = _grafter(planned, live, runs, chosen, busy)
                busy += 1
            first += len(runs)
        return _map_sites(
            self.host, is_linear, lambda name, layer: grafts.get(name, lambda bare: bare)(layer)
        )

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """Run the network on one example."""
        return self.module(x) if key is None else self.module(x, key=key)

    @property
    def kasmina_layers(self) -> dict[str, eqx.nn.Linear | GraftedLinear]:
        """The layers with seeds, by path."""
        found: dict[str, eqx.nn.Linear | GraftedLinear] = {}
        module = self.module
        _map_sites(module, is_site, lambda name, layer: found.setdefault(name, layer))
        return {name: found[name] for name in self.sites}

    def with_module(self, module: Any) -> "SeededModel":
        """Take over the parameters of a trained `module`.

        Raises:
            KasminaException: for a module whose grafts are not this model's.
        """
        expected = jax.tree.structure(self.module)
        found = jax.tree.structure(module)
        if expected != found:
            raise KasminaException(
                "with_module: the module has another structure than this model's: pass the trained"
                " form of `model.module`, taken before any later graft"
            )
        trained: list[Any] = []

        def strip(_: str, layer: Any) -> eqx.nn.Linear:
            if isinstance(layer, GraftedLinear):
                trained.extend(layer.kernels)
                return layer.host
            return layer

        host = _map_sites(module, is_site, strip)
        slots = [int(self.seeds.slot[ij]) for ij in running_seeds(self.seeds)]
        updated = {
            slot: Kernel(self.kernels[slot].program, params)
            for slot, params in zip(slots, trained, strict=True)
        }
        return dataclasses.replace(self, host=host, kernels={**self.kernels, **updated})

    def apply_event(self, event: Event, kernel: Kernel | None = None) -> "SeededModel":
        """The model after an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError, SeedIndexError, SeedLifecycleError.
        """
        # First the state, which refuses layers and seeds that are not there.
        seeds = apply_event(self.seeds, event, layers=self.sites)
        slot = event.layer * self.seeds.shape[1] + event.seed
        kernels = dict(self.kernels)
        if event.kind is EventKind.ACTIVATE:
            if kernel is None:
                raise ValueError("an ACTIVATE event needs the kernel that it grafts")
            layer = self._layers()[self.sites[event.layer]]
            out_features, in_features = layer.weight.shape
            check_kernel(
                kernel,
                (in_features,),
                (out_features,),
                layer.weight.dtype,
                f"seed {event.seed} of layer {self.sites[event.layer]!r}",
            )
            kernels[slot] = kernel
        if event.kind in (EventKind.UNLOAD, EventKind.CANCEL, EventKind.RESET):
            kernels.pop(slot, None)
        return dataclasses.replace(self, seeds=seeds, kernels=kernels)

    def _layers(self) -> dict[str, eqx.nn.Linear]:
        found: dict[str, eqx.nn.Linear] = {}
        _map_sites(self.host, is_linear, lambda name, layer: found.setdefault(name, layer))
        return found

    def load_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel: str | Kernel,
        *,
        alpha: float | None = None,
        step: int = 0,
    ) -> "SeededModel":
        """Graft a kernel into a DORMANT seed.

        Args:
            layer_name: the layer's path, such as `layers.0`.
            kernel: the id of an artifact in the library, or a kernel.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).

        Raises:
            LookupError: where the library has no such kernel.
            SeedIndexError, SeedLifecycleError, KernelMismatchError.
        """
        kernel_id, confidence = "", 0.5
        if isinstance(kernel, str):
            if self.resolve is None:
                raise KasminaException(
                    "this model was wrapped without a library: pass `library=` to esper.wrap"
                )
            kernel_id, found = kernel, self.resolve(kernel)
            kernel, confidence = found.kernel, found.confidence
        row = find_row(layer_name, self.sites)
        value = check_alpha(first_alpha(confidence) if alpha is None else alpha)
        slot = row * self.seeds.shape[1] + seed_idx
        load, activate = load_events(step, row, seed_idx, slot, kernel_id, value)
        return self.apply_event(load).apply_event(activate, kernel)

    def unload_kernel(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Empty an ACTIVE seed."""
        row = find_row(layer_name, self.sites)
        return self.apply_event(Event(step, row, seed_idx, EventKind.UNLOAD))

    def set_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, *, step: int = 0
    ) -> "SeededModel":
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        row = find_row(layer_name, self.sites)
        return self.apply_event(Event(step, row, seed_idx, EventKind.ALPHA, value=alpha))

    def fossilize(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Freeze an ACTIVE seed into the network for good."""
        row = find_row(layer_name, self.sites)
        return self.apply_event(Event(step, row, seed_idx, EventKind.FOSSILIZE))


def _grafter(
    planned: Plan, live: Live, runs: tuple[Any, ...], chosen: slice, busy: int
) -> Callable[[eqx.nn.Linear], GraftedLinear]:
    def graft(layer: eqx.nn.Linear) -> GraftedLinear:
        return GraftedLinear(
            host=layer,
            kernels=live.params[chosen],
            host_weight=jnp.asarray(live.host_weights[busy]),
            weights=jnp.asarray(live.weights[chosen]),
            errors=jnp.asarray(live.errors[chosen]),
            runs=runs,
            blend=planned.blend,
            isolate=planned.isolate,
        )

    return graft


def _map_sites(
    tree: Any, is_leaf: Callable[[object], bool], function: Callable[[str, Any], Any]
) -> Any:
    """Replace every node that `is_leaf` takes by `function(path name, node)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf) if is_leaf(leaf) else leaf,
        tree,
        is_leaf=is_leaf,
    )


def trainable(module: Any) -> Any:
    """A filter for `eqx.partition`: True for what an optimiser may change.

    False for blend weights, failure counts, and the parameters of fossils, which
    plain `eqx.is_inexact_array` would hand to weight decay.
    """

    def of_node(node: Any) -> Any:
        if not isinstance(node, GraftedLinear):
            return eqx.is_inexact_array(node)
        nothing = jax.tree.map(lambda _: False, node)
        own = tuple(
            jax.tree.map(lambda leaf, keep=not run.frozen: keep and eqx.is_inexact_array(leaf), p)
            for run, p in zip(node.runs, node.kernels, strict=True)
        )
        host = jax.tree.map(eqx.is_inexact_array, node.host)
        return eqx.tree_at(lambda n: (n.host, n.kernels), nothing, (host, own))

    return jax.tree.map(of_node, module, is_leaf=lambda node: isinstance(node, GraftedLinear))


def wrap(
    host: Any,
    *,
    target_layers: Sequence[type] = (eqx.nn.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    resolve: Resolve | None = None,
) -> SeededModel:
    """Give the linear layers of an Equinox model seeds. Nothing is copied.

    Args:
        target_layers: types of layers to take; `eqx.nn.Linear` or its bases.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        resolve: finds kernels by id.

    Raises:
        SeedIndexError: where no layer matches.
        BlendError: for an unknown blend.
    """
    check_blend(blend)
    if isinstance(host, SeededModel):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    targets = tuple(target_layers)
    names: list[str] = []
    kinds: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, eqx.Module):
            kinds.append(type(node).__name__)
        return is_linear(node)

    for path, leaf in jax.tree_util.tree_leaves_with_path(host, is_leaf=visit):
        if is_linear(leaf) and isinstance(leaf, targets):
            names.append(path_name(path))
    if not names:
        raise nothing_matched(targets, kinds)
    return SeededModel(
        host=host,
        seeds=init_seeds(len(names), seeds_per_layer),
        kernels={},
        sites=tuple(names),
        blend=blend,
        isolate=isolate,
        resolve=resolve,
    )


def unwrap(model: SeededModel) -> Any:
    """The trained host, without seeds and kernels."""
    return model.host
