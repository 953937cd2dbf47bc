"""Surgery is pure, keeps what was trained, and can be undone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    SeedLifecycleState,
    init_seeds,
    state_digest,
)
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    SITES,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    each_face,
    trained,
)
from tests.tolerance import assert_bitwise, assert_close

S = SeedLifecycleState


def grafted(face, **options):
    model = face.wrap(**options).load_kernel("layers.0", 1, dense_kernel(), alpha=0.4)
    return model.load_kernel("layers.0", 2, affine_kernel(), alpha=0.3)


CHANGES = {
    "load_kernel": lambda m: m.load_kernel("layers.1", 0, dense_kernel(3, 5, 2)),
    "unload_kernel": lambda m: m.unload_kernel("layers.0", 1),
    "set_seed_alpha": lambda m: m.set_seed_alpha("layers.0", 1, 0.9),
    "ramp_seed_alpha": lambda m: m.ramp_seed_alpha("layers.0", 1, 0.9, 10, step=2),
    "advance": lambda m: m.ramp_seed_alpha("layers.0", 1, 0.9, 10, step=2).advance(7),
    "incubate": lambda m: m.set_seed_alpha("layers.0", 1, 0.0).incubate("layers.0", 1),
    "fossilize": lambda m: m.fossilize("layers.0", 1),
    "fold": lambda m: m.fold("layers.0", 2),
    "observe": lambda m: m.observe(X),
    "apply_event": lambda m: m.apply_event(Event(3, 0, 1, EventKind.ERRORS, value=3.0)),
}


def snapshot(model):
    """All bytes of a model, and its plan."""
    return (
        arrays(model.host),
        arrays(model.module),
        {slot: arrays(kernel.params) for slot, kernel in model.kernels.items()},
        state_digest(model.seeds),
        model.plan,
    )


@each_face
@pytest.mark.parametrize("name", CHANGES)
def test_no_method_changes_the_model_it_is_called_on_or_the_host(face, name):
    host = face.mlp()
    model = face.wrap(host).load_kernel("layers.0", 1, dense_kernel(), alpha=0.4)
    model = model.load_kernel("layers.0", 2, affine_kernel(), alpha=0.3)
    before, of_host, module = snapshot(model), arrays(host), model.module
    after = CHANGES[name](model)
    assert_bitwise(snapshot(model), before)
    assert model.module is module
    assert_bitwise(arrays(host), of_host)
    assert_bitwise(arrays(face.mlp()), of_host)
    if name != "observe":
        assert state_digest(after.seeds) != state_digest(model.seeds)


@each_face
@pytest.mark.parametrize("name", CHANGES)
def test_training_the_new_module_leaves_the_old_alone(face, name):
    model = grafted(face)
    before, y = snapshot(model), face.over(model.module, X)
    after = CHANGES[name](model)
    if face is FLAX:
        for leaf in nnx.iter_graph(after.module):
            if isinstance(leaf[1], nnx.Variable):
                leaf[1][...] = leaf[1][...] + 1
    else:
        after = after.with_module(trained(face, after.module))
    assert_bitwise(snapshot(model), before)
    assert_bitwise(face.over(model.module, X), y)


@each_face
def test_the_stages_of_a_life(face):
    first = face.wrap()
    second = first.load_kernel("layers.0", 0, dense_kernel(), alpha=0.5, step=3)
    third = second.set_seed_alpha("layers.0", 0, 1.0)
    fourth = third.fossilize("layers.0", 0)
    fifth = third.unload_kernel("layers.0", 0)
    stages = [S(int(m.seeds.stage[0, 0])).name for m in (first, second, third, fourth, fifth)]
    assert stages == ["DORMANT", "ACTIVE", "ACTIVE", "FOSSILIZED", "DORMANT"]
    assert [float(m.seeds.alpha[0, 0]) for m in (first, second, third)] == [0.0, 0.5, 1.0]
    assert second.seeds.last_update[0, 0] == 3
    assert [len(m.kernels) for m in (first, second, fifth)] == [0, 1, 0]
    assert state_digest(first.seeds) == state_digest(init_seeds(2, 4))


@each_face
def test_loaded_unloaded_and_unwrapped_a_model_is_its_host_bit_by_bit(face):
    host = face.mlp()
    model = face.wrap(host)
    for site, kernel in zip(SITES, (dense_kernel(), dense_kernel(0, 5, 2)), strict=True):
        model = model.load_kernel(site, 0, kernel).load_kernel(site, 3, kernel)
    for site in SITES:
        model = model.unload_kernel(site, 0).unload_kernel(site, 3)
    after = face.api.unwrap(model)
    assert type(after) is type(host)
    assert_bitwise(arrays(after), arrays(host))
    assert_bitwise(face.over(after, X), face.over(host, X))
    structure = model.surgery.structure
    assert structure(after) == structure(host) == structure(model.module)
    if face is EQUINOX:
        assert all(
            a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(host), strict=True)
        )


@each_face
def test_a_graft_takes_its_layers_place_and_keeps_its_face(face):
    model = grafted(face)
    layers = model.kasmina_layers
    assert list(layers) == list(SITES)
    assert isinstance(layers["layers.0"], face.api.GraftedLayer)
    assert not isinstance(layers["layers.1"], face.api.GraftedLayer)
    assert_bitwise(face.weights(layers["layers.0"]), face.weights(at(model.host, "layers.0")))
    assert layers["layers.0"].in_features == 3
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layers["layers.0"].nonsense


@each_face
def test_training_goes_back_by_with_module(face):
    model = grafted(face)
    module = trained(face, model.module)
    after = model.with_module(module)
    assert_bitwise(face.over(after.module, X), face.over(module, X))
    assert_bitwise(after.kernels[1].params, face.kernels(at(module, "layers.0"))[1])
    host = face.api.unwrap(after)
    assert not isinstance(at(host, "layers.0"), face.api.GraftedLayer)
    for site in SITES:
        assert_bitwise(face.weights(at(host, site)), face.weights(at(module, site)))
        old, new = face.weights(at(model.host, site)), face.weights(at(host, site))
        assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(old, new, strict=True))
    bare = after.unload_kernel("layers.0", 1).unload_kernel("layers.0", 2)
    assert_bitwise(face.over(bare.module, X), face.over(host, X))
    # A round trip of what was not trained changes nothing.
    assert_bitwise(snapshot(after.with_module(after.module))[:3], snapshot(after)[:3])


@each_face
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_starts_from_what_was_trained(face, name):
    model = grafted(face)
    module = trained(face, model.module)
    if face is FLAX:
        # In place, and nothing is handed back.
        nnx.update(model.module, nnx.state(module))
        after = CHANGES[name](model)
        assert_bitwise(snapshot(after)[:3], snapshot(CHANGES[name](model.with_module(module)))[:3])
    else:
        after = CHANGES[name](model.with_module(module))
    if name != "fold":
        for site in SITES:
            host = at(face.api.unwrap(after), site)
            assert_bitwise(face.weights(host), face.weights(at(module, site)))
    for seed, params in face.kernels(at(module, "layers.0")).items():
        if seed in after.kernels:
            assert_bitwise(after.kernels[seed].params, params)


@each_face
def test_a_module_of_another_structure_is_refused(face):
    model = grafted(face)
    for other in (face.mlp(), model.fossilize("layers.0", 1).module):
        with pytest.raises(KasminaException, match="taken before any later graft"):
            model.with_module(other)


def test_a_flax_module_trained_in_place_is_what_everything_sees():
    model = grafted(FLAX)
    weights = at(model.module, "layers.0").kernel
    weights[...] = weights[...] + 1
    kernel = at(model.module, "layers.0").esper_kernels[1]["w"]
    kernel[...] = kernel[...] * 2
    y = model.module(X)
    expected = FLAX.weights(at(model.module, "layers.0"))
    assert_bitwise(FLAX.weights(at(FLAX.api.unwrap(model), "layers.0")), expected)
    flat = FLAX.api.to_functional(model)
    assert_bitwise(FLAX.weights(at(flat.combine(flat.params), "layers.0")), expected)
    assert_bitwise(model.live.params[0]["w"], 2 * dense_kernel().params["w"])
    assert_close(FLAX.api.export_plain(model)(X), y)
    host = FLAX.api.unwrap(model)
    gap = np.abs(np.asarray(y) - np.asarray(host(X)))
    found = model.compare_with_original(X)
    assert_close(np.float32(found["max_abs"]), gap.max())


def test_an_unwrapped_flax_host_is_a_module_of_its_own():
    model = grafted(FLAX)
    host = FLAX.api.unwrap(model)
    y = model.module(X)
    weights = at(host, "layers.0").kernel
    weights[...] = weights[...] * 0
    assert_bitwise(model.module(X), y)


@each_face
def test_events_may_name_their_slots_themselves(face):
    model = face.wrap()
    for slot, layer, kernel in ((9, 1, dense_kernel(0, 5, 2)), (5, 0, dense_kernel())):
        model = model.apply_event(Event(0, layer, 0, EventKind.LOAD, value=float(slot)))
        assert model.get_model_stats()["seeds_by_stage"]["LOADING"] == 1
        model = model.apply_event(Event(0, layer, 0, EventKind.ACTIVATE, value=0.5), kernel)
    assert set(model.kernels) == {5, 9}
    w, b = face.weights(at(model.host, "layers.0"))
    dense = dense_kernel().program.apply
    hidden = jnp.tanh((X @ w + b + dense(dense_kernel().params, X)) / 2)
    w, b = face.weights(at(model.host, "layers.1"))
    out = (hidden @ w + b + dense(dense_kernel(0, 5, 2).params, hidden)) / 2
    assert_close(face.over(model.module, X), out)
    assert set(model.unload_kernel("layers.1", 0).kernels) == {5}


@each_face
def test_statistics_and_comparison(face):
    model = grafted(face).fossilize("layers.0", 1)
    stats = model.get_model_stats()
    assert stats["seeds_by_stage"] == {
        "DORMANT": 6,
        "LOADING": 0,
        "ACTIVE": 1,
        "ERROR_RECOVERY": 0,
        "FOSSILIZED": 1,
    }
    counts = ("layers", "seeds", "host_parameters", "kernel_parameters")
    assert [stats[name] for name in counts] == [2, 8, 3 * 5 + 5 + 5 * 2 + 2, 2 * (3 * 5 + 5)]
    gap = np.abs(np.asarray(face.over(model.module, X)) - np.asarray(face.over(face.mlp(), X)))
    found = model.compare_with_original(X)
    assert_close(np.float32(found["max_abs"]), gap.max())
    assert_close(np.float32(found["mean_abs"]), gap.mean())
    assert face.wrap().compare_with_original(X) == {"max_abs": 0.0, "mean_abs": 0.0}
