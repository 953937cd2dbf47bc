"""Running a network with kernels at its sites: the planned mode.

A network is a function `net(params, site, x)` that calls its growable layers
through `site(name, layer, params, x)`. Where nothing runs, that is
`layer(params, x)` and nothing else: a dormant network traces to the very
program of a bare one.

`execute` is the one entry for both modes: with a concrete state it plans, with
a traced one it runs dynamically (see `_dynamic`).
"""

import dataclasses
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int32

from esper_functional._arrays import Array
from esper_functional._bank import Bank, bank_kernels, make_bank
from esper_functional._dynamic import forward_dynamic, note_faults, record_faults
from esper_functional._errors import KasminaException, UncalledSiteWarning
from esper_functional._lifecycle import FAILURES_TO_RECOVERY
from esper_functional._plan import (
    Kernels,
    Live,
    Plan,
    Run,
    absorb,
    gather,
    plan,
    record_counts,
    traced,
    unknown_site,
)
from esper_functional._sightings import (
    Context,
    check_closed,
    check_stage,
    context_of,
    keep,
    note,
    stage,
)
from esper_functional._site import Layer, Network, host_call, run_site
from esper_functional._state import SeedState


class Observed(NamedTuple):
    """What a forward pass saw of each running kernel, in plan order."""

    faults: tuple[jax.Array | None, ...]
    """bool, one each: whether an output was not finite. None for a kernel that the pass leaves
    out: in `forward` one that incubates, in `shadow_forward` one that does not."""
    outputs: tuple[jax.Array | None, ...]
    """The kernels' outputs, where they were asked for; else (). None as in `faults`."""


class _PlannedSite:
    """Looks up what runs at each site and gathers what was seen."""

    def __init__(
        self, plan: Plan, live: Live | None, context: Context, *, capture: bool, summed: bool
    ) -> None:
        self._given: Any = (plan, live, context)
        self._options = {"capture": capture, "summed": summed}
        self._context = context
        self._stage = None if live is None else stage()
        self._capture = capture
        self._summed = summed
        self._plan = plan
        self._live = live
        self.places: dict[str, tuple[tuple[Run, ...], int, int]] = {}
        first = busy = 0
        for name, runs in plan.sites:
            self.places[name] = (runs, first, busy)
            first += len(runs)
            busy += bool(runs)
        never = jnp.zeros((), jnp.bool_) if first else None
        self.faults: list[Any] = [None if run.incubating else never for run in plan.runs]
        self.outputs: list[Any] = [None] * first
        self.called: set[str] = set()

    def __call__(self, name: str, layer: Layer, params: Any, /, *args: Any, **options: Any) -> Any:
        if name not in self.places:
            raise unknown_site(name, list(self.places))
        self.called.add(name)
        runs, first, busy = self.places[name]
        result = layer(params, *args, **options)
        live = self._live
        if not runs or live is None:
            return result
        where = f"site {name!r}"
        check_stage(where, self._stage)
        call = host_call(where, result, args, options)
        last = first + len(runs)
        grafted = run_site(
            runs,
            live.params[first:last],
            live.host_weights[busy],
            live.weights[first:last],
            live.errors[first:last],
            call.h,
            call.x,
            blend=self._plan.blend,
            isolate=self._plan.isolate,
            contain=self._plan.contain,
            summed=self._summed,
            where=where,
        )
        for i, (fault, output) in enumerate(zip(grafted.faults, grafted.outputs, strict=True)):
            # A layer that is called twice in one step fails once.
            if not runs[i].incubating:
                self.faults[first + i] = self.faults[first + i] | note(fault, self._context)
            if self._capture and output is not None:
                self.outputs[first + i] = keep(output, self._context)
        return call.exchange(grafted.output)

    def inner(self) -> "_PlannedSite":
        site = _PlannedSite(*self._given, **self._options)
        site.called = self.called
        return site

    def sightings(self) -> Any:
        return self.faults, self.outputs

    def take(self, sightings: Any) -> None:
        faults, outputs = sightings
        # A transformation such as jax.vmap gives each an axis more.
        self.faults = jax.tree.map(lambda own, other: own | jnp.any(other), self.faults, faults)
        self.outputs = [
            own if other is None else other
            for own, other in zip(self.outputs, outputs, strict=True)
        ]


def check_live(plan: Plan, live: Live | None) -> None:
    """Refuse a live part that was gathered with another plan, as far as its sizes tell."""
    if plan.dormant != (live is None):
        raise KasminaException(
            "forward: a dormant plan has no live part and any other has one; gather the live part"
            " with the plan that it is run with"
        )
    busy = sum(bool(runs) for _, runs in plan.sites)
    if live is not None and (len(live.params), len(live.host_weights)) != (len(plan.runs), busy):
        raise KasminaException(
            f"forward: the plan runs {len(plan.runs)} kernels at {busy} sites and the live part"
            f" holds {len(live.params)} of {len(live.host_weights)}: gather the live part with the"
            " plan that it is run with"
        )


def _forward(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, capture: bool, summed: bool
) -> tuple[Any, Observed]:
    check_live(plan, live)
    context = () if live is None else context_of(params, live, x)
    site = _PlannedSite(plan, live, context, capture=capture, summed=summed)
    y = net(params, site, x)
    if live is None:
        return y, Observed((), ())
    check_closed(y, context)
    faults = list(site.faults)
    for name in warn_of_uncalled(site.called, plan):
        runs, first, _ = site.places[name]
        faults[first : first + len(runs)] = [None] * len(runs)
    return y, Observed(tuple(faults), tuple(site.outputs) if capture else ())


def warn_of_uncalled(called: Collection[str], plan: Plan) -> list[str]:
    """The sites with running kernels that a network never called."""
    missed = [name for name, runs in plan.sites if runs and name not in called]
    if missed:
        warnings.warn(
            f"kernels run at {missed}, and the network called {sorted(called)}: they have no"
            " part in its output. Give plan() the names under which the network calls its sites",
            UncalledSiteWarning,
            stacklevel=2,
        )
    return missed


def forward(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    """The network's output, and what was seen of each running kernel.

    Pure; `net`, `plan` and `capture` are static, and `live` is what `gather` picked for
    the plan. With `capture` the kernels' outputs are returned too, for health statistics.
    The network may map its layers by `jax.vmap`; other transformations inside of it go
    through `lift`. What `jax.vmap` maps around the forward pass is given to it: a network that
    closes over it is refused.
    Incubating kernels do not run here; see `shadow_forward`.

    Raises:
        SeedIndexError: for a site that the plan does not know.
        KernelMismatchError: for a kernel whose output is not like its host's.
        KasminaException: for a live part of another plan.

    Warns:
        UncalledSiteWarning: where kernels run at a site that the network never calls.
    """
    return _forward(net, plan, params, live, x, capture, summed=False)


def forward_batch(
    net: Network, plan: Plan, params: Any, live: Live | None, xs: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    """`forward` for a network of one example, over a leading axis of examples.

    Equal to `jax.vmap` of `forward` in value and gradient, where all outputs are finite: an
    example that is not takes the gradient of a kernel's parameters from the whole batch, as it
    does in a plain batch, and under `jax.vmap` its own share alone. Because the map is inside,
    the gradient of kernels that have no batching rules costs no more than that of a
    plain batch: use it in training.

    Returns:
        Outputs `[batch, ...]`; faults as one bool for each kernel, True where any
        example's output was not finite; captured outputs `[batch, ...]`.
    """

    def one(x: Any) -> tuple[Any, Observed]:
        return _forward(net, plan, params, live, x, capture, summed=True)

    ys, seen = jax.vmap(one)(xs)
    return ys, Observed(jax.tree.map(jnp.any, seen.faults), seen.outputs)


def count_faults(live: Live | None, *faults: Sequence[jax.Array | None]) -> Live | None:
    """The next live part: failures counted, a finite step starts the count anew.

    From the third consecutive failure on the count stays, until it is absorbed. A kernel that
    nothing was seen of, such as one that incubates in a step without shadows, keeps its count.

    Args:
        faults: the faults of one step: of its forward pass, and of its shadows.
    """
    if live is None:
        return None
    given = [len(seen) for seen in faults if seen]
    count = int(jnp.shape(live.errors)[-1])
    if not given or set(given) != {count}:
        raise KasminaException(
            f"count_faults: the live part has {count} kernels, and the faults given are"
            f" of {given}: give Observed.faults of the plan that the live part was gathered with"
        )
    of_kernels = [
        [fault for fault in own if fault is not None]
        for own in zip(*(seen for seen in faults if seen), strict=True)
    ]
    unseen = np.array([not own for own in of_kernels])
    never = jnp.zeros((), jnp.bool_)
    failed = jnp.stack([reduce(jnp.logical_or, own, never) for own in of_kernels], axis=-1)
    errors = jnp.asarray(live.errors)
    counted = jnp.where(failed, errors + 1, 0)
    stays = (errors >= FAILURES_TO_RECOVERY) | unseen
    return dataclasses.replace(live, errors=jnp.where(stays, errors, counted))


def run(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any
) -> tuple[Any, Live | None]:
    """One planned forward pass: the output and the next live part.

    A jitted program copies what it returns unchanged, the kernels' parameters here. Where that
    matters, return `count_faults(live, seen.faults).errors` of `forward` instead.
    """
    y, observed = forward(net, plan, params, live, x)
    return y, count_faults(live, observed.faults)


@lru_cache(maxsize=256)
def _compiled(net: Network, plan: Plan) -> Any:
    def output_and_errors(params: Any, live: Live | None, x: Any) -> tuple[Any, Any]:
        y, after = run(net, plan, params, live, x)
        return y, None if after is None else after.errors

    return jax.jit(output_and_errors)


def execute(
    net: Network,
    params: Any,
    state: SeedState,
    kernels: Kernels | Bank,
    x: Any,
    *,
    sites: Sequence[str],
    blend: str = "convex",
    isolate: bool = False,
    step: int | Int32[Array, ""] | None = None,
) -> tuple[Any, SeedState]:
    """Run a network in the state it is in: the output and the next state.

    With a concrete state (planned mode): plans, gathers, runs and absorbs; a plan seen
    before compiles nothing. A training loop does these four itself and absorbs only at its
    boundaries, because absorbing waits for the device.

    With a traced state, as an argument of a jitted or mapped function (dynamic mode): stages
    are data inside the program, which compiles once; see `forward_dynamic` for what it costs.

    Args:
        net: `net(params, site, x)`.
        params: the host's parameters.
        state: `[layers, seeds]`.
        kernels: kernels by slot, or a bank of them.
        x: the network's input.
        sites: a name for each layer row of `state`.
        blend, isolate: see `plan`.
        step: the step that this is, to which the next state's ramps are brought, and for its
            `last_update` of seeds that failed; None leaves both as they are.
    """
    if traced(state) or (isinstance(kernels, Bank) and traced(kernels)):
        bank = kernels if isinstance(kernels, Bank) else make_bank(kernels)
        y, faults = forward_dynamic(
            net, params, state, bank, x, sites=sites, blend=blend, isolate=isolate
        )
        if step is None:
            return y, note_faults(state, faults, step=state.last_update)
        return y, record_faults(state, faults, step=step)
    table = bank_kernels(kernels) if isinstance(kernels, Bank) else kernels
    planned = plan(state, table, sites, blend=blend, isolate=isolate)
    live = gather(state, table, planned)
    y, errors = _compiled(net, planned)(params, live, x)
    if isinstance(errors, Tracer):
        raise KasminaException(
            "execute: the state is concrete and other arguments are traced, so its failures cannot"
            " be brought back into it: give the state to the transformed function as an argument"
            " (the dynamic mode), or plan outside of it and run forward() inside"
        )
    after = None if live is None else dataclasses.replace(live, errors=errors)
    if step is None:
        return y, record_counts(state, after, step=state.last_update)
    return y, absorb(state, after, step=int(step))
