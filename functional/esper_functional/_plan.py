"""What runs: a static plan, read off the state; and the live data it runs on.

A plan is hashable and is the key of a compiled program. It names, for each
site, the kernel programs that run there, in seed order, and nothing that may
change from step to step: not alpha, not which seeds, not parameters.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Int32

from esper_functional._arrays import Array
from esper_functional._blend import Blend, blend_weights, check_blend
from esper_functional._errors import KasminaException, SeedIndexError
from esper_functional._kernel import Kernel, Params, Program
from esper_functional._lifecycle import SeedLifecycleState
from esper_functional._state import FIELDS, SeedState, running
from esper_functional._transition import advance, record_errors

Kernels = Mapping[int, Kernel] | Sequence[Kernel]
"""Kernels by slot; a `Bank` gives them by `bank_kernels`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One kernel of a plan."""

    program: Program
    frozen: bool = False
    """True for fossils: no gradient reaches the parameters."""
    incubating: bool = False
    """True for a kernel that runs in a shadow of the forward pass alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What runs in a model, per site; static and hashable."""

    sites: tuple[tuple[str, tuple[Run, ...]], ...]
    blend: Blend
    isolate: bool
    contain: bool = True

    @property
    def dormant(self) -> bool:
        """True where no kernel runs anywhere."""
        return not any(runs for _, runs in self.sites)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, in the order of `Live.params`."""
        return tuple(run for _, runs in self.sites for run in runs)

    @property
    def incubating(self) -> tuple[int, ...]:
        """Places in `runs` of the kernels that incubate."""
        return tuple(i for i, run in enumerate(self.runs) if run.incubating)


class Weights(NamedTuple):
    """The part of `Live` that follows alpha."""

    host_weights: Any
    """f32 `[sites that run]`."""
    weights: Any
    """f32 `[running seeds]`, in plan order."""


@dataclasses.dataclass(frozen=True)
class Live:
    """What a planned step needs of the running seeds, on the device.

    A dormant plan has none: None stands in its place, so that nothing of Esper
    enters the program, and nothing is carried through the call.
    """

    host_weights: Any
    """f32 `[sites that run]`."""
    weights: Any
    """f32 `[running seeds]`, in plan order."""
    errors: Any
    """i32 `[running seeds]`: consecutive failures."""
    params: tuple[Params, ...]
    """Parameters of the running kernels, in plan order."""
    shadows: tuple[Any, ...] = ()
    """For each incubating kernel the `Weights` with which it is at alpha 1."""


jax.tree_util.register_dataclass(
    Live, data_fields=["host_weights", "weights", "errors", "params", "shadows"], meta_fields=[]
)


def running_seeds(state: SeedState) -> list[tuple[int, int]]:
    """(layer, seed) of every running seed, in plan order."""
    return [(int(i), int(j)) for i, j in np.argwhere(np.asarray(running(state)))]


def traced(tree: Any) -> bool:
    """Whether any array of a tree is part of a program that is being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _check_concrete(what: str, state: SeedState) -> None:
    if any(isinstance(getattr(state, name), Tracer) for name in FIELDS):
        raise KasminaException(
            f"{what}() reads the seeds' state on the host, and this state is traced: call it"
            " outside of jax.jit and jax.vmap, with the plan as a static argument of what is"
            " inside; or run dynamically, by forward_dynamic()"
        )


def plan(
    state: SeedState,
    kernels: Kernels,
    sites: Sequence[str],
    *,
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
) -> Plan:
    """Read off a concrete state what runs.

    Args:
        state: `[layers, seeds]`.
        kernels: kernels by slot.
        sites: the site's name for each layer row, in order.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        contain: contain the gradients of kernels; without, they have forward-mode and higher
            derivatives, and one that is not finite reaches the host.

    Raises:
        SeedIndexError: if state and sites disagree, or a slot holds no kernel.
        BlendError: for an unknown blend.
    """
    _check_concrete("plan", state)
    if len(state.shape) != 2 or state.shape[0] != len(sites):
        raise SeedIndexError(
            f"a plan needs a state of shape [layers, seeds] with one row for each of the"
            f" {len(sites)} sites {tuple(sites)}; got shape {state.shape}"
        )
    if len(set(sites)) != len(sites):
        raise SeedIndexError(f"the sites of a plan must have different names; got {tuple(sites)}")
    slots, stages = np.asarray(state.slot), np.asarray(state.stage)
    incubating = np.asarray(state.incubating)
    runs: list[list[Run]] = [[] for _ in sites]
    for layer, seed in running_seeds(state):
        slot = int(slots[layer, seed])
        try:
            # A sequence would take the slot of no kernel, -1, for its last.
            kernel = kernels[slot] if slot >= 0 else {}[slot]
        except (KeyError, IndexError):
            raise SeedIndexError(
                f"seed {seed} of site {sites[layer]!r} runs the kernel in slot {slot}, and no"
                f" kernel is there: pass every kernel that the state refers to"
            ) from None
        frozen = stages[layer, seed] == SeedLifecycleState.FOSSILIZED
        runs[layer].append(Run(kernel.program, bool(frozen), bool(incubating[layer, seed])))
    named = tuple((name, tuple(own)) for name, own in zip(sites, runs, strict=True))
    return Plan(named, check_blend(blend), isolate, contain)


def _check_state(what: str, state: SeedState, plan: Plan) -> None:
    """Refuse a state that is not its plan's, as far as a state can tell."""
    _check_concrete(what, state)
    # Along a ramp this is done in every step: what does not run is not looked at.
    at = np.asarray(running(state)).nonzero()
    fossil = np.asarray(state.stage)[at] == SeedLifecycleState.FOSSILIZED
    roles = np.where(np.asarray(state.incubating)[at], 2, fossil)
    expected = [len(own) for _, own in plan.sites], [_role(run) for run in plan.runs]
    counts = np.bincount(at[0], minlength=state.shape[0]).tolist()
    found = counts, [int(role) for role in roles]
    if len(state.shape) != 2 or found != expected:
        raise KasminaException(
            f"{what}: the plan runs {expected[0]} kernels at its sites"
            f" {[name for name, _ in plan.sites]}, {_words(expected[1])}, and the state {found[0]}"
            f" in its rows, {_words(found[1])}: plan again after a seed began or ceased to run, to"
            " incubate, or became a fossil"
        )


def _role(run: Run) -> int:
    return 2 if run.incubating else 1 if run.frozen else 0


def _words(roles: Sequence[int]) -> list[str]:
    return [("active", "fossil", "incubating")[role] for role in roles]


def gather_weights(state: SeedState, plan: Plan) -> Weights:
    """The weights of the running seeds at the state's alphas, in plan order."""
    runs = np.asarray(running(state))
    host, kernels = blend_weights(plan.blend, np.asarray(state.alpha), runs)
    return Weights(np.asarray(host)[runs.any(axis=-1)], np.asarray(kernels)[runs])


def gather_shadows(state: SeedState, plan: Plan) -> tuple[Weights, ...]:
    """The weights of each incubating kernel's shadow: it at alpha 1, the others as they are."""
    if not plan.incubating:
        return ()
    runs, alpha = np.asarray(running(state)), np.asarray(state.alpha)
    shadows: list[Weights] = []
    for place in zip(*np.nonzero(np.asarray(state.incubating) & runs), strict=True):
        shadowed = np.array(alpha)
        shadowed[place] = 1.0
        shadows.append(gather_weights(state.replace(alpha=shadowed), plan))
    return tuple(shadows)


def gather(state: SeedState, kernels: Kernels, plan: Plan) -> Live | None:
    """Pick the data of the running seeds; None where none runs.

    `plan` must be that of `state`.

    Raises:
        KasminaException: for a plan that is not.
    """
    _check_state("gather", state, plan)
    if plan.dormant:
        return None
    slots, counts = np.asarray(state.slot), np.asarray(state.error_count)
    at = running_seeds(state)
    held = [kernels[int(slots[ij])] for ij in at]
    for ij, run, kernel in zip(at, plan.runs, held, strict=True):
        if kernel.program != run.program:
            raise KasminaException(
                f"gather: the plan runs kernel {run.program.key} in seed {ij[1]} of layer {ij[0]},"
                f" whose slot {int(slots[ij])} holds {kernel.program.key}: plan again with these"
                " kernels"
            )
    weights = gather_weights(state, plan)
    return Live(
        host_weights=weights.host_weights,
        weights=weights.weights,
        errors=np.array([counts[ij] for ij in at], np.int32),
        params=tuple(kernel.params for kernel in held),
        shadows=gather_shadows(state, plan),
    )


def scatter(
    state: SeedState, kernels: Mapping[int, Kernel] | Sequence[Kernel], params: Sequence[Params]
) -> dict[int, Kernel]:
    """The kernels by slot, with trained parameters: what `gather` of the next plan needs.

    Args:
        state: the state that the parameters were gathered from.
        kernels: kernels by slot.
        params: parameters of the running kernels, in plan order, as in `Live.params`.

    Raises:
        KasminaException: for the parameters of another state, and for two seeds that run one
            slot, which trained apart.
    """
    _check_concrete("scatter", state)
    at = running_seeds(state)
    if len(at) != len(params):
        raise KasminaException(
            f"scatter: the state runs {len(at)} seeds and there are parameters of {len(params)}:"
            " give those of all running seeds, in plan order"
        )
    table = dict(kernels) if isinstance(kernels, Mapping) else dict(enumerate(kernels))
    slots = [int(np.asarray(state.slot)[ij]) for ij in at]
    for ij, slot, own in zip(at, slots, params, strict=True):
        if slots.count(slot) > 1:
            raise KasminaException(
                f"scatter: seed {ij[1]} of layer {ij[0]} and another one run the kernel in slot"
                f" {slot}, each with parameters of its own by now: give each seed a slot"
            )
        table[slot] = Kernel(table[slot].program, own)
    return table


def reweigh(live: Live | None, state: SeedState, plan: Plan) -> Live | None:
    """The live part at the state's alphas; what a ramp changes from step to step.

    `plan` must still be that of `state`.

    Raises:
        KasminaException: for a plan that is not.
    """
    _check_state("reweigh", state, plan)
    if live is None:
        return None
    weights = gather_weights(state, plan)
    return dataclasses.replace(
        live,
        host_weights=weights.host_weights,
        weights=weights.weights,
        shadows=gather_shadows(state, plan),
    )


def absorb(state: SeedState, live: Live | None, *, step: int) -> SeedState:
    """Bring the consecutive failures of a live part back into the state it came from.

    Waits for the device: call it at boundaries, not in every step.
    """
    # As an event of this step would.
    return record_counts(advance(state, step), live, step=step)


def record_counts(
    state: SeedState, live: Live | None, *, step: int | Int32[Array, "*#axes"]
) -> SeedState:
    """`absorb`, with ramps as they stand."""
    _check_concrete("absorb", state)
    at = running_seeds(state)
    errors = np.zeros(0, np.int32) if live is None else np.asarray(live.errors)
    check_counts("absorb", at, errors)
    counts = np.array(state.error_count)
    changed = np.zeros(state.shape, np.bool_)
    for ij, count in zip(at, errors, strict=True):
        changed[ij] = counts[ij] != count
        counts[ij] = count
    return record_errors(state, changed, counts, step=step)


def check_counts(what: str, at: Sequence[tuple[int, int]], errors: Any) -> None:
    """Refuse failure counts of other seeds than those `at` (layer, seed)."""
    if len(at) != len(errors):
        raise KasminaException(
            f"{what}: the state runs {len(at)} seeds and the live part has {len(errors)}: absorb"
            " into the state that the live part was gathered from"
        )


def unknown_site(name: str, sites: Sequence[str]) -> SeedIndexError:
    """The error for a site name that the plan does not know."""
    near = difflib.get_close_matches(name, sites, n=3)
    hint = f"; the nearest are {near}" if near else ""
    return SeedIndexError(f"unknown site {name!r}: this plan has {list(sites)}{hint}")
