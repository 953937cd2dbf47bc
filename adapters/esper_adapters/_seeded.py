"""A JAX model, its seeds and its kernels, as one value; for Equinox and Flax alike.

The model that trains is `SeededModel.module`. Dormant, it is the host, the same
layers in the same places, so that a compiled step is the bare one's; a graft
puts a grafted layer in a layer's place. How a framework's models are taken apart
and put together is its `Surgery`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from esper_adapters._frozen import check_frozen
from esper_adapters._functional import Call, FunctionalModel
from esper_adapters._graft import plan_grafts
from esper_adapters._naming import check_alpha, find_row, first_alpha, load_events, step_reached
from esper_adapters._surgery import Linear, Probed, Signature, Stripped, Surgery
from esper_functional import (
    Event,
    EventKind,
    FoldError,
    KasminaException,
    Kernel,
    KernelMismatchError,
    Live,
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
    call: Call | None = dataclasses.field(default=None, repr=False)
    """How the model is run on a batch; None for its framework's way."""
    step: int = 0
    """The step that the seeds have reached: what comes without a step comes at this one."""
    events: tuple[Event, ...] = dataclasses.field(default=(), repr=False)
    """All that happened to the seeds since `wrap`, oldest first: `fold_events` over the initial
    state, advanced to the same step, is `seeds` again."""

    def __post_init__(self) -> None:
        vars(self)["_trace"] = get_opaque_trace_state(convention="nnx")

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

    @property
    def module(self) -> Any:
        """The network that runs: the host, with a grafted layer wherever kernels run."""
        kept = vars(self).get("_module")
        if kept is not None:
            return kept
        grafts = plan_grafts(self.plan, self.live, running_seeds(self.seeds))
        module = self.surgery.graft(self.host, grafts)
        # What is made within a trace must not outlive it.
        if get_opaque_trace_state(convention="nnx") == vars(self)["_trace"]:
            vars(self)["_module"] = module
        return module

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
            KasminaException: for a module whose grafts are not this model's, or in which an
                optimiser moved what does not train.
        """
        (own, arrays), (other, others) = map(self.surgery.structure, (self.module, module))
        if own != other or arrays.keys() != others.keys():
            raise KasminaException(
                "with_module: the module has another structure than this model's: pass the trained"
                " form of `model.module`, taken before any later graft"
            )
        for path, kind in arrays.items():
            if others[path] != kind:
                raise KasminaException(
                    f"with_module: {path!r} is {kind} in this model and {others[path]} in the"
                    " module that it was given"
                )
        stripped = self.surgery.strip(module)
        live = gather(self.seeds, self.kernels, self.plan)
        grafts = plan_grafts(self.plan, live, running_seeds(self.seeds))
        check_frozen(grafts, stripped, self._row)
        return self._taken_over(stripped)

    def _taken_over(self, stripped: Stripped) -> "SeededModel":
        kernels = dict(self.kernels)
        for name, own in stripped.kernels.items():
            row = self._row(name)
            for seed, params in own.items():
                slot = int(self.seeds.slot[row, seed])
                if self.seeds.stage[row, seed] != SeedLifecycleState.FOSSILIZED:
                    kernels[slot] = Kernel(kernels[slot].program, params)
        return dataclasses.replace(self, host=stripped.host, kernels=kernels)

    def with_seeds(
        self,
        seeds: SeedState,
        kernels: Mapping[int, Kernel],
        *,
        step: int,
        events: tuple[Event, ...] = (),
    ) -> "SeededModel":
        """This host with other seeds and kernels, such as those of a checkpoint.

        Host, seeds and kernels are all that a model is.

        Args:
            seeds: of this model's layers.
            kernels: by slot, with their parameters; all that running seeds refer to.
            step: the step that `seeds` had reached.
            events: those by which they came about, to be gone on with.

        Raises:
            SeedIndexError: for seeds of another shape, or a slot without a kernel.
            KernelMismatchError: for a kernel that does not fit.
        """
        seeds = jax.tree.map(np.asarray, seeds)
        if seeds.shape != self.seeds.shape:
            raise SeedIndexError(
                f"with_seeds: this model has {self.seeds.shape[0]} layers of {self.seeds.shape[1]}"
                f" seeds; got a state of shape {seeds.shape}"
            )
        held = {int(slot) for slot in np.unique(seeds.slot)}
        kernels = {slot: kernel for slot, kernel in kernels.items() if slot in held}
        model = dataclasses.replace(
            self, seeds=seeds, kernels=kernels, step=step, events=tuple(events)
        )
        # A plan looks every running seed's slot up.
        for name, runs in model.plan.sites:
            if not runs:
                continue
            row = self._row(name)
            for seed in [j for i, j in running_seeds(seeds) if i == row]:
                self._check(kernels[int(seeds.slot[row, seed])], row, seed)
        return model

    def _current(self) -> "SeededModel":
        """With the parameters that `module` has now, in case it was trained in place."""
        module = vars(self).get("_module")
        if module is None or not self.surgery.mutable:
            return self
        return self._taken_over(self.surgery.strip(module))

    def apply_event(self, event: Event, kernel: Kernel | None = None) -> "SeededModel":
        """The model after an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError, SeedIndexError, SeedLifecycleError, FoldError.
        """
        # First the state, which refuses layers and seeds that are not there.
        step_reached(event.step, self.step)
        seeds = apply_event(self.seeds, event, layers=self.sites)
        if event.kind is EventKind.LOAD:
            self._check_slot(event)
        current = self._current()
        kernels, host = dict(current.kernels), current.host
        if event.kind is EventKind.ACTIVATE:
            if kernel is None:
                raise ValueError("an ACTIVATE event needs the kernel that it grafts")
            self._check(kernel, event.layer, event.seed)
            kernels[int(seeds.slot[event.layer, event.seed])] = kernel
        if event.kind is EventKind.FOLD:
            host = current._folded(event)
        held = {int(slot) for slot in np.unique(seeds.slot)}
        kernels = {slot: kernel for slot, kernel in kernels.items() if slot in held}
        return dataclasses.replace(
            current,
            host=host,
            seeds=seeds,
            kernels=kernels,
            step=event.step,
            events=(*self.events, event),
        )

    def _check_slot(self, event: Event) -> None:
        slot, columns = int(event.value), self.seeds.shape[1]
        for row, seed in np.argwhere(np.asarray(self.seeds.slot) == slot).tolist():
            if (row, seed) != (event.layer, event.seed):
                raise SeedIndexError(
                    f"slot {slot} holds the kernel of seed {seed} of layer {self.sites[row]!r},"
                    " which another would replace: give LOAD a slot of its own as value, such as"
                    f" layer * seeds + seed, {event.layer * columns + event.seed} here"
                )

    def _check(self, kernel: Kernel, row: int, seed: int) -> None:
        name = self.sites[row]
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
            f"seed {seed} of layer {name!r}",
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
        kernel: Any,
        *,
        alpha: float | None = None,
        step: int | None = None,
    ) -> "SeededModel":
        """Graft a kernel into a DORMANT seed.

        Args:
            layer_name: the layer's path, such as `layers.0`.
            kernel: the id of an artifact in the library, or a `Kernel`.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).
            step: the step before which it takes effect; by default the one reached.

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
        if not isinstance(kernel, Kernel):
            raise KernelMismatchError(
                "load_kernel takes an artifact's id or a Kernel; got"
                f" {type(kernel).__name__}: make one by kernel_from_module of the model's"
                " framework, or by esper_functional.kernel_from_function"
            )
        value = check_alpha(first_alpha(confidence) if alpha is None else alpha)
        slot = row * self.seeds.shape[1] + seed_idx
        load, activate = load_events(
            step_reached(step, self.step), row, seed_idx, slot, kernel_id, value
        )
        return self.apply_event(load).apply_event(activate, kernel)

    def _row(self, layer_name: str) -> int:
        return find_row(self.aliases.get(layer_name, layer_name), self.sites)

    def _event(
        self, kind: EventKind, layer_name: str, seed_idx: int, step: int | None, **more: Any
    ) -> "SeededModel":
        row = self._row(layer_name)
        return self.apply_event(Event(step_reached(step, self.step), row, seed_idx, kind, **more))

    def unload_kernel(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> "SeededModel":
        """Empty an ACTIVE seed."""
        return self._event(EventKind.UNLOAD, layer_name, seed_idx, step)

    def set_seed_alpha(
        self, layer_name: str, seed_idx: int, alpha: float, *, step: int | None = None
    ) -> "SeededModel":
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        return self._event(EventKind.ALPHA, layer_name, seed_idx, step, value=alpha)

    def ramp_seed_alpha(
        self,
        layer_name: str,
        seed_idx: int,
        alpha: float,
        span: int,
        *,
        shape: str = "linear",
        step: int | None = None,
    ) -> "SeededModel":
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps; see `advance`.

        Args:
            shape: "linear", "cosine" or "sigmoid".
        """
        curve = {"value": alpha, "span": span, "shape": shape}
        return self._event(EventKind.RAMP, layer_name, seed_idx, step, **curve)

    def advance(self, step: int) -> "SeededModel":
        """Bring all ramps to `step`."""
        seeds = advance(self.seeds, step_reached(step, self.step))
        return dataclasses.replace(self._current(), seeds=seeds, step=step)

    def incubate(self, layer_name: str, seed_idx: int, *, step: int | None = None) -> "SeededModel":
        """Let an ACTIVE seed at alpha 0 train in shadow forwards alone; see `shadows`."""
        return self._event(EventKind.INCUBATE, layer_name, seed_idx, step)

    def fossilize(
        self, layer_name: str, seed_idx: int, *, step: int | None = None
    ) -> "SeededModel":
        """Freeze an ACTIVE seed into the network for good."""
        return self._event(EventKind.FOSSILIZE, layer_name, seed_idx, step)

    def fold(self, layer_name: str, seed_idx: int, *, step: int | None = None) -> "SeededModel":
        """Fold an affine kernel into the weights of its linear host, and free its slot.

        The network gives what it gave; an ACTIVE seed is DORMANT again, a FOSSILIZED one
        stays so and runs no more. What was frozen is now part of weights that train.

        Raises:
            FoldError: for a kernel that is not affine, or a blend that forbids it.
        """
        return self._event(EventKind.FOLD, layer_name, seed_idx, step)

    def observe(self, *args: Any, step: int | None = None) -> "SeededModel":
        """Count the faults of one forward pass, and go on; waits for the device.

        For sampled steps. Kernels that incubate are seen in their shadows.

        Args:
            args: a batch for models that take one example (Equinox), whatever the model takes
                (Flax), or what `call` takes.
        """
        now = step_reached(step, self.step)
        current = self._current()
        if current.live is None:
            return current
        _, faults = current._probe(current.plan, current.live, args)
        failed = np.asarray(jnp.stack(list(faults)))
        places = running_seeds(current.seeds)
        before = [int(current.seeds.error_count[place]) for place in places]
        counts = np.where(failed, np.asarray(before) + 1, 0)
        model = current
        for event in fault_events(current.seeds, counts, step=now):
            model = model.apply_event(event)
        return model

    def _probe(self, planned: Plan, live: Live | None, args: tuple[Any, ...]) -> Probed:
        return self.surgery.probe(self.host, self.sites, planned, live, args, self.call)

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
        """How far the kernels move the output, on what `observe` takes.

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
    return model.surgery.functional(model._current().host, model.sites, model.call)
