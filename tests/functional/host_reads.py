"""Counts how often the host reads arrays of a device, in a process of its own.

jax's own guard against such transfers never triggers on the CPU, where numpy moreover
takes a single device's memory by the buffer protocol, which nothing can watch. So all
arrays lie on two (pretended) devices, as copies: each read then goes by way of `_value`,
where it is counted. `python -m tests.functional.host_reads` prints the counts as JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    Event,
    EventKind,
    absorb,
    advance,
    apply_event,
    count_faults,
    execute,
    forward,
    gather,
    make_bank,
    plan,
    reweigh,
    shadow_forward,
)
from tests.functional.networks import SITES, batch, dense_kernel, grafted_state, host_params, mlp

STEPS = 6
KERNELS = {0: dense_kernel(0), 1: dense_kernel(1), 2: dense_kernel(2, "out")}
K = EventKind


@contextmanager
def host_reads() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many arrays of a device were read since."""
    kind: Any = type(jnp.zeros(()))
    original = kind.__dict__["_value"]
    reads = 0

    def counted(array: Any) -> Any:
        nonlocal reads
        reads += 1
        return original.__get__(array)

    kind._value = property(counted)
    try:
        yield lambda: reads
    finally:
        kind._value = original


def on_devices(tree: Any) -> Any:
    """Arrays as copies on both devices."""
    mesh = jax.make_mesh((2,), ("copies",))
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P()))


def ways_to_read() -> dict[str, int]:
    """Reads noticed by each way there is."""
    vector, scalar = on_devices(jnp.arange(3.0)), on_devices(jnp.float32(2.0))
    double = jax.jit(lambda x: 2.0 * x)
    double(vector)
    ways: dict[str, Callable[[], Any]] = {
        "np.asarray": lambda: np.asarray(vector),
        "np.array": lambda: np.array(vector),
        "float()": lambda: float(scalar),
        "int()": lambda: int(scalar),
        "bool()": lambda: bool(scalar),
        "if": lambda: 1 if scalar > 1.0 else 0,
        ".tolist()": vector.tolist,
        ".item()": scalar.item,
        "format": lambda: f"{scalar:.2f}",
        "device_get": lambda: jax.device_get({"a": vector}),
        "np.where": lambda: np.where([True, False, True], vector, 0.0),
        "nothing: a compiled call": lambda: double(vector),
        "nothing: numpy as input": lambda: double(np.arange(3.0, dtype=np.float32)),
        "nothing: waiting": lambda: jax.block_until_ready(double(vector)),
    }
    seen: dict[str, int] = {}
    for name, way in ways.items():
        with host_reads() as count:
            way()
            seen[name] = count()
    return seen


@partial(jax.jit, static_argnums=0)
def train_step(own: Any, params: Any, live: Any, x: Any) -> Any:
    """One step of descent for host and kernels, shadows and faults included."""

    def loss(params: Any, kernels: Any) -> Any:
        chosen = dataclasses.replace(live, params=kernels)
        y, seen = forward(mlp, own, params, chosen, x)
        shadows, dim = shadow_forward(mlp, own, params, chosen, x)
        after = count_faults(chosen, seen.faults, dim.faults)
        return sum(jnp.sum(each**2) for each in (y, *shadows)), after

    (value, after), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        params, live.params
    )
    new = jax.tree.map(lambda p, g: p - 0.01 * g, (params, live.params), grads)
    return value, new[0], dataclasses.replace(after, params=new[1])


def planned_loop() -> int:
    """Steps of a training loop in the planned mode, with a ramp that the host follows."""
    state = grafted_state((0, 0, 0, 0.0), (0, 1, 1, 0.0), (1, 0, 2, 0.5))
    state = apply_event(state, Event(0, 0, 0, K.RAMP, value=1.0, span=STEPS))
    state = apply_event(state, Event(0, 0, 1, K.INCUBATE))
    own = plan(state, KERNELS, SITES)
    params, xs = on_devices(host_params()), [on_devices(batch(i)) for i in range(STEPS)]
    live = on_devices(gather(state, KERNELS, own))
    values: list[Any] = []
    with host_reads() as count:
        for step, x in enumerate(xs):
            state = advance(state, step)
            live = reweigh(live, state, own)
            value, params, live = train_step(own, params, live, x)
            values.append(value)
        reads = count()
    assert all(np.isfinite(np.asarray(value)) for value in values)
    return reads


def dynamic_loop() -> int:
    """Steps whose seeds fail, recover and ramp inside the program."""
    state = grafted_state((0, 0, 0, 0.0), (0, 1, 1, 0.3), (1, 0, 2, 0.5))
    state = apply_event(state, Event(0, 0, 0, K.RAMP, value=1.0, span=STEPS))
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), KERNELS[1])
    bank = on_devices(make_bank({**KERNELS, 1: nan}))
    state, params = on_devices(state), on_devices(host_params())

    @jax.jit
    def step(params: Any, state: Any, bank: Any, x: Any, now: Any) -> Any:
        return execute(mlp, params, advance(state, now), bank, x, sites=SITES, step=now)

    with host_reads() as count:
        for now in range(STEPS):
            _, state = step(params, state, bank, batch(now), np.int32(now))
        reads = count()
    assert np.asarray(state.fallback).sum() == 1
    return reads


def boundary() -> int:
    """What absorbing costs, which is why it is done at boundaries."""
    state = grafted_state((0, 0, 0, 0.4), (1, 0, 2, 0.5))
    own = plan(state, KERNELS, SITES)
    live = on_devices(gather(state, KERNELS, own))
    _, _, live = train_step(own, on_devices(host_params()), live, on_devices(batch()))
    with host_reads() as count:
        absorb(state, live, step=1)
        return count()


if __name__ == "__main__":
    loops = {"planned": planned_loop(), "dynamic": dynamic_loop(), "boundary": boundary()}
    sys.stdout.write(json.dumps({"ways": ways_to_read(), "loops": loops}))
