"""Incubation: a kernel trains in the module's shadow, and the host does not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import BLENDS, forward, shadow_forward, shadow_forward_batch
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    SITES,
    X,
    affine_kernel,
    at,
    dense_kernel,
    each_face,
    loss,
    nan_kernel,
)
from tests.adapters.hosts import HOSTS
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

PLACES = (("layers.0", 0), ("layers.0", 1), ("layers.1", 2))


def incubating(face, blend="convex", **options):
    """Two kernels that incubate, one in each layer, and one that runs beside them."""
    model = face.wrap(blend=blend, **options)
    model = model.load_kernel("layers.0", 0, dense_kernel(), alpha=0.0).incubate("layers.0", 0)
    model = model.load_kernel("layers.0", 1, affine_kernel(), alpha=0.3)
    out = dense_kernel(1, 5, 2)
    return model.load_kernel("layers.1", 2, out, alpha=0.0).incubate("layers.1", 2)


def total(face, module):
    return loss(face, module) + sum(loss(face, shadow) for shadow in face.api.shadows(module))


def gradient(face, module, of):
    params, rebuild = face.split(module)
    return rebuild(jax.jit(jax.grad(lambda p: of(face, rebuild(p))))(params))


def core_gradients(face, model):
    """Of the same loss in the flat form, by `forward` and `shadow_forward`."""
    flat, live = face.api.to_functional(model), model.live

    def run(params, kernels):
        own = dataclasses.replace(live, params=kernels)
        if face is EQUINOX:
            y = jax.vmap(lambda x: forward(flat.net, model.plan, params, own, x)[0])(X)
            shadows, _ = shadow_forward_batch(flat.net, model.plan, params, own, X)
        else:
            y, _ = forward(flat.net, model.plan, params, own, X)
            shadows, _ = shadow_forward(flat.net, model.plan, params, own, X)
        weights = jnp.arange(1.0, 1 + y.size).reshape(y.shape)
        return sum(jnp.sum(own**2 * weights) for own in (y, *shadows))

    to_host, to_kernels = jax.jit(jax.grad(run, argnums=(0, 1)))(flat.params, live.params)
    return flat.combine(to_host), dict(zip(PLACES, to_kernels, strict=True))


@each_face
@pytest.mark.parametrize("blend", BLENDS)
def test_gradients_are_those_of_the_cores_shadows(face, blend):
    model = incubating(face, blend)
    assert len(face.api.shadows(model.module)) == 2
    found = gradient(face, model.module, total)
    host, kernels = core_gradients(face, model)
    for site in SITES:
        assert_tree_close(face.weights(at(found, site)), face.weights(at(host, site)))
    for site, seed in PLACES:
        own = face.kernels(at(found, site))[seed]
        assert_tree_close(own, kernels[site, seed])
        assert all(np.asarray(g).any() for g in jax.tree.leaves(own))


@each_face
def test_the_hosts_gradients_are_those_without_shadows(face):
    model = incubating(face)
    found, plain = (gradient(face, model.module, of) for of in (total, loss))
    for site in SITES:
        assert_close(*(face.weights(at(module, site))[0] for module in (found, plain)))
    assert_tree_close(*(face.kernels(at(module, "layers.0"))[1] for module in (found, plain)))
    for site, seed in (PLACES[0], PLACES[2]):
        own = face.kernels(at(plain, site))[seed]
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(own))


@each_face
def test_the_output_is_the_one_without_what_incubates(face):
    model = incubating(face)
    without = model.unload_kernel("layers.0", 0).unload_kernel("layers.1", 2)
    assert_bitwise(face.over(model.module, X), face.over(without.module, X))
    alone = model.unload_kernel("layers.0", 1)
    assert_bitwise(face.over(alone.module, X), face.over(face.mlp(), X))


@each_face
def test_a_shadow_is_the_network_with_that_kernel_at_alpha_one(face):
    model = incubating(face)
    first, second = face.api.shadows(model.module)
    shown = model.unload_kernel("layers.1", 2).set_seed_alpha("layers.0", 0, 1.0)
    assert_close(face.over(first, X), face.over(shown.module, X))
    shown = model.unload_kernel("layers.0", 0).set_seed_alpha("layers.1", 2, 1.0)
    assert_close(face.over(second, X), face.over(shown.module, X))


@each_face
def test_without_incubating_kernels_there_are_no_shadows(face):
    assert face.api.shadows(face.wrap().module) == ()
    assert face.api.shadows(face.wrap().load_kernel("layers.0", 0, dense_kernel()).module) == ()


@each_face
def test_what_a_kernel_learnt_is_kept_when_it_is_shown(face):
    model = incubating(face)
    grads = gradient(face, model.module, total)
    own = face.kernels(at(grads, "layers.0"))[0]
    params, rebuild = face.split(model.module)
    step, _ = face.split(grads)
    moved = rebuild(jax.tree.map(lambda p, g: p - 0.01 * g, params, step))
    after = model.with_module(moved).set_seed_alpha("layers.0", 0, 0.5)
    assert [run.incubating for run in after.plan.runs] == [False, False, True]
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, dense_kernel().params, own)
    assert_tree_close(face.kernels(at(after.module, "layers.0"))[0], expected)


@each_face
def test_a_shadow_contains_its_kernels_faults_and_observe_counts_them(face):
    model = face.wrap().load_kernel("layers.0", 0, nan_kernel(), alpha=0.0)
    model = model.incubate("layers.0", 0).load_kernel("layers.1", 1, dense_kernel(1, 5, 2))
    (shadow,) = face.api.shadows(model.module)
    assert_finite(face.over(shadow, X))
    grads = gradient(face, model.module, total)
    assert_finite([face.weights(at(grads, site)) for site in SITES])
    counts = []
    for step in range(3):
        model = model.observe(X, step=step)
        counts.append(np.asarray(model.seeds.error_count)[:, :2].tolist())
    assert counts[:2] == [[[1, 0], [0, 0]], [[2, 0], [0, 0]]]
    assert model.get_model_stats()["seeds_by_stage"]["ERROR_RECOVERY"] == 1
    assert face.api.shadows(model.module) == ()


def with_statistics():
    host = HOSTS["flax statistics"]().module
    host.layers[2].deterministic = True
    model = FLAX.wrap(host, target_layers=[nnx.Linear, nnx.BatchNorm])
    model = model.load_kernel("layers.0", 0, dense_kernel(), alpha=0.0).incubate("layers.0", 0)
    inner = dense_kernel(0, 5, 5)
    return host, model.load_kernel("layers.1", 0, inner, alpha=0.0).incubate("layers.1", 0)


def test_running_statistics_do_not_see_shadows():
    host, model = with_statistics()

    @nnx.jit
    def step(module):
        def of(module):
            return loss(FLAX, module) + sum(loss(FLAX, s) for s in FLAX.api.shadows(module))

        return nnx.grad(of)(module)

    def of_host(host):
        return loss(FLAX, host)

    grads = step(model.module)
    nnx.jit(nnx.grad(of_host))(host)
    ours, theirs = at(model.module, "layers.1"), at(host, "layers.1")
    assert np.asarray(theirs.mean[...]).any()
    assert_bitwise((ours.mean[...], ours.var[...]), (theirs.mean[...], theirs.var[...]))
    assert jax.tree.leaves(grads)


def test_shadows_change_neither_the_modules_parameters_nor_its_random_streams():
    host = HOSTS["flax statistics"]().module
    model = FLAX.wrap(host).load_kernel("layers.0", 0, dense_kernel(), alpha=0.0)
    module = model.incubate("layers.0", 0).module
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    (shadow,) = FLAX.api.shadows(module)
    shadow(X)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    assert_bitwise(after, before)
