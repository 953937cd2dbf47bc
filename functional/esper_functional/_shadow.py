"""Shadow forwards: what a network would give with a kernel at alpha 1 that is not blended yet.

A kernel incubates: it trains on the loss of its shadow, and the network's own
output is what it would be without it. `_dynamic` has the shadows of the dynamic mode.
"""

import dataclasses
from typing import Any

import jax

from esper_functional._errors import KasminaException
from esper_functional._execute import Observed, check_live, forward, forward_batch
from esper_functional._plan import Live, Plan, Run
from esper_functional._site import Network


def _shadow(plan: Plan, live: Live, params: Any, x: Any, nth: int) -> tuple[Plan, Any, Live, Any]:
    """The arguments of a forward pass in which one incubating kernel is at alpha 1.

    Gradients reach that kernel's parameters and nothing else.
    """
    own = plan.incubating[nth]
    sites: list[tuple[str, tuple[Run, ...]]] = []
    first = 0
    for name, runs in plan.sites:
        shown = [
            dataclasses.replace(run, incubating=False) if first + i == own else run
            for i, run in enumerate(runs)
        ]
        sites.append((name, tuple(shown)))
        first += len(runs)
    stop = jax.lax.stop_gradient
    kernels = tuple(p if i == own else stop(p) for i, p in enumerate(live.params))
    weights = live.shadows[nth]
    shown_live = dataclasses.replace(
        live, host_weights=weights.host_weights, weights=weights.weights, params=kernels
    )
    return dataclasses.replace(plan, sites=tuple(sites)), stop(params), shown_live, stop(x)


def _shadow_forward(
    net: Network,
    plan: Plan,
    params: Any,
    live: Live | None,
    x: Any,
    capture: bool,
    batched: bool,
) -> tuple[tuple[Any, ...], Observed]:
    check_live(plan, live)
    if live is None:
        return (), Observed((), ())
    if len(live.shadows) != len(plan.incubating):
        raise KasminaException(
            f"shadow_forward: the plan has {len(plan.incubating)} incubating kernels and the live"
            f" part the weights of {len(live.shadows)} shadows: gather the live part with the plan"
            " that it is run with"
        )
    run_forward = forward_batch if batched else forward
    faults: list[jax.Array | None] = [None] * len(plan.runs)
    outputs: list[jax.Array | None] = [None] * len(plan.runs)
    ys: list[Any] = []
    for nth, own in enumerate(plan.incubating):
        shown, stopped, shown_live, stopped_x = _shadow(plan, live, params, x, nth)
        y, seen = run_forward(net, shown, stopped, shown_live, stopped_x, capture=capture)
        ys.append(y)
        faults[own] = seen.faults[own]
        outputs[own] = seen.outputs[own] if capture else None
    return tuple(ys), Observed(tuple(faults), tuple(outputs) if capture else ())


def shadow_forward(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, *, capture: bool = False
) -> tuple[tuple[Any, ...], Observed]:
    """What the network would give with each incubating kernel at alpha 1, one at a time.

    A kernel trains before it is blended: add the loss of each of these outputs to the loss
    of `forward`'s. No gradient of theirs reaches the host, the input or another kernel, so
    the kernel's gradient is that of the loss at alpha 1 with the host stopped, and the
    host's that of the loss at alpha 0. Costs one forward pass for each incubating kernel.

    Returns:
        An output for each incubating kernel, in plan order; and what was seen of them: their
        faults, for `count_faults`, and with `capture` the kernels' own outputs.
    """
    return _shadow_forward(net, plan, params, live, x, capture, batched=False)


def shadow_forward_batch(
    net: Network, plan: Plan, params: Any, live: Live | None, xs: Any, *, capture: bool = False
) -> tuple[tuple[Any, ...], Observed]:
    """`shadow_forward` for a network of one example, over a leading axis of examples."""
    return _shadow_forward(net, plan, params, live, xs, capture, batched=True)
