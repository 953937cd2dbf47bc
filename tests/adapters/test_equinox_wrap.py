"""Equinox: a dormant model is its host, a graft is surgery that returns a new model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_adapters.equinox import (
    GraftedLinear,
    SeededModel,
    trainable,
    unwrap,
    wrap,
)
from esper_functional import (
    BLENDS,
    KasminaException,
    SeedLifecycleState,
    init_seeds,
    state_digest,
)
from tests.adapters.kernels import artifact, jax_kernel
from tests.functional.networks import optimised_hlo
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

S = SeedLifecycleState
SITES = ("layers.0", "layers.1")


def host(seed: int = 0) -> eqx.nn.MLP:
    return eqx.nn.MLP(3, 2, width_size=5, depth=1, key=jax.random.key(seed))


def batch(size: int = 4) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (size, 3))


X = batch()


def grafted(alpha: float = 0.4, **options: Any) -> SeededModel:
    return wrap(host(), **options).load_kernel("layers.0", 1, jax_kernel(), alpha=alpha)


def over(model: Any, x: jax.Array = X) -> jax.Array:
    return jax.vmap(model)(x)


def step(static: Any) -> Callable[..., Any]:
    """A training step over the arrays of a module."""

    def loss(params: Any, x: Any) -> jax.Array:
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    def update(params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return update


def test_the_dormant_module_is_the_host_tree_and_leaves():
    original = host()
    model = wrap(original)
    assert jax.tree.structure(model.module) == jax.tree.structure(original)
    for left, right in zip(jax.tree.leaves(model.module), jax.tree.leaves(original), strict=True):
        assert left is right
    assert unwrap(model) is original
    assert model.sites == SITES
    assert model.seeds.shape == (2, 4)
    assert model.live is None
    assert model.plan.dormant


def test_a_dormant_step_compiles_to_the_very_program_of_the_host():
    texts = []
    for module in (host(), wrap(host()).module):
        params, static = eqx.partition(module, eqx.is_inexact_array)
        texts.append(optimised_hlo(step(static), params, X))
    assert texts[0] == texts[1]
    grown, static = eqx.partition(grafted().module, eqx.is_inexact_array)
    assert optimised_hlo(lambda p, x: over(eqx.combine(p, static), x), grown, X) != texts[0]


def test_surgery_returns_new_models_and_leaves_the_old():
    first = wrap(host())
    second = first.load_kernel("layers.0", 0, jax_kernel(), alpha=0.5, step=3)
    third = second.set_seed_alpha("layers.0", 0, 1.0)
    fourth = third.fossilize("layers.0", 0)
    fifth = third.unload_kernel("layers.0", 0)
    stages = [S(int(m.seeds.stage[0, 0])).name for m in (first, second, third, fourth, fifth)]
    assert stages == ["DORMANT", "ACTIVE", "ACTIVE", "FOSSILIZED", "DORMANT"]
    assert [float(m.seeds.alpha[0, 0]) for m in (first, second, third)] == [0.0, 0.5, 1.0]
    assert second.seeds.last_update[0, 0] == 3
    assert [len(m.kernels) for m in (first, second, fifth)] == [0, 1, 0]
    assert_bitwise(over(fifth.module), over(host()))
    assert state_digest(first.seeds) == state_digest(init_seeds(2, 4))


def test_a_graft_takes_its_layers_place_and_keeps_its_face():
    model = grafted()
    layers = model.kasmina_layers
    assert list(layers) == list(SITES)
    assert isinstance(layers["layers.0"], GraftedLinear)
    assert isinstance(layers["layers.1"], eqx.nn.Linear)
    assert layers["layers.0"].weight is model.host.layers[0].weight
    assert layers["layers.0"].bias is model.host.layers[0].bias


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("isolate", [False, True])
def test_output_and_gradients_are_those_of_the_composition_written_by_hand(blend, isolate):
    layer, kernel = grafted(blend=blend, isolate=isolate).kasmina_layers["layers.0"], jax_kernel()

    def ours(both: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(over(eqx.tree_at(lambda n: (n.host, n.kernels), layer, both), x) ** 2)

    def theirs(both: Any, x: jax.Array) -> jax.Array:
        own, (params,) = both
        h = x @ own.weight.T + own.bias
        k = kernel.program.apply(params, jax.lax.stop_gradient(x) if isolate else x)
        return jnp.sum((h + 0.4 * k if blend == "residual" else 0.6 * h + 0.4 * k) ** 2)

    both = (layer.host, layer.kernels)
    assert_close(ours(both, X), theirs(both, X))
    found = jax.grad(ours, argnums=(0, 1))(both, X)
    assert_tree_close(found, jax.grad(theirs, argnums=(0, 1))(both, X))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))


def test_vmap_of_the_module_equals_the_loop_and_jit_equals_eager():
    module = grafted().module
    assert_close(over(module), jnp.stack([module(x) for x in X]))
    assert_close(eqx.filter_jit(over)(module, X), over(module))
    assert_close(jnp.stack([grafted()(x) for x in X]), over(module))


def test_only_parameters_are_trainable():
    model = grafted().load_kernel("layers.0", 2, jax_kernel(1)).fossilize("layers.0", 2)
    params, rest = eqx.partition(model.module, trainable(model.module))
    own, fixed = params.layers[0], rest.layers[0]
    assert (own.host_weight, own.weights, own.errors) == (None, None, None)
    assert len(jax.tree.leaves(own.host)) == 2
    assert len(jax.tree.leaves(own.kernels[0])) == len(artifact().params)
    assert jax.tree.leaves(own.kernels[1]) == []
    assert len(jax.tree.leaves(fixed.kernels[1])) == len(artifact().params)
    assert jax.tree.structure(params.layers[1]) == jax.tree.structure(
        eqx.filter(model.host.layers[1], eqx.is_inexact_array)
    )
    for leaf in jax.tree.leaves(trainable(host())):
        assert leaf in (True, False)


def test_training_goes_back_by_with_module():
    model = grafted()
    params, static = eqx.partition(model.module, trainable(model.module))
    _, trained = step(static)(params, X)
    module = eqx.combine(trained, static)
    after = model.with_module(module)
    assert_bitwise(over(after.module), over(module))
    assert_bitwise(after.kernels[1].params, module.layers[0].kernels[0])
    assert_bitwise(unwrap(after).layers[0].weight, module.layers[0].host.weight)
    assert isinstance(unwrap(after).layers[0], eqx.nn.Linear)
    for before, now in zip(
        jax.tree.leaves((model.host, model.kernels[1].params)),
        jax.tree.leaves((after.host, after.kernels[1].params)),
        strict=True,
    ):
        if eqx.is_inexact_array(now):
            assert not np.array_equal(before, now)
    assert_bitwise(over(after.unload_kernel("layers.0", 1).module), over(unwrap(after)))


def test_a_module_of_another_structure_is_refused():
    model = grafted()
    for other in (host(), model.fossilize("layers.0", 1).module):
        with pytest.raises(KasminaException, match="taken before any later graft"):
            model.with_module(other)


@pytest.mark.parametrize("blend", BLENDS)
def test_a_nan_kernel_is_contained(blend):
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), jax_kernel())
    model = wrap(host(), blend=blend).load_kernel("layers.0", 1, nan, alpha=0.4)
    assert_close(over(model.module), over(host()))
    params, static = eqx.partition(model.module, trainable(model.module))
    gradient = jax.grad(lambda p: jnp.sum(over(eqx.combine(p, static)) ** 2))(params)
    assert_finite(gradient)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient.layers[0].kernels))
