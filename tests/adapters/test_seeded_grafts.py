"""Grafted layers compute what is written by hand, alike in both frameworks and in the core."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_adapters._naming import load_events
from esper_functional import (
    BLENDS,
    fold_events,
    forward,
    gather,
    init_seeds,
    linear,
    plan,
)
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    SITES,
    X,
    affine_kernel,
    at,
    dense_kernel,
    each_face,
    gradients,
    layer_weights,
)
from tests.adapters.kernels import jax_kernel
from tests.tolerance import assert_close, assert_tree_close

ALPHAS = {("layers.0", 0): 0.25, ("layers.0", 2): 0.6, ("layers.1", 1): 0.8}
KERNELS = {
    ("layers.0", 0): dense_kernel(0),
    ("layers.0", 2): affine_kernel(1),
    ("layers.1", 1): dense_kernel(2, 5, 2),
}


def blended(blend, h, pairs):
    """The three blends as the documents write them."""
    if blend == "convex":
        s = sum(a for a, _ in pairs)
        return h * (1 - min(s, 1)) + sum(a * k for a, k in pairs) / max(s, 1)
    for a, k in pairs:
        h = h + a * k if blend == "residual" else (1 - a) * h + a * k
    return h


def by_hand(blend, isolate, alphas, host, kernels, x):
    """The MLP; `host` by site, `kernels` by site and seed."""
    for site in SITES:
        w, b = host[site]
        seen = jax.lax.stop_gradient(x) if isolate else x
        pairs = [
            (alphas[place], KERNELS[place].program.apply(kernels[place], seen))
            for place in sorted(kernels)
            if place[0] == site
        ]
        x = blended(blend, x @ w + b, pairs)
        x = jnp.tanh(x) if site == SITES[0] else x
    return x


def grafted(face, blend="convex", isolate=False, alphas=ALPHAS):
    model = face.wrap(blend=blend, isolate=isolate)
    for place, kernel in KERNELS.items():
        model = model.load_kernel(*place, kernel, alpha=alphas[place])
    return model


HOST = {site: layer_weights(i, o) for site, i, o in zip(SITES, (3, 5), (5, 2), strict=True)}
PARAMS = {place: kernel.params for place, kernel in KERNELS.items()}


@each_face
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("isolate", [False, True])
def test_output_and_gradients_are_those_written_by_hand(face, blend, isolate):
    model = grafted(face, blend, isolate)

    def theirs(host, kernels, x):
        y = by_hand(blend, isolate, ALPHAS, host, kernels, x)
        return jnp.sum(y**2 * jnp.arange(1.0, 1 + y.size).reshape(y.shape))

    expected, to_all = jax.value_and_grad(theirs, argnums=(0, 1, 2))(HOST, PARAMS, X)
    value, module, to_x = gradients(face, model.module)
    assert_close(value, expected)
    assert_close(to_x, to_all[2])
    for site in SITES:
        layer = at(module, site)
        assert_tree_close(face.weights(layer), to_all[0][site])
        own = {seed: params for (name, seed), params in to_all[1].items() if name == site}
        assert_tree_close(face.kernels(layer), own)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(to_all))


@each_face
def test_a_convex_sum_above_one_is_shared_out(face):
    alphas = dict.fromkeys(ALPHAS, 1.0)
    y = face.over(grafted(face, alphas=alphas).module, X)
    assert_close(y, by_hand("convex", False, alphas, HOST, PARAMS, X))


@each_face
@pytest.mark.parametrize("blend", BLENDS)
def test_the_flat_form_and_the_core_agree_with_the_module(face, blend):
    model = grafted(face, blend)

    def core(params, site, x):
        x = jnp.tanh(site(SITES[0], linear, params[SITES[0]], x))
        return site(SITES[1], linear, params[SITES[1]], x)

    host = {site: {"weight": jnp.asarray(w.T), "bias": b} for site, (w, b) in HOST.items()}
    kernels, events = {}, []
    for slot, (site, seed) in enumerate(KERNELS):
        kernels[slot] = KERNELS[site, seed]
        events += load_events(0, SITES.index(site), seed, slot, "", ALPHAS[site, seed])
    seeds = fold_events(init_seeds(2, 4), events)
    planned = plan(seeds, kernels, SITES, blend=blend)
    y, _ = forward(core, planned, host, gather(seeds, kernels, planned), X)
    assert_close(face.over(model.module, X), y)

    flat = face.api.to_functional(model)

    def run(x):
        return forward(flat.net, model.plan, flat.params, model.live, x)[0]

    assert_close(jax.vmap(run)(X) if face is EQUINOX else run(X), y)


@each_face
def test_gradients_of_the_flat_form_are_the_modules(face):
    model = grafted(face)
    flat, live = face.api.to_functional(model), model.live

    def flat_loss(params, kernels, x):
        own = dataclasses.replace(live, params=kernels)

        def run(x):
            return forward(flat.net, model.plan, params, own, x)[0]

        y = jax.vmap(run)(x) if face is EQUINOX else run(x)
        return jnp.sum(y**2 * jnp.arange(1.0, 1 + y.size).reshape(y.shape))

    to_host, to_kernels, to_x = jax.grad(flat_loss, argnums=(0, 1, 2))(flat.params, live.params, X)
    _, module, expected = gradients(face, model.module)
    assert_close(to_x, expected)
    for site in SITES:
        ours, theirs = at(flat.combine(to_host), site), at(module, site)
        assert_tree_close(face.weights(ours), face.weights(theirs))
    found = [face.kernels(at(module, site))[seed] for site, seed in sorted(KERNELS)]
    assert_tree_close(to_kernels, tuple(found))


def test_artifacts_run_alike_in_both_frameworks():
    kernel = jax_kernel()
    outputs, grads = [], []
    for face in (EQUINOX, FLAX):
        model = face.wrap().load_kernel("layers.0", 1, kernel, alpha=0.4)
        _, module, to_x = gradients(face, model.module)
        outputs.append(face.over(model.module, X))
        grads.append((face.kernels(at(module, "layers.0"))[1], to_x))
    w, b = HOST["layers.0"]
    h = 0.6 * (X @ w + b) + 0.4 * kernel.program.apply(kernel.params, X)
    w, b = HOST["layers.1"]
    assert_close(outputs[0], jnp.tanh(h) @ w + b)
    assert_close(*outputs)
    assert_tree_close(*grads)
