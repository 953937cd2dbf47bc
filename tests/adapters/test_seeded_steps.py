"""Steps, slots and states of wrapped models: what happens when, and what is taken back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esper
from esper.checkpoints import load_checkpoint, save_checkpoint
from esper_adapters._select import check_targets
from esper_adapters._wrap import record_signatures
from esper_adapters.optax import OptimizerSurgeryError, freeze
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    init_seeds,
    state_digest,
)
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    X,
    affine_kernel,
    at,
    dense_kernel,
    each_face,
    nan_kernel,
    trained,
)
from tests.tolerance import assert_bitwise, assert_close

K = EventKind


def ramping(face, blend="residual"):
    """A model whose first seed's alpha is 0.5, in the middle of its ramp from 1000 to 1100."""
    model = face.wrap(blend=blend).load_kernel("layers.0", 0, affine_kernel(), alpha=0.0)
    model = model.ramp_seed_alpha("layers.0", 0, 1.0, 100, step=1000).advance(1050)
    assert model.seeds.alpha[0, 0] == 0.5
    return model


@each_face
@pytest.mark.parametrize("blend", ["convex", "residual", "sequential"])
def test_what_comes_without_a_step_comes_at_the_one_reached(face, blend):
    model = ramping(face, blend)
    y = face.over(model.module, X)
    changes = {
        "fossilize": lambda: model.fossilize("layers.0", 0),
        "fold": lambda: model.fold("layers.0", 0),
        "load another": lambda: model.load_kernel("layers.0", 1, dense_kernel(), alpha=0.0),
        "observe": lambda: model.observe(X),
        "export": lambda: face.wrap(esper.export_plain(model)),
    }
    for change, made in changes.items():
        after = made()
        if change == "load another" and blend == "sequential":
            continue
        assert_close(face.over(after.module, X), y)
    assert model.fossilize("layers.0", 0).seeds.alpha[0, 0] == 0.5
    assert model.fossilize("layers.0", 0).step == 1050


@each_face
def test_observing_the_fault_of_another_seed_leaves_a_ramp_where_it_is(face):
    model = ramping(face).load_kernel("layers.1", 0, nan_kernel(5, 2), alpha=0.3)
    after = model.observe(X)
    assert after.seeds.error_count[1, 0] == 1
    assert after.seeds.alpha[0, 0] == 0.5


@each_face
def test_a_step_that_is_over_is_refused(face):
    model = ramping(face)
    for refused in (
        lambda: model.advance(1049),
        lambda: model.fossilize("layers.0", 0, step=0),
        lambda: model.observe(X, step=3),
        lambda: model.apply_event(Event(7, 0, 0, K.ALPHA, value=1.0)),
        lambda: model.load_kernel("layers.1", 0, dense_kernel(0, 5, 2), step=1),
    ):
        with pytest.raises(KasminaException, match=r"step \d+ is over: .* reached step 1050"):
            refused()


@each_face
def test_a_slot_that_another_seed_holds_is_refused(face):
    model = face.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.5)
    with pytest.raises(SeedIndexError, match=r"slot 0 holds the kernel of seed 0.*5 here"):
        model.apply_event(Event(0, 1, 1, K.LOAD))
    after = model.apply_event(Event(0, 1, 1, K.LOAD, value=5))
    assert after.seeds.slot[1, 1] == 5


@each_face
def test_a_state_and_its_kernels_are_taken_back(face, tmp_path):
    model = ramping(face).load_kernel("layers.1", 2, dense_kernel(0, 5, 2), alpha=0.2)
    model = model.with_module(trained(face, model.module)).fossilize("layers.1", 2)
    host = esper.unwrap(model)
    arrays = eqx.filter(host, eqx.is_array) if face is EQUINOX else nnx.state(host)
    held = {"seeds": model.seeds, "kernels": model.kernels, "host": arrays}
    save_checkpoint(tmp_path, 1050, held, {})
    # In another process there is a fresh host, and kernels of the same programs.
    bare = face.mlp()
    kernels = {0: affine_kernel(7), 6: dense_kernel(7, 5, 2)}
    arrays = eqx.filter(bare, eqx.is_array) if face is EQUINOX else nnx.state(bare)
    like = {"seeds": init_seeds(2, 4), "kernels": kernels, "host": arrays}
    held, _ = load_checkpoint(tmp_path, 1050, like=like)
    if face is EQUINOX:
        bare = eqx.combine(held["host"], bare)
    else:
        nnx.update(bare, held["host"])
    fresh = face.wrap(bare, blend="residual").with_seeds(
        held["seeds"], held["kernels"], step=1050, events=model.events
    )
    assert_bitwise(face.over(fresh.module, X), face.over(model.module, X))
    assert state_digest(fresh.seeds) == state_digest(model.seeds)
    assert (fresh.step, fresh.events) == (1050, model.events)


@each_face
def test_a_state_that_does_not_fit_is_refused(face):
    model = face.wrap()
    with pytest.raises(SeedIndexError, match=r"has 2 layers of 4 seeds; got .*\(2, 3\)"):
        model.with_seeds(init_seeds(2, 3), {}, step=0)
    seeds = model.load_kernel("layers.0", 0, dense_kernel()).seeds
    with pytest.raises(SeedIndexError, match="runs the kernel in slot 0, and no kernel is there"):
        model.with_seeds(seeds, {}, step=0)
    with pytest.raises(KernelMismatchError, match=r"seed 0 of layer 'layers\.0'"):
        model.with_seeds(seeds, {0: dense_kernel(0, 5, 2)}, step=0)


def test_an_optimiser_that_moves_what_does_not_train_is_refused():
    model = EQUINOX.wrap(blend="residual").load_kernel("layers.0", 0, dense_kernel(), alpha=0.5)
    model = model.fossilize("layers.0", 0)

    def after(optimizer):
        arrays, static = eqx.partition(model.module, eqx.is_inexact_array)
        state = optimizer.init(arrays)
        grads = jax.grad(lambda a: jnp.sum(EQUINOX.over(eqx.combine(a, static), X) ** 2))(arrays)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(grads, state, arrays)
        return eqx.apply_updates(model.module, updates)

    decayed = after(optax.adamw(1e-2, weight_decay=0.1))
    with pytest.raises(
        KasminaException,
        match=r"the blend weights and the fossil of seed 0 of layer 'layers\.0' moved.*freeze\(",
    ):
        model.with_module(decayed)
    kept = after(freeze(optax.adamw(1e-2, weight_decay=0.1), EQUINOX.api.trainable))
    assert_bitwise(model.with_module(kept).kernels[0].params, model.kernels[0].params)


@each_face
def test_arrays_of_other_shapes_are_refused_by_name(face):
    model, other = face.wrap(), face.mlp((3, 6, 2))
    if face is EQUINOX:  # widths are static there
        other = eqx.tree_at(lambda m: m.layers[0].weight, face.mlp(), jnp.ones((6, 3)))
    with pytest.raises(KasminaException, match=r"layers\.0\.\w+' is .*float32\[[35]"):
        model.with_module(other)


@each_face
def test_what_is_no_kernel_is_told_how_to_become_one(face):
    with pytest.raises(KernelMismatchError, match=r"got Linear: make one by kernel_from_module"):
        face.wrap().load_kernel("layers.0", 0, face.linear(3, 5))


@each_face
def test_a_lone_target_is_one(face):
    assert face.wrap(target_layers="layers.1").sites == ("layers.1",)
    kind = type(face.linear(1, 1))
    assert face.wrap(target_layers=kind).sites == face.wrap().sites
    assert esper.wrap(face.mlp(), target_layers="layers.1").sites == ("layers.1",)
    with pytest.raises(SeedIndexError, match="takes types of layers, and paths"):
        check_targets([3])
    with pytest.raises(SeedIndexError, match="put it into a model that calls it"):
        face.wrap(face.linear(3, 5))


@each_face
def test_examples_are_tuples_that_the_model_takes(face):
    with pytest.raises(KasminaException, match=r"a tuple of the arguments of one call, such as"):
        record_signatures(EQUINOX.api.to_functional(face.wrap()), X)
    with pytest.raises(KasminaException, match=r"could not be traced on `example` \(float32\[7\]"):
        face.wrap(example=(jnp.ones(7),))


def test_two_layers_of_one_path_are_refused():
    one, other = EQUINOX.linear(3, 5), EQUINOX.linear(3, 5)
    with pytest.raises(KasminaException, match=r"two layers of the model are called '\[?.*a\.b"):
        EQUINOX.wrap(eqx.nn.Lambda({"a.b": one, "a": {"b": other}}))


def test_an_optimiser_of_another_class_is_refused():
    model = FLAX.wrap()
    optimizer = nnx.ModelAndOptimizer(model.module, optax.adam(1e-2))
    with pytest.raises(OptimizerSurgeryError, match="got ModelAndOptimizer"):
        FLAX.api.carry_optimizer(optimizer, model.module, model.module)


class Busy(eqx.Module):
    """With a batch norm, a dropout whose key is by name alone, and a flag."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout

    def __init__(self):
        self.first = EQUINOX.linear(3, 5)
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x, state, *, key, doubled=False):
        h, state = self.norm(self.first(x), state)
        return self.drop(h * 2 if doubled else h, key=key), state


def run_busy(module, x, state, keys):
    def one(x, state, key):
        return module(x, state, key=key, doubled=True)

    return jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
        x, state, keys
    )


def test_a_model_of_keys_states_and_flags_is_run_as_it_is_told():
    host, state = eqx.nn.make_with_state(Busy)()
    args = (X, state, jax.random.split(jax.random.key(0), len(X)))
    model = EQUINOX.wrap(host, call=run_busy, example=args, target_layers=[eqx.nn.Linear])
    assert model.signatures["first"].inputs == (3,)
    model = model.load_kernel("first", 0, nan_kernel(), alpha=0.5)
    for count in (1, 2):
        model = model.observe(*args)
        assert model.seeds.error_count[0, 0] == count
    assert model.compare_with_original(*args)["max_abs"] == 0.0
    flat = EQUINOX.api.to_functional(model)
    y, _ = flat.net(flat.params, lambda name, layer, params, *a, **o: layer(params, *a, **o), args)
    assert_close(y, run_busy(host, *args)[0])


class Flagged(nnx.Module):
    def __init__(self):
        self.first = FLAX.linear(3, 5)

    def __call__(self, x, doubled):
        return self.first(x) * (2 if doubled else 1)


def test_a_flag_is_no_array():
    model = FLAX.wrap(Flagged(), example=(X, True)).load_kernel("first", 0, nan_kernel(), alpha=1.0)
    assert model.observe(X, False).seeds.error_count[0, 0] == 1
    assert set(model.compare_with_original(X, True)) == {"max_abs", "mean_abs"}
    assert at(model.module, "first").esper_host is not None
    assert np.isfinite(model.module(X, True)).all()


def test_a_fossils_negative_zeros_are_not_taken_for_moved():
    """Adding an update of zero makes -0.0 of a frozen parameter +0.0."""
    kernel = jax.tree.map(lambda p: -jnp.zeros_like(p), dense_kernel())
    model = EQUINOX.wrap().load_kernel("layers.0", 1, kernel, alpha=0.4).fossilize("layers.0", 1)
    moved = jax.tree.map(lambda p: p + 0.0 if eqx.is_inexact_array(p) else p, model.module)
    model.with_module(moved)
    with pytest.raises(KasminaException, match="the fossil of seed 1 of layer 'layers.0' moved"):
        model.with_module(
            eqx.tree_at(
                lambda m: jax.tree.leaves(EQUINOX.kernels(at(m, "layers.0"))[1])[0],
                model.module,
                replace_fn=lambda p: p + 1.0,
            )
        )
