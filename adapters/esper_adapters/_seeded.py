"""A JAX model, its seeds and its kernels, as one value; for Equinox and Flax alike.

The model that trains is `SeededModel.module`. Dormant, it is the host, the same
layers in the same places, so that a compiled step is the bare one's; a graft
puts a grafted layer in a layer's place. How a framework's models are taken apart
and put together is its `Surgery`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper_adapters._functional import FunctionalModel
from esper_adapters._graft import Graft, plan_grafts
from esper_adapters._naming import check_alpha, find_row, first_alpha, load_events
from esper_adapters._select import Target, select_layers
from esper_functional import (
    Event,
    EventKind,
    FoldError,
    KasminaException,
    Kernel,
    KernelMismatchError,
    Live,
    Network,
    Plan,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    advance,
    affine_form,
    apply_event,
    check_blend,
    check_kernel,
    count_params,
    fault_events,
    fold_linear,
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


class Signature(NamedTuple):
    """What a site's layer takes and returns, with whatever leading axes it was called with."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_dtype: Any
    dtype: Any
    """Of what it returns."""
    whole: bool = False
    """Whether the shapes are those of a call, batch and all, or those of their last axes."""
    alone: bool = True
    """Whether it takes one array and returns one."""


class Linear(NamedTuple):
    """The weights of a linear layer, in numpy."""

    weight: np.ndarray
    """`[out, in]`."""
    bias: np.ndarray | None


Probed = tuple[Any, tuple[jax.Array, ...]]
"""A network's output, and for each running kernel whether it failed."""


class Surgery(NamedTuple):
    """How the models of one framework are taken apart and put together."""

    framework: str
    layers: Callable[[Any], dict[str, Any]]
    """All layers of a bare host, by path."""
    signature: Callable[[Any], Signature | None]
    """What a layer takes and returns, where its weights say so."""
    stacked: Callable[[Any], bool]
    """Whether a layer is several in one, stacked for a scan or a map over layers."""
    graft: Callable[[Any, Mapping[str, Graft]], Any]
    """The network with grafted layers, for a host; never the host's own mutable parts."""
    strip: Callable[[Any], tuple[Any, dict[str, Mapping[int, Any]]]]
    """A network's host, and the parameters of its kernels by layer and seed."""
    grafted: Callable[[Any], dict[str, Any]]
    """The layers of a network by path, grafted ones as such."""
    structure: Callable[[Any], Any]
    """What two networks of one plan have equal."""
    functional: Callable[[Any, Sequence[str]], FunctionalModel]
    """The flat form of a host with sites."""
    probe: Callable[[Any, tuple[str, ...], Plan, Live | None, tuple[Any, ...]], Probed]
    """One compiled forward pass of a host with sites, as the framework's models are called: its
    output, and whether each running kernel failed, in its shadow if it incubates."""
    linear: Callable[[Any], Linear | None]
    """The weights of a linear layer; None for another."""
    with_linear: Callable[[Any, str, Linear], Any]
    """A host with other weights in one linear layer."""
    plain: Callable[[Any, Mapping[str, Graft], Mapping[str, Signature]], Any]
    """A host with some layers in their grafted form, by means of jax and the framework alone."""
    mutable: bool
    """Whether models are graphs of objects that change in place: one layer at several paths is
    one layer. In trees it is several."""


@dataclasses.dataclass(frozen=True)
class SeededModel:
    """A model with seeds. Every change returns a new one.

    Train `module` as you would the host. The seed state is not part of it: it lives on
    the host, where what runs is decided. A call of `module` contains faults and cannot
    count them, for a call returns an output and nothing else: `observe` counts on sampled
    steps, and `to_functional` with the core's `run` in every one.
    """

    host: Any
    """The host with its parameters, bare layers throughout, as it was at the last surgery; see
    `unwrap` for a module that was trained in place since."""
    seeds: SeedState
    """`[sites, seeds]`, in numpy."""
    kernels: Mapping[int, Kernel]
    """The kernels that seeds hold, with their parameters, by slot."""
    sites: tuple[str, ...]
    """The path of each layer with seeds."""
    blend: str
    isolate: bool
    contain: bool
    surgery: Surgery = dataclasses.field(repr=False)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    """Other paths of shared layers, and the sites they are."""
    signatures: Mapping[str, Signature] = dataclasses.field(default_factory=dict, repr=False)
    """What is known of the sites' shapes; the rest is checked when it is first traced."""
    resolve: Resolve | None = dataclasses.field(default=None, repr=False)

    @cached_property
    def plan(self) -> Plan:
        """What runs."""
        return plan(
            self.seeds,
            self.kernels,
            self.sites,
            blend=self.blend,
            isolate=self.isolate,
            contain=self.contain,
        )

    @property
    def live(self) -> Live | None:
        """The data of the running seeds; None where none runs."""
        return gather(self.seeds, self._current().kernels, self.plan)

    @cached_property
    def module(self) -> Any:
        """The network that runs: the host, with a grafted layer wherever kernels run."""
        grafts = plan_grafts(self.plan, self.live, running_seeds(self.seeds))
        # It is kept: where it is first asked for within a trace, nothing of that may stay in it.
        with jax.ensure_compile_time_eval():
            return self.surgery.graft(self.host, grafts)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the network, as its host is called."""
        return self.module(*args, **options)

    @property
    def kasmina_layers(self) -> dict[str, Any]:
        """The layers with seeds, by path."""
        found = self.surgery.grafted(self.module)
        return {name: found[name] for name in self.sites}

    def with_module(self, module: Any) -> "SeededModel":
        """Take over the parameters of a trained `module`.

        Raises:
            KasminaException: for a module whose grafts are not this model's.
        """
        if self.surgery.structure(self.module) != self.surgery.structure(module):
            raise KasminaException(
                "with_module: the module has another structure than this model's: pass the trained"
                " form of `model.module`, taken before any later graft"
            )
        return self._taken_over(module)

    def _taken_over(self, module: Any) -> "SeededModel":
        host, trained = self.surgery.strip(module)
        kernels = dict(self.kernels)
        for name, own in trained.items():
            row = self._row(name)
            for seed, params in own.items():
                slot = int(self.seeds.slot[row, seed])
                kernels[slot] = Kernel(kernels[slot].program, params)
        return dataclasses.replace(self, host=host, kernels=kernels)

    def _current(self) -> "SeededModel":
        """With the parameters that `module` has now, in case it was trained in place."""
        module = vars(self).get("module")
        return self._taken_over(module) if module is not None and self.surgery.mutable else self

    def apply_event(self, event: Event, kernel: Kernel | None = None) -> "SeededModel":
        """The model after an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError, SeedIndexError, SeedLifecycleError, FoldError.
        """
        # First the state, which refuses layers and seeds that are not there.
        seeds = apply_event(self.seeds, event, layers=self.sites)
        current = self._current()
        kernels, host = dict(current.kernels), current.host
        if event.kind is EventKind.ACTIVATE:
            if kernel is None:
                raise ValueError("an ACTIVATE event needs the kernel that it grafts")
            self._check(kernel, event)
            kernels[int(seeds.slot[event.layer, event.seed])] = kernel
        if event.kind is EventKind.FOLD:
            host = current._folded(event)
        held = {int(slot) for slot in np.unique(seeds.slot)}
        kernels = {slot: kernel for slot, kernel in kernels.items() if slot in held}
        return dataclasses.replace(current, host=host, seeds=seeds, kernels=kernels)

    def _check(self, kernel: Kernel, event: Event) -> None:
        name = self.sites[event.layer]
        if self.surgery.stacked(self.surgery.layers(self.host)[name]):
            raise KernelMismatchError(
                f"layer {name!r} is several layers, stacked for a scan or a map over them, and"
                " which of them a kernel is for cannot be told: keep layers that grow in a list"
            )
        known = self.signatures.get(name)
        # A kernel takes the last axes of the layer's input; all before them are batch.
        lead = 0 if known is None else len(known.inputs) - kernel.program.example_rank
        if known is None or (lead < 0 and not known.whole):
            return
        check_kernel(
            kernel,
            known.inputs[max(lead, 0) :],
            known.outputs[max(lead, 0) :],
            known.dtype,
            f"seed {event.seed} of layer {name!r}",
            input_dtype=known.input_dtype,
        )

    def _folded(self, event: Event) -> Any:
        name = self.sites[event.layer]
        layer = self.surgery.layers(self.host)[name]
        found, known = self.surgery.linear(layer), self.surgery.signature(layer)
        if found is None or known is None:
            raise FoldError(
                f"fold: layer {name!r} is not a linear layer, and only into those kernels can be"
                " folded: fossilise the kernel instead"
            )
        places = [seed for row, seed in running_seeds(self.seeds) if row == event.layer]
        if event.seed not in places:
            raise FoldError(
                f"fold: seed {event.seed} of layer {name!r} has stopped at its third failure, so it"
                " has no part in the output that could be folded"
            )
        kernel = self.kernels[int(self.seeds.slot[event.layer, event.seed])]
        own = affine_form(kernel, found.weight.shape[1], known.dtype)
        alphas = np.asarray(advance(self.seeds, event.step).alpha)[event.layer, places]
        weight, bias = fold_linear(
            found.weight, found.bias, own, self.plan.blend, alphas, places.index(event.seed)
        )
        return self.surgery.with_linear(self.host, name, Linear(weight, bias))

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
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError.
        """
        row = self._row(layer_name)
        kernel_id, confidence = "", 0.5
        if isinstance(kernel, str):
            if self.resolve is None:
                raise KasminaException(
                    "this model was wrapped without a library: pass `library=` to esper.wrap"
                )
            kernel_id, found = kernel, self.resolve(kernel)
            kernel, confidence = found.kernel, found.confidence
        value = check_alpha(first_alpha(confidence) if alpha is None else alpha)
        slot = row * self.seeds.shape[1] + seed_idx
        load, activate = load_events(step, row, seed_idx, slot, kernel_id, value)
        return self.apply_event(load).apply_event(activate, kernel)

    def _row(self, layer_name: str) -> int:
        return find_row(self.aliases.get(layer_name, layer_name), self.sites)

    def _event(
        self, kind: EventKind, layer_name: str, seed_idx: int, step: int, **more: Any
    ) -> "SeededModel":
        row = self._row(layer_name)
        return self.apply_event(Event(step, row, seed_idx, kind, **more))

    def unload_kernel(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Empty an ACTIVE seed."""
        return self._event(EventKind.UNLOAD, layer_name, seed_idx, step)

    def set_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, *, step: int = 0
    ) -> "SeededModel":
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        return self._event(EventKind.ALPHA, layer_name, seed_idx, step, value=alpha)

    def ramp_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, span: int, *, step: int
    ) -> "SeededModel":
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps; see `advance`."""
        return self._event(EventKind.RAMP, layer_name, seed_idx, step, value=alpha, span=span)

    def advance(self, step: int) -> "SeededModel":
        """Bring all ramps to `step`."""
        return dataclasses.replace(self._current(), seeds=advance(self.seeds, step))

    def incubate(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Let an ACTIVE seed at alpha 0 train in shadow forwards alone; see `shadows`."""
        return self._event(EventKind.INCUBATE, layer_name, seed_idx, step)

    def fossilize(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Freeze an ACTIVE seed into the network for good."""
        return self._event(EventKind.FOSSILIZE, layer_name, seed_idx, step)

    def fold(self, layer_name: str, seed_idx: int, *, step: int = 0) -> "SeededModel":
        """Fold an affine kernel into the weights of its linear host, and free its slot.

        The network gives what it gave; an ACTIVE seed is DORMANT again, a FOSSILIZED one
        stays so and runs no more. What was frozen is now part of weights that train.

        Raises:
            FoldError: for a kernel that is not affine, or a blend that forbids it.
        """
        return self._event(EventKind.FOLD, layer_name, seed_idx, step)

    def observe(self, *args: Any, step: int = 0) -> "SeededModel":
        """Count the faults of one forward pass, and go on; waits for the device.

        For sampled steps. Kernels that incubate are seen in their shadows.

        Args:
            args: a batch for models that take one example (Equinox), or whatever the model
                takes (Flax).
        """
        current = self._current()
        if current.live is None:
            return current
        _, faults = current._probe(current.plan, current.live, args)
        failed = np.asarray(jnp.stack(list(faults)))
        places = running_seeds(current.seeds)
        before = [int(current.seeds.error_count[place]) for place in places]
        counts = np.where(failed, np.asarray(before) + 1, 0)
        seeds = current.seeds
        for event in fault_events(seeds, counts, step=step):
            seeds = apply_event(seeds, event)
        return dataclasses.replace(current, seeds=seeds)

    def _probe(self, planned: Plan, live: Live | None, args: tuple[Any, ...]) -> Probed:
        return self.surgery.probe(self.host, self.sites, planned, live, args)

    def get_model_stats(self) -> dict[str, Any]:
        """Counts of layers, seeds by stage, and parameters of host and kernels."""
        stages = np.asarray(self.seeds.stage)
        host = to_functional(self).params
        return {
            "layers": len(self.sites),
            "seeds": int(stages.size),
            "seeds_by_stage": {
                stage.name: int((stages == stage).sum()) for stage in SeedLifecycleState
            },
            "host_parameters": count_params(host),
            "kernel_parameters": sum(
                count_params(kernel.params) for kernel in self.kernels.values()
            ),
        }

    def compare_with_original(self, *args: Any) -> dict[str, float]:
        """How far the kernels move the output on one input.

        Returns:
            `max_abs` and `mean_abs` of the difference between the network with and without
            its kernels, host weights being the trained ones in both.
        """
        current = self._current()
        bare_plan = Plan(tuple((name, ()) for name in self.sites), check_blend(self.blend), False)
        grown, _ = current._probe(current.plan, current.live, args)
        host, _ = current._probe(bare_plan, None, args)
        gaps = [
            np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel()
            for a, b in zip(jax.tree.leaves(grown), jax.tree.leaves(host), strict=True)
        ]
        gap = np.concatenate(gaps)
        return {"max_abs": float(gap.max()), "mean_abs": float(gap.mean())}


def to_functional(model: SeededModel) -> FunctionalModel:
    """The host as a pure function of its parameters, with the model's sites; for hot loops.

    The network is one object per call: keep it, and compiled programs are kept.
    """
    return model.surgery.functional(model._current().host, model.sites)


class _Recorder:
    """A site that notes what each layer takes and returns."""

    def __init__(self) -> None:
        self.seen: dict[str, Signature] = {}

    def __call__(self, name: str, layer: Any, params: Any, /, *args: Any, **options: Any) -> Any:
        result = layer(params, *args, **options)
        x: Any = args[0] if args else next(iter(options.values()), None)
        h: Any = result[0] if isinstance(result, tuple | list) and result else result
        if hasattr(x, "shape") and hasattr(h, "shape"):
            given = [*args, *options.values()]
            alone = h is result and sum(value is not None for value in given) == 1
            self.seen[name] = Signature(
                tuple(x.shape), tuple(h.shape), x.dtype, h.dtype, True, alone
            )
        return result


def record_signatures(flat: FunctionalModel, example: tuple[Any, ...]) -> dict[str, Signature]:
    """What each site takes and returns when the model is run on an example; runs nothing."""
    recorder = _Recorder()
    net: Network = flat.net
    x: Any = example[0] if len(example) == 1 else example
    jax.eval_shape(
        lambda params, rest, x: net(params, recorder, x if flat.rest is None else (rest, x)),
        flat.params,
        flat.rest,
        x,
    )
    return recorder.seen


def seed_model(
    host: Any,
    surgery: Surgery,
    *,
    target_layers: Sequence[Target],
    seeds_per_layer: int,
    blend: str,
    isolate: bool,
    contain: bool,
    resolve: Resolve | None,
    example: tuple[Any, ...] | None,
) -> SeededModel:
    """Give some layers of a host seeds; see a face's `wrap`."""
    check_blend(blend)
    if isinstance(host, SeededModel):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    if surgery.strip(host)[1]:
        raise KasminaException(
            "wrap: the network has grafted layers: wrap its host, which esper.unwrap gives"
        )
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    layers = surgery.layers(host)
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    names = select_layers(layers, target_layers)
    if surgery.mutable:
        for name in names:
            first.setdefault(id(layers[name]), name)
        names = tuple(first.values())
        aliases = {n: first[id(layer)] for n, layer in layers.items() if id(layer) in first}
    signatures = {
        name: signature
        for name in names
        if (signature := surgery.signature(layers[name])) is not None
    }
    if example is not None:
        signatures |= record_signatures(surgery.functional(host, names), example)
    return SeededModel(
        host=host,
        seeds=init_seeds(len(names), seeds_per_layer),
        kernels={},
        sites=names,
        blend=blend,
        isolate=isolate,
        contain=contain,
        surgery=surgery,
        aliases={alias: name for alias, name in aliases.items() if alias != name},
        signatures=signatures,
        resolve=resolve,
    )
