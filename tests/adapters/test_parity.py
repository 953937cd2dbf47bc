"""One meaning on both backends: a torch layer against the jax core, on the same seed state."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_adapters.pytorch import KasminaLayer, absorb_faults
from esper_functional import (
    BLENDS,
    Kernel,
    absorb,
    bare,
    count_faults,
    forward,
    gather,
    kernel_from_function,
    linear,
    plan,
)
from tests.adapters.kernels import BLUEPRINTS, artifact, jax_kernel, root_kernel, torch_kernel
from tests.tolerance import assert_close, assert_tree_close

NUM_SEEDS = 3
STAGES = ("DORMANT", "ACTIVE", "FOSSILIZED")

# One row for each seed: its stage, its blueprint and its alpha.
grafts = st.lists(
    st.tuples(st.sampled_from(STAGES), st.sampled_from(BLUEPRINTS), st.floats(0.0, 1.0, width=32)),
    min_size=NUM_SEEDS,
    max_size=NUM_SEEDS,
)


def net(params: Any, site: Any, x: Any) -> Any:
    return site("fc", linear, params, x)


@cache
def compiled(planned: Any) -> Any:
    """Output, gradients by (host, kernels, x), and the next live part, of one plan."""

    def both(host, live, x, cotangent):
        def value(host, kernels, x):
            own = live and dataclasses.replace(live, params=kernels)
            y, observed = forward(net, planned, host, own, x)
            return y, count_faults(live, observed.faults)

        y, pull_back, after = jax.vjp(value, host, live.params if live else (), x, has_aux=True)
        return y, pull_back(cotangent), after

    return jax.jit(both)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def torch_layer(seed: int, rows: Any, blend: str, isolate: bool) -> KasminaLayer:
    layer = KasminaLayer(3, 5, num_seeds=NUM_SEEDS, layer_name="fc", blend=blend, isolate=isolate)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(draw(seed, 5, 3)))
        layer.bias.copy_(torch.tensor(draw(seed, 5)))
    for i, (stage, blueprint, alpha) in enumerate(rows):
        if stage != "DORMANT":
            layer.load_kernel_sync(i, torch_kernel(seed + i, artifact(blueprint)), alpha=alpha)
        if stage == "FOSSILIZED":
            layer.fossilize(i)
    return layer


@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    rows=grafts,
    blend=st.sampled_from(BLENDS),
    isolate=st.booleans(),
    batch=st.sampled_from([1, 4]),
)
def test_output_and_every_gradient_agree(seed, rows, blend, isolate, batch):
    x, cotangent = draw(seed + 1, batch, 3), draw(seed + 2, batch, 5)
    layer = torch_layer(seed, rows, blend, isolate)
    source = torch.tensor(x, requires_grad=True)
    theirs = layer(source)
    theirs.backward(torch.tensor(cotangent))

    kernels = {i: jax_kernel(seed + i, artifact(row[1])) for i, row in enumerate(rows)}
    planned = plan(layer.seeds, kernels, ("fc",), blend=blend, isolate=isolate)
    live = gather(layer.seeds, kernels, planned)
    host = {"weight": jnp.asarray(draw(seed, 5, 3)), "bias": jnp.asarray(draw(seed, 5))}
    ours, (to_host, to_kernels, to_x), _ = compiled(planned)(host, live, x, cotangent)

    assert_close(theirs.detach(), ours)
    assert_close(source.grad, to_x)
    assert_close(layer.weight.grad, to_host["weight"])
    assert_close(layer.bias.grad, to_host["bias"])
    running = [i for i, row in enumerate(rows) if row[0] != "DORMANT"]
    for i, gradient in zip(running, to_kernels, strict=True):
        own = layer.kernel(i)
        for name, parameter in zip(artifact(rows[i][1]).params, own.parameters(), strict=True):
            if rows[i][0] == "FOSSILIZED":
                assert parameter.grad is None
                assert not np.asarray(gradient[name]).any()
            else:
                assert_close(parameter.grad, gradient[name])


def root(params: Any, x: Any) -> Any:
    return jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) * params["scale"]


@settings(max_examples=10)
@given(
    blend=st.sampled_from(BLENDS),
    steps=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_faults_are_contained_and_counted_alike(blend, steps):
    """Each step is a batch of three examples, bad where the sum of the input is negative."""
    layer = torch_layer(0, [("DORMANT", "", 0.0)] * NUM_SEEDS, blend, False)
    layer.load_kernel_sync(0, torch_kernel(0), alpha=0.25)
    layer.load_kernel_sync(1, root_kernel(), alpha=0.5)
    scale = {name: jnp.asarray(p) for name, p in root_kernel().params.items()}
    kernels = [jax_kernel(0), Kernel(kernel_from_function(root, scale).program, scale)]
    state = layer.seeds
    planned = plan(state, kernels, ("fc",), blend=blend)
    live = gather(state, kernels, planned)
    host = {"weight": jnp.asarray(draw(0, 5, 3)), "bias": jnp.asarray(draw(0, 5))}

    for i, bad in enumerate(steps):
        signs = np.where(np.array(bad)[:, None], np.float32(-1), np.float32(1))
        x, cotangent = np.abs(draw(i, 3, 3)) * signs, draw(i, 3, 5)
        layer.zero_grad()
        source = torch.tensor(x, requires_grad=True)
        theirs = layer(source)
        theirs.backward(torch.tensor(cotangent))
        step = compiled(planned)
        ours, (to_host, to_kernels, to_x), live = step(host, live, x, cotangent)
        assert_close(theirs.detach(), ours)
        assert_close(source.grad, to_x)
        assert_close(layer.weight.grad, to_host["weight"])
        assert_close(layer.kernel(1).scale.grad, to_kernels[1]["scale"])
        assert layer.error_counts().tolist() == live.errors.tolist()
    absorb_faults(layer._table, [layer], len(steps))
    assert_tree_close(layer.seeds, absorb(state, live, step=len(steps)))


@given(seed=st.integers(0, 1000))
def test_dormant_layers_agree(seed):
    layer = torch_layer(seed, [("DORMANT", "", 0.0)] * NUM_SEEDS, "convex", False)
    host = {"weight": jnp.asarray(draw(seed, 5, 3)), "bias": jnp.asarray(draw(seed, 5))}
    x = draw(seed, 4, 3)
    assert_close(layer(torch.tensor(x)).detach(), net(host, bare, jnp.asarray(x)))
