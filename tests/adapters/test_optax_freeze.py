"""`freeze` and `per_group`: what is frozen stands still, what is apart does not notice the rest."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import esper_functional as ef
from esper_adapters import equinox as esper_equinox
from esper_adapters.optax import FrozenNode, OptimizerSurgeryError, carry, freeze, per_group
from tests.tolerance import assert_bitwise

PARAMS = {"a": jnp.full((2, 3), 0.5), "b": {"u": jnp.full(3, 0.2), "v": jnp.full((3, 2), 2.0)}}
GRADS = jax.tree.map(lambda p: p * 0.3 + 0.1, PARAMS)
KEPT = {"a": PARAMS["a"], "b": {"v": PARAMS["b"]["v"]}}
KEPT_GRADS = {"a": GRADS["a"], "b": {"v": GRADS["b"]["v"]}}


def all_but_u(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "u", params)


def by_name(params: Any) -> Any:
    return {name: name for name in params}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
        yield


OPTIMISERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.5),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "lamb": optax.lamb(1e-2, weight_decay=0.5),
    "prodigy": contrib.prodigy(weight_decay=0.5),
    "muon": contrib.muon(1e-2, weight_decay=0.5),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2, weight_decay_rate=0.1),
    "schedule_free": contrib.schedule_free_adamw(1e-2, weight_decay=0.5),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),
    "partition": optax.partition(
        {"x": optax.adamw(1e-2), "y": optax.lion(1e-2)},
        lambda params: jax.tree.map(lambda p: "x" if p.ndim > 1 else "y", params),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_is_frozen_stands_still_and_the_rest_does_not_know_it_is_there(name):
    inner = OPTIMISERS[name]
    frozen = freeze(inner, all_but_u)
    state, alone = frozen.init(PARAMS), inner.init(KEPT)
    params, kept = PARAMS, KEPT
    grads = {**GRADS, "b": {**GRADS["b"], "u": jnp.full(3, jnp.nan)}}
    for _ in range(3):
        updates, state = frozen.update(grads, state, params)
        expected, alone = inner.update(KEPT_GRADS, alone, kept)
        assert_bitwise(updates["b"]["u"], jnp.zeros(3))
        assert_bitwise({"a": updates["a"], "b": {"v": updates["b"]["v"]}}, expected)
        params, kept = optax.apply_updates(params, updates), optax.apply_updates(kept, expected)
    assert_bitwise(params["b"]["u"], PARAMS["b"]["u"])
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        assert_bitwise(leaf, other)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_freezing_nothing_is_the_bare_optimiser(name):
    inner = OPTIMISERS[name]
    frozen = freeze(inner, lambda params: True)
    state = inner.init(PARAMS)
    assert_bitwise(frozen.init(PARAMS), state)
    assert_bitwise(frozen.update(GRADS, state, PARAMS), inner.update(GRADS, state, PARAMS))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_freezing_drops_a_parameters_state_and_thawing_starts_it_anew(name):
    inner = OPTIMISERS[name]
    frozen, bare = freeze(inner, all_but_u), freeze(inner, lambda params: True)
    state = bare.init(PARAMS)
    _, state = bare.update(GRADS, state, PARAMS)

    cold = carry(frozen, state, PARAMS, PARAMS, old_optimizer=bare)
    assert jax.tree.structure(cold) == jax.tree.structure(frozen.init(PARAMS))
    before = dict(jax.tree_util.tree_leaves_with_path(state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(cold):
        assert leaf is before[path]

    thawed = carry(bare, cold, PARAMS, PARAMS, old_optimizer=frozen)
    initial = dict(jax.tree_util.tree_leaves_with_path(bare.init(PARAMS)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(thawed):
        if jax.tree_util.DictKey("u") in path:
            assert_bitwise(leaf, initial[path])
        else:
            assert leaf is before[path]
    bare.update(GRADS, thawed, PARAMS)


class Layer(eqx.Module):
    """What is frozen is a matter of structure, as with a grafted layer's fossils."""

    w: Any
    frozen: bool = eqx.field(static=True)


def not_frozen(params: Any) -> Any:
    return jax.tree.map(
        lambda layer: not layer.frozen, params, is_leaf=lambda n: isinstance(n, Layer)
    )


def test_one_optimiser_serves_where_structure_says_what_is_frozen():
    optimizer = optax.apply_if_finite(freeze(optax.adam(1e-2), not_frozen), 3)
    old = [Layer(jnp.ones(2), frozen=False), Layer(jnp.ones(2), frozen=False)]
    new = [old[0], Layer(old[1].w, frozen=True)]
    state = optimizer.init(old)
    _, state = optimizer.update(old, state, old)
    fossil = carry(optimizer, state, old, new)
    moments = fossil.inner_state[0].mu
    assert moments[0].w is state.inner_state[0].mu[0].w
    assert isinstance(moments[1].w, FrozenNode)
    updates, _ = optimizer.update(new, fossil, new)
    assert_bitwise(updates[1].w, jnp.zeros(2))
    assert_bitwise(carry(optimizer, fossil, new, old).inner_state[0].mu[1].w, jnp.zeros(2))


def test_a_fossilised_kernel_loses_its_moments_and_its_host_keeps_them():
    host = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    kernel = ef.kernel_from_function(lambda params, x: x @ params["w"], {"w": jnp.ones((2, 3))})
    growing = esper_equinox.wrap(host).load_kernel("layers.0", 1, kernel)
    fossil = growing.fossilize("layers.0", 1)
    old, new = (eqx.filter(m.module, eqx.is_inexact_array) for m in (growing, fossil))
    optimizer = freeze(optax.adamw(1e-2), esper_equinox.trainable)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, old), optimizer.init(old), old)
    carried = carry(optimizer, state, old, new)
    kept = {id(leaf) for leaf in jax.tree.leaves(carried)}
    dropped = [leaf for leaf in jax.tree.leaves(state) if id(leaf) not in kept]
    assert [leaf.shape for leaf in dropped] == [(2, 3), (2, 3)]
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, new), carried, new)
    moved = [leaf for leaf in jax.tree.leaves(updates) if leaf.any()]
    assert sorted(leaf.shape for leaf in moved) == [(2,), (2, 3), (3,), (3, 2)]


def objective(params: Any) -> Any:
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))


def test_functions_among_the_extra_arguments_get_all_parameters():
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    optimizer = freeze(search, all_but_u)
    value, grads = jax.value_and_grad(objective)(PARAMS)
    updates, _ = optimizer.update(
        grads,
        optimizer.init(PARAMS),
        PARAMS,
        value=value,
        grad=grads,
        value_fn=objective,
    )
    assert objective(optax.apply_updates(PARAMS, updates)) < value
    assert_bitwise(updates["b"]["u"], jnp.zeros(3))

    opaque = contrib.sam(optax.adam(0.1), optax.adam(0.1), opaque_mode=True)
    optimizer = freeze(opaque, all_but_u)
    updates, _ = optimizer.update(
        grads, optimizer.init(PARAMS), PARAMS, grad_fn=lambda p, _: jax.grad(objective)(p)
    )
    assert updates["a"].any()
    assert_bitwise(updates["b"]["u"], jnp.zeros(3))


def test_a_compiled_step_freezes_alike():
    optimizer = freeze(optax.adamw(1e-2), all_but_u)
    with jax.disable_jit(disable=False):
        updates, state = jax.jit(optimizer.update)(GRADS, optimizer.init(PARAMS), PARAMS)
    assert_bitwise(updates["b"]["u"], jnp.zeros(3))
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(PARAMS))


def test_trainable_must_give_bools_for_a_prefix():
    with pytest.raises(OptimizerSurgeryError, match=r"tree of bools, got 1 at \['a'\]"):
        freeze(optax.adam(1e-2), lambda params: {"a": 1, "b": True}).init(PARAMS)
    with pytest.raises(OptimizerSurgeryError, match=r"prefix of the params, got .*'c'"):
        freeze(optax.adam(1e-2), lambda params: {"c": True}).init(PARAMS)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_group_is_trained_as_if_alone(name):
    inner = OPTIMISERS[name]
    optimizer = per_group(inner, by_name)
    state, params = optimizer.init(PARAMS), PARAMS
    alone = {group: inner.init({group: PARAMS[group]}) for group in PARAMS}
    for _ in range(3):
        updates, state = optimizer.update(GRADS, state, params)
        for group in PARAMS:
            part, alone[group] = inner.update(
                {group: GRADS[group]}, alone[group], {group: params[group]}
            )
            assert_bitwise(updates[group], part[group])
        params = optax.apply_updates(params, updates)


def test_groups_come_and_go_with_counts_of_their_own():
    optimizer = per_group(freeze(optax.adam(1e-2), all_but_u), by_name)
    old = {"a": PARAMS["a"]}
    state = optimizer.init(old)
    _, state = optimizer.update({"a": GRADS["a"]}, state, old)
    grown = carry(optimizer, state, old, PARAMS)
    counts = {name: int(group.inner_state[0].count) for name, group in grown.groups.items()}
    assert counts == {"a": 1, "b": 0}
    assert_bitwise(carry(optimizer, grown, PARAMS, old), state)


def test_a_group_without_parameters_is_none():
    optimizer = per_group(optax.adam(1e-2), by_name)
    assert optimizer.init({**PARAMS, "b": None}).groups.keys() == {"a"}


def test_groups_that_were_not_carried_are_refused():
    optimizer = per_group(optax.adam(1e-2), by_name)
    state = optimizer.init({"a": PARAMS["a"]})
    match = r"params have the groups \['a', 'b'\], the state has \['a'\].*carry"
    with pytest.raises(OptimizerSurgeryError, match=match):
        optimizer.update(GRADS, state, PARAMS)


def test_groups_must_be_strings_for_a_prefix():
    with pytest.raises(OptimizerSurgeryError, match=r"tree of strings, got 1 at \['a'\]"):
        per_group(optax.adam(1e-2), lambda params: {"a": 1, "b": "x"}).init(PARAMS)
    with pytest.raises(OptimizerSurgeryError, match=r"prefix of the params, got .*'c'"):
        per_group(optax.adam(1e-2), lambda params: {"c": "x"}).init(PARAMS)
