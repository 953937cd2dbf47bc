"""Faults are contained in every call, and counted where a call is observed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    BLENDS,
    EventKind,
    SeedLifecycleState,
    advance,
    fold_events,
    kernel_from_function,
    state_digest,
)
from tests.adapters.faces import (
    SITES,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    each_face,
    gradients,
    nan_kernel,
    trained,
)
from tests.functional.networks import compilations
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

S, K = SeedLifecycleState, EventKind


def root(params, x):
    """NaN for each example with a negative sum, and only for those."""
    return jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) * params["w"]


ROOT = kernel_from_function(root, {"w": jnp.linspace(0.5, 2.0, 5)})


@each_face
@pytest.mark.parametrize("blend", BLENDS)
def test_a_kernel_of_nan_changes_neither_output_nor_gradients(face, blend):
    model = face.wrap(blend=blend).load_kernel("layers.0", 1, nan_kernel(), alpha=0.4)
    assert_close(face.over(model.module, X), face.over(face.mlp(), X))
    value, module, to_x = gradients(face, model.module)
    expected, bare, bare_to_x = gradients(face, face.wrap().module)
    assert_close(value, expected)
    if blend != "convex":
        # Under convex the host stands in for the kernel, and that path's gradient is none.
        assert_close(to_x, bare_to_x)
        for site in SITES:
            assert_tree_close(face.weights(at(module, site)), face.weights(at(bare, site)))
    assert_finite((to_x, [face.weights(at(module, site)) for site in SITES]))
    own = face.kernels(at(module, "layers.0"))[1]
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(own))


@each_face
def test_an_example_that_fails_is_its_own_affair(face):
    good = np.asarray(jnp.sum(X, axis=1) >= 0)
    assert good.any()
    assert not good.all()
    model = face.wrap().load_kernel("layers.0", 0, ROOT, alpha=0.5)
    module, host = (jax.jit(lambda x, m=m: face.over(m, x)) for m in (model.module, face.mlp()))
    y, h = np.asarray(module(X)), np.asarray(host(X))
    assert_close(y[~good], h[~good])
    assert (np.abs(y[good] - h[good]).max(axis=1) > 1e-3).all()
    assert_finite(gradients(face, model.module)[2])


@each_face
def test_observed_failures_are_counted_and_the_third_stops_the_seed(face):
    model = face.wrap().load_kernel("layers.0", 0, nan_kernel(), alpha=0.5)
    model = model.load_kernel("layers.0", 2, affine_kernel(), alpha=0.2)
    model = model.load_kernel("layers.1", 1, nan_kernel(5, 2), alpha=0.5)
    for step in range(1, 4):
        model = model.observe(X, step=step)
        count = np.asarray(model.seeds.error_count)
        assert (count[0, 0], count[0, 2], count[1, 1]) == (step, 0, step)
    stages = np.asarray(model.seeds.stage)
    assert stages[0, 0] == stages[1, 1] == S.ERROR_RECOVERY
    assert model.seeds.last_update[0, 0] == 3
    assert stages[0, 2] == S.ACTIVE
    # Bare again where nothing else runs.
    assert not isinstance(at(model.module, "layers.1"), face.api.GraftedLayer)
    assert list(face.kernels(at(model.module, "layers.0"))) == [2]
    again = model.load_kernel("layers.1", 1, dense_kernel(0, 5, 2))
    assert again.seeds.stage[1, 1] == S.ACTIVE
    assert again.seeds.error_count[1, 1] == 0


@each_face
def test_a_finite_step_starts_the_count_anew(face):
    model = face.wrap().load_kernel("layers.0", 0, ROOT, alpha=0.5)
    bad, good = -jnp.abs(X), jnp.abs(X)
    counts = []
    for x in (bad, bad, good, bad, X):
        model = model.observe(x)
        counts.append(int(model.seeds.error_count[0, 0]))
    assert counts == [1, 2, 0, 1, 2]


@each_face
def test_observing_changes_no_parameter_and_compiles_once(face):
    model = face.wrap().load_kernel("layers.0", 0, ROOT, alpha=0.5)
    before, doubled = arrays(model.module), 2 * X
    model.observe(X)
    with compilations() as compiled:
        after = model.set_seed_alpha("layers.0", 0, 0.9).observe(X).observe(doubled)
    assert compiled() == 0
    assert_bitwise(arrays(model.module), before)
    assert after.seeds.error_count[0, 0] == 2
    dormant = face.wrap()
    assert dormant.observe(X).plan.dormant


@each_face
def test_a_seed_at_three_failures_has_stopped_before_they_are_absorbed(face):
    model = face.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.5)
    seeds = model.seeds.replace(error_count=np.full_like(model.seeds.error_count, 3))
    stopped = dataclasses.replace(model, seeds=seeds)
    assert_close(face.over(stopped.module, X), face.over(face.mlp(), X))


@each_face
def test_folding_a_models_events_gives_its_seeds(face):
    model = face.wrap(blend="residual").load_kernel("layers.0", 0, nan_kernel(), alpha=0.5)
    model = model.load_kernel("layers.0", 1, affine_kernel(), alpha=0.0, step=1)
    model = model.incubate("layers.0", 1, step=2)
    for step in range(3, 6):
        model = model.observe(X, step=step).advance(step)
    model = model.ramp_seed_alpha("layers.0", 1, 0.8, 6, step=6).advance(8).advance(9)
    model = model.with_module(trained(face, model.module)).advance(20)
    model = model.fold("layers.0", 1, step=20).load_kernel("layers.1", 2, dense_kernel(0, 5, 2))
    assert {event.kind for event in model.events} == {
        *(K.LOAD, K.ACTIVATE, K.ERRORS, K.INCUBATE, K.RAMP, K.FOLD)
    }
    told = fold_events(face.wrap().seeds, model.events)
    assert state_digest(told) == state_digest(model.seeds)
    under_way = face.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.0)
    under_way = under_way.ramp_seed_alpha("layers.0", 0, 1.0, 10, step=0).advance(7)
    told = advance(fold_events(face.wrap().seeds, under_way.events), 7)
    assert state_digest(told) == state_digest(under_way.seeds)
    assert under_way.seeds.alpha[0, 0] == np.float32(0.7)
