"""After a graft training goes on, and no incumbent's moments notice."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esper_adapters.optax import carry, freeze
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    SITES,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    loss,
)
from tests.tolerance import assert_bitwise, assert_finite

DECAY = optax.adamw(1e-2, weight_decay=0.1)


def grown(face: Any, model: Any) -> Any:
    """A model after the surgeries of a life, on which incumbents have to stay."""
    model = model.load_kernel("layers.0", 2, affine_kernel(), alpha=0.2)
    return model.load_kernel("layers.1", 0, dense_kernel(4, 5, 2), alpha=0.1)


def first(face: Any) -> Any:
    return face.wrap().load_kernel("layers.0", 1, dense_kernel(), alpha=0.4)


def equinox_step(module: Any, state: Any, optimizer: Any) -> tuple[Any, Any]:
    params, rebuild = EQUINOX.split(module)
    grads = jax.jit(jax.grad(lambda p: loss(EQUINOX, rebuild(p))))(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state, params)
    return rebuild(optax.apply_updates(params, updates)), state


def flax_step(module: Any, optimizer: Any) -> None:
    grads = nnx.grad(lambda module: loss(FLAX, module))(module)
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(module, grads)


def moments(state: Any) -> tuple[Any, Any]:
    (own,) = (part for part in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(part))
    return own.mu, own.nu


def _is_adam(node: Any) -> bool:
    return hasattr(node, "mu") and hasattr(node, "nu")


def test_the_second_step_after_a_graft_in_equinox():
    model = first(EQUINOX)
    params, _ = EQUINOX.split(model.module)
    state = DECAY.init(params)
    module, state = equinox_step(model.module, state, DECAY)
    before = model.with_module(module)
    after = grown(EQUINOX, before)
    new, _ = EQUINOX.split(after.module)
    old, _ = EQUINOX.split(before.module)

    with pytest.raises((ValueError, TypeError, AttributeError)):
        equinox_step(after.module, state, DECAY)

    carried = carry(DECAY, state, old, new)
    for theirs, ours in zip(moments(state), moments(carried), strict=True):
        layer, grafted = at(ours, "layers.0"), at(theirs, "layers.0")
        assert layer.weight is grafted.weight
        assert layer.bias is grafted.bias
        assert layer.esper_kernels[1]["w"] is grafted.esper_kernels[1]["w"]
        assert not np.asarray(layer.esper_kernels[2]["a"]).any()
        assert at(ours, "layers.1").weight is at(theirs, "layers.1").weight
        assert not np.asarray(at(ours, "layers.1").esper_kernels[0]["w"]).any()
    module, carried = equinox_step(after.module, carried, DECAY)
    module, carried = equinox_step(module, carried, DECAY)
    assert loss(EQUINOX, module) < loss(EQUINOX, after.module)
    assert_finite(arrays(module))
    pruned = after.with_module(module).unload_kernel("layers.1", 0)
    last = carry(DECAY, carried, EQUINOX.split(module)[0], EQUINOX.split(pruned.module)[0])
    for theirs, ours in zip(moments(carried), moments(last), strict=True):
        assert at(ours, "layers.1").weight is at(theirs, "layers.1").weight
    equinox_step(pruned.module, last, DECAY)


def test_the_second_step_after_a_graft_in_flax():
    model = first(FLAX)
    optimizer = nnx.Optimizer(model.module, DECAY, wrt=nnx.Param)
    flax_step(model.module, optimizer)
    after = grown(FLAX, model)

    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        flax_step(after.module, optimizer)

    carried = FLAX.api.carry_optimizer(optimizer, model.module, after.module)
    before = arrays(nnx.as_pure(optimizer.opt_state))
    (old, new) = (moments(nnx.as_pure(own.opt_state)) for own in (optimizer, carried))
    for theirs, ours in zip(old, new, strict=True):
        theirs, ours = (
            nnx.to_pure_dict(own) if isinstance(own, nnx.State) else own for own in (theirs, ours)
        )
        layer, grafted = (own["layers"][0] for own in (ours, theirs))
        assert_bitwise(layer["esper_host"], grafted["esper_host"])
        assert_bitwise(layer["esper_kernels"][1], grafted["esper_kernels"][1])
        assert not np.asarray(layer["esper_kernels"][2]["a"]).any()
        assert_bitwise(ours["layers"][1]["esper_host"], theirs["layers"][1])
        assert not np.asarray(ours["layers"][1]["esper_kernels"][0]["w"]).any()
    assert carried.step[...] == optimizer.step[...] == 1
    start = loss(FLAX, after.module)
    flax_step(after.module, carried)
    flax_step(after.module, carried)
    assert loss(FLAX, after.module) < start
    assert_finite(arrays(after.module))
    assert_bitwise(arrays(nnx.as_pure(optimizer.opt_state)), before)
    assert optimizer.step[...] == 1
    pruned = after.unload_kernel("layers.1", 0)
    last = FLAX.api.carry_optimizer(carried, after.module, pruned.module)
    flax_step(pruned.module, last)
    assert last.step[...] == 4


def test_fossils_do_not_move_under_weight_decay_in_equinox():
    model = grown(EQUINOX, first(EQUINOX)).fossilize("layers.0", 1)
    module, frozen = model.module, freeze(DECAY, EQUINOX.api.trainable)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    state = frozen.init(params)
    grads = jax.grad(lambda p: loss(EQUINOX, eqx.combine(p, static)))(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = frozen.update(grads, state, params)
    stepped = eqx.combine(optax.apply_updates(params, updates), static)
    for moved in (equinox_step(module, DECAY.init(EQUINOX.split(module)[0]), DECAY)[0], stepped):
        own, before = at(moved, "layers.0"), at(module, "layers.0")
        assert_bitwise(own.esper_kernels[1], before.esper_kernels[1])
        assert_bitwise(own.esper_blending, before.esper_blending)
        assert (np.asarray(own.esper_kernels[2]["a"]) != before.esper_kernels[2]["a"]).any()
        assert_bitwise(model.with_module(moved).kernels[1].params, dense_kernel().params)


def test_fossils_do_not_move_under_weight_decay_in_flax():
    model = grown(FLAX, first(FLAX))
    optimizer = nnx.Optimizer(model.module, DECAY, wrt=nnx.Param)
    flax_step(model.module, optimizer)
    own = FLAX.kernels(at(model.module, "layers.0"))
    after = model.fossilize("layers.0", 1)
    carried = FLAX.api.carry_optimizer(optimizer, model.module, after.module)
    flax_step(after.module, carried)
    layer = at(after.module, "layers.0")
    assert isinstance(layer.esper_kernels[1]["w"], FLAX.api.FossilParam)
    assert_bitwise(FLAX.kernels(layer)[1], own[1])
    assert (np.asarray(FLAX.kernels(layer)[2]["a"]) != own[2]["a"]).any()
    assert not any(
        isinstance(part, FLAX.api.BlendData)
        for part in jax.tree.leaves(
            nnx.state(after.module, nnx.Param), is_leaf=lambda n: isinstance(n, nnx.Variable)
        )
    )


def test_only_parameters_are_trainable_in_equinox():
    model = grown(EQUINOX, first(EQUINOX)).fossilize("layers.0", 2)
    params, rest = eqx.partition(model.module, EQUINOX.api.trainable(model.module))
    own, fixed = at(params, "layers.0"), at(rest, "layers.0")
    assert jax.tree.leaves(own.esper_blending) == []
    assert len(jax.tree.leaves(own.esper_host)) == 2
    assert len(jax.tree.leaves(own.esper_kernels[1])) == 2
    assert jax.tree.leaves(own.esper_kernels[2]) == []
    assert len(jax.tree.leaves(fixed.esper_kernels[2])) == 2
    for leaf in jax.tree.leaves(EQUINOX.api.trainable(EQUINOX.mlp())):
        assert leaf in (True, False)


def test_a_training_step_of_a_new_alpha_compiles_nothing_in_equinox():
    from tests.functional.networks import compilations

    model = first(EQUINOX).ramp_seed_alpha("layers.0", 1, 1.0, 10, step=0)

    @eqx.filter_jit
    def step(module, x):
        params, rebuild = EQUINOX.split(module)
        return jax.grad(lambda p: loss(EQUINOX, rebuild(p), x))(params)

    step(model.module, X)
    modules = [model.advance(i).module for i in range(1, 11)]
    with compilations() as compiled:
        outputs = [step(module, X) for module in modules]
    assert compiled() == 0
    assert (np.asarray(outputs[0].layers[0].weight) != outputs[-1].layers[0].weight).any()


def test_a_training_step_of_a_new_alpha_compiles_nothing_in_flax():
    from tests.functional.networks import compilations

    model = first(FLAX).ramp_seed_alpha("layers.0", 1, 1.0, 10, step=0)

    @nnx.jit
    def step(module, x):
        return nnx.grad(lambda module: loss(FLAX, module, x))(module)

    step(model.module, X)
    modules = [model.advance(i).module for i in range(1, 11)]
    with compilations() as compiled:
        for module in modules:
            step(module, X)
    assert compiled() == 0
    assert jnp.isfinite(modules[-1](X)).all()
    assert model.sites == SITES
