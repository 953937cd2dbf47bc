"""Steps to time, in jax: the bare ones, the ones written by hand, and Esper's."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from esper_functional import (
    Bank,
    Blend,
    Live,
    Network,
    Plan,
    SeedState,
    Site,
    bare,
    count_faults,
    forward,
    forward_batch,
    forward_dynamic,
    record_faults,
)

Apply = Callable[..., Any]


def program_text(program: Any, *arguments: Any) -> str:
    """The optimised HLO, without the module's name and the places in the source."""
    text: str = program.lower(*arguments).compile().as_text()
    text = re.sub(r"^HloModule [^,\s]+", "HloModule _", text)
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*", "", text)
    return re.sub(r', metadata=\{("(\\.|[^"\\])*"|[^"}])*\}', "", text)


def fresh(function: Callable[..., Any]) -> Any:
    """`jax.jit` of a function object of its own, which is traced and compiled by itself."""
    return jax.jit(partial(function))


# ---- training ----


def sgd(apply: Apply, rate: float) -> Apply:
    """`step(params, x, target) -> params, loss` of `apply(params, x) -> y`."""

    def loss(params: Any, x: Any, target: Any) -> Any:
        return jnp.mean((apply(params, x) - target) ** 2)

    def step(params: Any, x: Any, target: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, target)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    return step


def sgd_with(apply: Apply, rate: float) -> Apply:
    """`step(params, control, x, target) -> params, rest, loss` of `apply -> y, rest`."""

    def loss(params: Any, control: Any, x: Any, target: Any) -> Any:
        y, rest = apply(params, control, x)
        return jnp.mean((y - target) ** 2), rest

    def step(params: Any, control: Any, x: Any, target: Any) -> Any:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, rest), grads = gradient(params, control, x, target)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), rest, value

    return step


def with_nothing(apply: Apply) -> Apply:
    """`apply -> y` as `apply -> y, None`, for `sgd_with`."""
    return lambda params, control, x: (apply(params, control, x), None)


# ---- forward passes: (host parameters, kernel parameters), what blends, input ----


def bare_apply(net: Network) -> Apply:
    """The network that cannot grow."""

    def apply(params: Any, x: Any) -> Any:
        return net(params, bare, x)

    return apply


def by_hand(
    net: Network, blend: Blend, programs: Mapping[str, Sequence[Callable[[Any, Any], Any]]]
) -> Apply:
    """Kernels blended as one writes it down, with nothing contained.

    Args:
        programs: the kernels' functions by site.

    Returns:
        `apply((params, kernels), weights, x)`; `weights` has for each site the host's
        and then the kernels', in one array.
    """

    def apply(params: Any, weights: Any, x: Any) -> Any:
        host, kernels = params
        at = {name: i for i, name in enumerate(programs)}

        def site(name: str, layer: Any, own: Any, /, *args: Any, **options: Any) -> Any:
            h = layer(own, *args, **options)
            if name not in programs:
                return h
            before = sum(len(programs[other]) for other in list(programs)[: at[name]])
            w = [weights[before + at[name] + i] for i in range(len(programs[name]) + 1)]
            outputs = [
                program(kernels[before + i], args[0]) for i, program in enumerate(programs[name])
            ]
            y = h * w[0] if blend == "convex" else h
            for k, weight in zip(outputs, w[1:], strict=True):
                y = y * (1.0 - weight) + k * weight if blend == "sequential" else y + k * weight
            return y

        grown: Site = site
        return net(host, grown, x)

    return apply


def hand_weights(plan: Plan, live: Live) -> jax.Array:
    """The weights of a live part, laid out as `by_hand` takes them."""
    own = [len(runs) for _, runs in plan.sites if runs]
    parts: list[jax.Array] = []
    for i, count in enumerate(own):
        first = sum(own[:i])
        parts.append(jnp.asarray(live.host_weights)[i : i + 1])
        parts.append(jnp.asarray(live.weights)[first : first + count])
    return jnp.concatenate(parts)


def planned_output(net: Network, plan: Plan) -> Apply:
    """`apply((params, kernels), live, x) -> y`: faults are contained and not counted."""

    def apply(params: Any, live: Live, x: Any) -> Any:
        host, kernels = params
        y, _ = forward(net, plan, host, dataclasses.replace(live, params=kernels), x)
        return y

    return apply


def planned(net: Network, plan: Plan) -> Apply:
    """`apply((params, kernels), live, x) -> y, errors`: faults are counted too.

    `live` needs no parameters, and only what changes is returned: what a program hands
    back as it came is copied.
    """

    def apply(params: Any, live: Live | None, x: Any) -> Any:
        host, kernels = params
        own = None if live is None else dataclasses.replace(live, params=kernels)
        y, seen = forward(net, plan, host, own, x)
        after = count_faults(own, seen.faults)
        return y, None if after is None else after.errors

    return apply


def planned_batch(net: Network, plan: Plan) -> Apply:
    """`planned` for a network of one example, over a batch of them."""

    def apply(params: Any, live: Live, xs: Any) -> Any:
        host, kernels = params
        own = dataclasses.replace(live, params=kernels)
        ys, seen = forward_batch(net, plan, host, own, xs)
        after = count_faults(own, seen.faults)
        return ys, None if after is None else after.errors

    return apply


def on_device(live: Live) -> Live:
    """A live part on the device, whose parameters are passed by themselves."""
    return jax.tree.map(jnp.asarray, dataclasses.replace(live, params=()))


def dynamic(net: Network, bank: Bank, sites: Sequence[str], blend: Blend) -> Apply:
    """`apply((params, bank parameters), (code, state), x) -> y, state`."""

    def apply(params: Any, control: tuple[Any, SeedState], x: Any) -> Any:
        host, kernels = params
        code, state = control
        own = dataclasses.replace(bank, code=code, params=kernels)
        y, faults = forward_dynamic(net, host, state, own, x, sites=sites, blend=blend)
        return y, record_faults(state, faults, step=0)

    return apply
