"""Running a network with kernels at its sites (the planned mode).

A network is a function `net(params, site, x)` that calls its growable layers
through `site(name, layer, params, x)`. Where nothing runs, that is
`layer(params, x)` and nothing else: a dormant network traces to the very
program of a bare one.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from esper_functional._blend import Blend, mix
from esper_functional._containment import run_contained
from esper_functional._errors import KasminaException, KernelMismatchError
from esper_functional._kernel import Params
from esper_functional._lifecycle import FAILURES_TO_RECOVERY
from esper_functional._plan import Kernels, Live, Plan, Run, absorb, gather, plan, unknown_site
from esper_functional._state import SeedState

Layer = Callable[[Any, Any], Any]
"""`layer(params, x)`."""


@runtime_checkable
class Site(Protocol):
    """A place where kernels may be grafted: one layer's call."""

    def __call__(self, name: str, layer: Layer, params: Any, x: Any) -> Any: ...


Network = Callable[[Any, Site, Any], Any]
"""`net(params, site, x)`."""


def bare(name: str, layer: Layer, params: Any, x: Any) -> Any:
    """The site of a network that cannot grow; its bare twin in benchmarks and tests."""
    return layer(params, x)


class Observed(NamedTuple):
    """What a forward pass saw of each running kernel, in plan order."""

    faults: tuple[jax.Array, ...]
    """bool, one each: whether an output was not finite."""
    outputs: tuple[jax.Array, ...]
    """The kernels' outputs, where they were asked for; else ()."""


class Grafted(NamedTuple):
    """The output of one grafted layer, and what it saw."""

    output: jax.Array
    faults: tuple[jax.Array, ...]
    outputs: tuple[jax.Array, ...]


def run_site(
    runs: Sequence[Run],
    params: Sequence[Params],
    host_weight: Any,
    weights: Any,
    errors: Any,
    h: jax.Array,
    x: jax.Array,
    *,
    blend: Blend,
    isolate: bool,
    summed: bool = False,
) -> Grafted:
    """Blend the kernels of one site into its host output h.

    Args:
        runs: the programs, in seed order.
        params: their parameters.
        host_weight, weights, errors: scalars and `[runs]`, see `Live`.
        h: host output `[*batch, *out]`.
        x: host input `[*batch, *in]`.
        summed: see `run_contained`.

    Raises:
        KernelMismatchError: at trace time, for an output that is not like h.
    """
    if isolate:
        x = jax.lax.stop_gradient(x)
    outputs: list[jax.Array] = []
    finite: list[jax.Array] = []
    faults: list[jax.Array] = []
    for i, (run, own) in enumerate(zip(runs, params, strict=True)):
        own = jax.lax.stop_gradient(own) if run.frozen else own
        k, ok = run_contained(run.program, own, x, summed=summed)
        if k.shape != h.shape or k.dtype != h.dtype:
            raise KernelMismatchError(
                f"kernel {run.program.key} returned {k.dtype}{list(k.shape)} where its host"
                f" returns {h.dtype}{list(h.shape)}: choose a kernel of the host's signature"
            )
        faults.append(~jnp.all(ok))
        # A seed whose third failure is not absorbed yet has stopped already.
        ok = ok & (errors[i] < FAILURES_TO_RECOVERY)
        outputs.append(k)
        finite.append(ok)
    cast = jax.lax.stop_gradient(jnp.asarray(weights)).astype(h.dtype)
    y = mix(
        blend,
        h,
        outputs,
        finite,
        jax.lax.stop_gradient(jnp.asarray(host_weight)).astype(h.dtype),
        [cast[i] for i in range(len(runs))],
        jnp.where,
    )
    return Grafted(y, tuple(faults), tuple(outputs))


class _PlannedSite:
    """Looks up what runs at each site and gathers what was seen."""

    def __init__(self, plan: Plan, live: Live | None, summed: bool) -> None:
        self._summed = summed
        self._plan = plan
        self._live = live
        self._places: dict[str, tuple[tuple[Run, ...], int, int]] = {}
        first = busy = 0
        for name, runs in plan.sites:
            self._places[name] = (runs, first, busy)
            first += len(runs)
            busy += bool(runs)
        never = jnp.zeros((), jnp.bool_) if first else None
        self.faults: list[Any] = [never] * first
        self.outputs: list[Any] = [None] * first

    def __call__(self, name: str, layer: Layer, params: Any, x: Any) -> Any:
        if name not in self._places:
            raise unknown_site(name, list(self._places))
        runs, first, busy = self._places[name]
        h = layer(params, x)
        live = self._live
        if not runs or live is None:
            return h
        last = first + len(runs)
        grafted = run_site(
            runs,
            live.params[first:last],
            live.host_weights[busy],
            live.weights[first:last],
            live.errors[first:last],
            h,
            x,
            blend=self._plan.blend,
            isolate=self._plan.isolate,
            summed=self._summed,
        )
        for i, (fault, output) in enumerate(zip(grafted.faults, grafted.outputs, strict=True)):
            # A layer that is called twice in one step fails once.
            self.faults[first + i] = self.faults[first + i] | fault
            self.outputs[first + i] = output
        return grafted.output


def _forward(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, capture: bool, summed: bool
) -> tuple[Any, Observed]:
    if plan.dormant != (live is None):
        raise KasminaException(
            "forward: a dormant plan has no live part and any other has one; gather the live part"
            " with the plan that it is run with"
        )
    site = _PlannedSite(plan, live, summed)
    y = net(params, site, x)
    return y, Observed(tuple(site.faults), tuple(site.outputs) if capture else ())


def forward(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    """The network's output, and what was seen of each running kernel.

    Pure; `net`, `plan` and `capture` are static, and `live` is what `gather` picked for
    the plan. With `capture` the kernels' outputs are returned too, for health statistics.

    Raises:
        SeedIndexError: for a site that the plan does not know.
        KernelMismatchError: for a kernel whose output is not like its host's.
    """
    return _forward(net, plan, params, live, x, capture, summed=False)


def forward_batch(
    net: Network, plan: Plan, params: Any, live: Live | None, xs: Any, *, capture: bool = False
) -> tuple[Any, Observed]:
    """`forward` for a network of one example, over a leading axis of examples.

    Equal to `jax.vmap` of `forward` in value and gradient. Because the map is inside,
    the gradient of kernels that have no batching rules costs no more than that of a
    plain batch: use it in training.

    Returns:
        Outputs `[batch, ...]`; faults as one bool for each kernel, True where any
        example's output was not finite; captured outputs `[batch, ...]`.
    """

    def one(x: Any) -> tuple[Any, Observed]:
        return _forward(net, plan, params, live, x, capture, summed=True)

    ys, seen = jax.vmap(one)(xs)
    return ys, Observed(tuple(jnp.any(fault) for fault in seen.faults), seen.outputs)


def count_faults(live: Live | None, faults: Sequence[jax.Array]) -> Live | None:
    """The next live part: failures counted, a finite step starts the count anew.

    From the third consecutive failure on the count stays, until it is absorbed.
    """
    if live is None:
        return None
    failed = jnp.stack(list(faults))
    errors = jnp.asarray(live.errors)
    counted = jnp.where(failed, errors + 1, 0)
    stopped = errors >= FAILURES_TO_RECOVERY
    return Live(live.host_weights, live.weights, jnp.where(stopped, errors, counted), live.params)


def run(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any
) -> tuple[Any, Live | None]:
    """One planned forward pass: the output and the next live part."""
    y, observed = forward(net, plan, params, live, x)
    return y, count_faults(live, observed.faults)


@lru_cache(maxsize=256)
def _compiled(net: Network, plan: Plan) -> Any:
    return jax.jit(partial(run, net, plan))


def execute(
    net: Network,
    params: Any,
    state: SeedState,
    kernels: Kernels,
    x: Any,
    *,
    sites: Sequence[str],
    blend: str = "convex",
    isolate: bool = False,
    step: int = 0,
) -> tuple[Any, SeedState]:
    """Run a network in the state it is in: the output and the next state.

    Plans, gathers, runs and absorbs; a plan seen before compiles nothing. A
    training loop does these four itself and absorbs only at its boundaries,
    because absorbing waits for the device.

    Args:
        net: `net(params, site, x)`.
        params: the host's parameters.
        state: `[layers, seeds]`, concrete.
        kernels: kernels by slot.
        x: the network's input.
        sites: a name for each layer row of `state`.
        blend, isolate: see `plan`.
        step: for `SeedState.last_update` of seeds that failed.
    """
    planned = plan(state, kernels, sites, blend=blend, isolate=isolate)
    live = gather(state, kernels, planned)
    y, after = _compiled(net, planned)(params, live, x)
    return y, absorb(state, after, step=step)
