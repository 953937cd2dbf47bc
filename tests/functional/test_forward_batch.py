"""The batched forward pass equals the mapped one, also where the two could differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Live,
    Program,
    fold_events,
    forward,
    forward_batch,
    gather,
    init_linear,
    init_seeds,
    linear,
    plan,
)
from tests.tolerance import assert_tree_close

KEYS = jax.random.split(jax.random.key(7), 6)
PARAMS = {"hidden": init_linear(KEYS[0], 3, 5), "out": init_linear(KEYS[1], 5, 2)}
OWN = {"a": jax.random.normal(KEYS[2], (3, 4)), "b": jax.random.normal(KEYS[3], (4, 5))}
X = jax.random.normal(KEYS[4], (6, 3))
SITES = ("hidden", "out")


def net(params, site, x):
    h = jax.nn.relu(site("hidden", linear, params["hidden"], x))
    return site("out", linear, params["out"], h)


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def deserialised() -> Program:
    (batch,) = export.symbolic_shape("b")
    specs = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in OWN.items()}
    x = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    exported = export.export(jax.jit(apply))(specs, x)
    return Program(
        "loaded", export.deserialize(exported.serialize(vjp_order=1)).call, batches=False
    )


def with_twin() -> Program:
    return Program("loaded with twin", deserialised().apply, batches=False, twin=apply)


@pytest.fixture(params=["native", "deserialised", "twin"])
def running(request):
    make = {"native": lambda: Program("native", apply), "deserialised": deserialised}
    kernels = {0: Kernel(make.get(request.param, with_twin)(), OWN)}
    events = [
        Event(0, 0, 1, EventKind.LOAD, value=0.0),
        Event(0, 0, 1, EventKind.ACTIVATE, value=0.5),
    ]
    state = fold_events(init_seeds(2, 2), events)
    own = plan(state, kernels, SITES)
    return own, gather(state, kernels, own)


def loss_of(run, own, live, kernel, params, xs):
    merged = Live(live.host_weights, live.weights, live.errors, (kernel,))
    y, seen = run(own, params, merged, xs)
    return jnp.sum(y * jnp.arange(1.0, 3.0)), seen.faults


def batched(own, params, live, xs):
    return forward_batch(net, own, params, live, xs)


def mapped(own, params, live, xs):
    return jax.vmap(lambda x: forward(net, own, params, live, x))(xs)


def gradient(run, own, live):
    def of(kernel, params, xs):
        return jax.grad(lambda *a: loss_of(run, own, live, *a)[0], argnums=(0, 1, 2))(
            kernel, params, xs
        )

    return of


def test_value_and_gradient_are_those_of_the_mapped_pass(running):
    own, live = running
    assert_tree_close(batched(own, PARAMS, live, X)[0], mapped(own, PARAMS, live, X)[0])
    assert_tree_close(
        jax.jit(gradient(batched, own, live))(OWN, PARAMS, X),
        jax.jit(gradient(mapped, own, live))(OWN, PARAMS, X),
    )


def test_a_gradient_for_each_group_of_examples_is_that_groups(running):
    own, live = running
    groups = X.reshape(3, 2, 3)
    got = jax.vmap(gradient(batched, own, live), in_axes=(None, None, 0))(OWN, PARAMS, groups)
    for i in range(3):
        each = gradient(batched, own, live)(OWN, PARAMS, groups[i])
        assert_tree_close(jax.tree.map(lambda g, i=i: g[i], got), each)


def test_a_population_is_each_of_its_members(running):
    own, live = running
    people = jax.tree.map(lambda p: jnp.stack([p, 2.0 * p, -p]), OWN)
    got = jax.vmap(gradient(batched, own, live), in_axes=(0, None, None))(people, PARAMS, X)
    for i in range(3):
        member = jax.tree.map(lambda p, i=i: p[i], people)
        each = gradient(batched, own, live)(member, PARAMS, X)
        assert_tree_close(jax.tree.map(lambda g, i=i: g[i], got), each)


def test_one_bad_example_is_one_fault_of_the_batch(running):
    own, live = running
    bad = X.at[4].set(jnp.nan)
    _, seen = batched(own, PARAMS, live, bad)
    assert [bool(f) for f in seen.faults] == [True]
    assert np.shape(seen.faults[0]) == ()
