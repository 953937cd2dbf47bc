"""Running a network whose seeds' stages are data inside the program: the dynamic mode.

For scheduling on the device, and for `jax.vmap` over whole populations of growing
networks. One program serves every stage of every seed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32

from esper_functional._arrays import Array, namespace
from esper_functional._bank import Bank
from esper_functional._blend import Blend, blend_weights, check_blend, mix
from esper_functional._errors import KernelMismatchError, SeedIndexError
from esper_functional._kernel import Params
from esper_functional._lifecycle import SeedLifecycleState
from esper_functional._plan import unknown_site
from esper_functional._reverse_only import reverse_only
from esper_functional._sightings import Context, check_closed, check_stage, context_of, note, stage
from esper_functional._site import Layer, Network, host_call, run_program
from esper_functional._state import SeedState, running
from esper_functional._transition import advance, record_errors

Verdict = tuple[jax.Array, jax.Array, jax.Array]
"""A kernel's output, which of its elements count as finite, and whether it failed."""

_ABSENT, _UNFIT, _PROGRAMS = 0, 1, 2
"""Branches of a seed: it does not run; its kernel does not fit; the programs that do."""


def _keep_gradient(keep: jax.Array, tree: Any) -> Any:
    """`tree`, with a gradient only where `keep`; by a select, which NaN does not cross."""
    return jax.tree.map(lambda p: jnp.where(keep, p, jax.lax.stop_gradient(p)), tree)


class _DynamicSite:
    """Runs every site's seeds by the state."""

    def __init__(
        self,
        state: SeedState,
        bank: Bank,
        sites: Sequence[str],
        blend: str,
        isolate: bool,
        contain: bool,
        context: Context,
        only: Any,
    ) -> None:
        self._given: Any = (state, bank, sites, blend, isolate, contain, context, only)
        self._context = context
        self._stage = stage()
        self._blend: Blend = check_blend(blend)
        self._isolate = isolate
        self._contain = contain
        # Outside of the switches, so that their derivatives are refused before jax meets one.
        self._guard = reverse_only if contain else lambda tree: tree
        self._bank = dataclasses.replace(bank, params=self._guard(bank.params))
        self._rows = {name: row for row, name in enumerate(sites)}
        self._runs = jnp.asarray(running(state) & ~state.incubating)
        trains = jnp.asarray(state.stage) != int(SeedLifecycleState.FOSSILIZED)
        self._trains = trains if only is None else trains & only
        self._slot = jnp.asarray(state.slot)
        host, kernels = blend_weights(self._blend, jnp.asarray(state.alpha), self._runs)
        stop = jax.lax.stop_gradient
        self._host_weights, self._weights = stop(jnp.asarray(host)), stop(jnp.asarray(kernels))
        never = jnp.zeros((), jnp.bool_)
        self.faults: list[list[jax.Array]] = [[never] * state.shape[1] for _ in sites]

    def __call__(self, name: str, layer: Layer, params: Any, /, *args: Any, **options: Any) -> Any:
        if name not in self._rows:
            raise unknown_site(name, list(self._rows))
        row = self._rows[name]
        where = f"site {name!r}"
        check_stage(where, self._stage)
        result = layer(params, *args, **options)
        call = host_call(where, result, args, options)
        h, x = call.h, call.x
        if self._isolate:
            x = jax.lax.stop_gradient(x)
        x = self._guard(x)
        fitting = self._fitting(where, x, h)
        outputs: list[jax.Array] = []
        finite: list[jax.Array] = []
        for seed in range(len(self.faults[row])):
            k, ok, failed = self._seed(where, row, seed, fitting, x, h)
            outputs.append(k)
            finite.append(ok)
            self.faults[row][seed] = self.faults[row][seed] | note(failed, self._context)
        weights = self._weights[row].astype(h.dtype)
        y = mix(
            self._blend,
            h,
            outputs,
            finite,
            self._host_weights[row].astype(h.dtype),
            [weights[i] for i in range(len(outputs))],
            jnp.where,
        )
        # Where nothing runs the host's output passes as it is, bit by bit.
        return call.exchange(jnp.where(jnp.any(self._runs[row]), y, h))

    def inner(self) -> "_DynamicSite":
        return _DynamicSite(*self._given)

    def sightings(self) -> Any:
        return self.faults

    def take(self, sightings: Any) -> None:
        self.faults = jax.tree.map(lambda own, other: own | jnp.any(other), self.faults, sightings)

    def _fitting(self, where: str, x: jax.Array, h: jax.Array) -> list[int]:
        """The bank's programs whose structure fits a site."""
        fitting: list[int] = []
        for i, program in enumerate(self._bank.programs):
            own = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._bank.params[i]
            )
            try:
                jax.eval_shape(
                    lambda p, x, h, program=program: run_program(
                        where, program, p, x, h, summed=False, contain=self._contain
                    ),
                    own, x, h,
                )  # fmt: skip
            except KernelMismatchError:
                continue
            fitting.append(i)
        return fitting

    def _seed(
        self, where: str, row: int, seed: int, fitting: list[int], x: jax.Array, h: jax.Array
    ) -> Verdict:
        slot, runs = self._slot[row, seed], self._runs[row, seed]
        code = jnp.asarray(self._bank.code)
        if not self._bank.programs or not code.shape[0]:
            return jnp.zeros_like(h), jnp.broadcast_to(~runs, h.shape), runs
        codes = [_UNFIT] * len(self._bank.programs)
        for branch, i in enumerate(fitting):
            codes[i] = _PROGRAMS + branch
        held = code[slot]
        # jax would take a negative slot for one from the end.
        there = runs & (slot >= 0) & (slot < code.shape[0]) & (held >= 0)
        branch = jnp.where(runs, jnp.where(there, jnp.asarray(codes, jnp.int32)[held], _UNFIT), 0)

        def absent(_: Any) -> Verdict:
            return jnp.zeros_like(h), jnp.ones_like(h, jnp.bool_), jnp.zeros((), jnp.bool_)

        def unfit(_: Any) -> Verdict:
            return jnp.zeros_like(h), jnp.zeros_like(h, jnp.bool_), jnp.ones((), jnp.bool_)

        def running_program(i: int) -> Callable[[Any], Verdict]:
            program = self._bank.programs[i]

            def branch(operands: Any) -> Verdict:
                bank_params, x = operands
                own: Params = jax.tree.map(lambda rows: rows[slot], bank_params[i])
                # Mapped, every branch is computed, and those not taken may hold anything.
                taken = there & (held == i)
                own = _keep_gradient(taken & self._trains[row, seed], own)
                k, ok = run_program(
                    where,
                    program,
                    own,
                    _keep_gradient(taken, x),
                    h,
                    summed=False,
                    contain=self._contain,
                )
                return k, jnp.broadcast_to(ok, h.shape), ~jnp.all(ok)

            return branch

        branches = [absent, unfit, *(running_program(i) for i in fitting)]
        return jax.lax.switch(branch, branches, (self._bank.params, x))


def forward_dynamic(
    net: Network,
    params: Any,
    state: SeedState,
    bank: Bank,
    x: Any,
    *,
    sites: Sequence[str],
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
) -> tuple[Any, Bool[Array, "layers seeds"]]:
    """The network's output, and which kernels' outputs were not finite.

    The meaning of `forward`, with stages, slots and alphas read from `state` inside the
    program: it compiles once for all of them. What it costs: every seed of every site is a
    `lax.switch` over the programs that fit there. A branch is chosen at run time, which on
    CUDA makes the host wait for the device each time; under `jax.vmap` over states all
    branches are computed and one is selected, so a mapped step costs sites × seeds ×
    programs, whatever runs. Each slot reserves parameters for every program. For one network
    that trains, the planned mode is many times cheaper.

    A kernel that does not fit its site counts as failed in every step, for nothing can be
    raised inside a program. Incubating kernels do not run; see `shadow_dynamic`.

    Raises:
        SeedIndexError: for a state of another shape, or a site that has no row.
        BlendError: for an unknown blend.
    """
    return _forward(net, params, state, bank, x, sites, blend, isolate, contain, None)


def _forward(
    net: Network,
    params: Any,
    state: SeedState,
    bank: Bank,
    x: Any,
    sites: Sequence[str],
    blend: str,
    isolate: bool,
    contain: bool,
    only: Any,
) -> tuple[Any, Bool[Array, "layers seeds"]]:
    """See `forward_dynamic`.

    Args:
        only: bool `[layers, seeds]`, the seeds whose parameters may have a gradient; None for all.
    """
    if len(state.shape) != 2 or state.shape[0] != len(sites):
        raise SeedIndexError(
            f"the dynamic mode needs a state of shape [layers, seeds] with one row for each of"
            f" the {len(sites)} sites {tuple(sites)}; got shape {tuple(state.shape)}. Map over a"
            " population's leading axis with jax.vmap"
        )
    if len(set(sites)) != len(sites):
        raise SeedIndexError(f"the sites must have different names; got {tuple(sites)}")
    context = context_of(params, state, bank, x)
    site = _DynamicSite(state, bank, sites, blend, isolate, contain, context, only)
    y = net(params, site, x)
    check_closed(y, context)
    faults = [fault for row in site.faults for fault in row]
    seen = jnp.stack(faults) if faults else jnp.zeros(0, jnp.bool_)
    return y, seen.reshape(state.shape)


def shadow_dynamic(
    net: Network,
    params: Any,
    state: SeedState,
    bank: Bank,
    x: Any,
    place: tuple[Any, Any],
    *,
    sites: Sequence[str],
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
) -> tuple[Any, Bool[Array, "layers seeds"]]:
    """The output with one seed, which incubates, at alpha 1; see `shadow_forward`.

    Gradients reach the parameters in that seed's slot alone, by that seed alone.

    Args:
        place: (layer, seed); may be traced, so that a scan or a map can visit several.
    """
    here = jnp.zeros(state.shape, jnp.bool_).at[place].set(True)
    shown = state.replace(
        alpha=jnp.where(here, jnp.ones((), jnp.float32), jnp.asarray(state.alpha)),
        incubating=jnp.asarray(state.incubating) & ~here,
    )
    stopped = jax.lax.stop_gradient((params, x))
    return _forward(net, stopped[0], shown, bank, stopped[1], sites, blend, isolate, contain, here)


def record_faults(
    state: SeedState,
    faults: Bool[Array, "*axes"],
    shadows: Bool[Array, "*axes"] | None = None,
    *,
    step: int | Int32[Array, ""],
) -> SeedState:
    """The state after a step: failures counted, a finite step starts the count anew.

    The third in a row sets the fallback flag and ERROR_RECOVERY, in this very step. Works
    on any leading axes, concrete or traced.

    Args:
        faults: `[layers, seeds]`, those of `forward_dynamic`.
        step: the step that the faults were seen at; ramps are brought to it.
        shadows: those of `shadow_dynamic`, combined by or, in a step that visited every seed
            that incubates. Without, those seeds keep their counts.
    """
    return note_faults(advance(state, step), faults, shadows, step=step)


def note_faults(
    state: SeedState,
    faults: Bool[Array, "*axes"],
    shadows: Bool[Array, "*axes"] | None = None,
    *,
    step: int | Int32[Array, "*#axes"],
) -> SeedState:
    """`record_faults`, with ramps as they stand."""
    xp = namespace(state.error_count, faults, shadows, step)
    incubating = xp.asarray(state.incubating)
    seen = running(state)
    if shadows is None:
        seen = seen & ~incubating
    else:
        faults = xp.where(incubating, shadows, faults)
    counted = xp.where(faults, state.error_count + 1, xp.asarray(0, dtype=xp.int32))
    changed = seen & (counted != state.error_count)
    return record_errors(state, changed, counted, step=step)
