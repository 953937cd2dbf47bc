"""What is Equinox's own: leaves, ties, keys, inference mode, states."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import FoldError, KasminaException, forward, forward_batch
from tests.adapters.faces import (
    EQUINOX,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    equinox_linear,
    trained,
)
from tests.adapters.hosts import HOSTS
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close


class Residual(eqx.Module):
    """A layer inside a list, one that is called twice, and a part without seeds."""

    inner: list[eqx.nn.Linear]
    norm: eqx.nn.LayerNorm
    gain: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        h = jnp.tanh(self.inner[0](x))
        h = h + self.inner[1](jax.nn.relu(self.inner[1](h)))
        return self.norm(h) * self.gain


def residual():
    inner = [equinox_linear(3, 5), equinox_linear(5, 5)]
    return Residual(inner, eqx.nn.LayerNorm(5), jnp.asarray(1.5), "residual")


def test_a_layer_that_is_called_twice_is_grafted_twice_and_fails_once():
    host, kernel = residual(), dense_kernel(0, 5, 5)
    model = EQUINOX.wrap(host).load_kernel("inner.1", 0, kernel, alpha=0.4)
    assert model.sites == ("inner.0", "inner.1")

    def by_hand(x):
        def second(x):
            own = host.inner[1]
            k = kernel.program.apply(kernel.params, x)
            return 0.6 * (own.weight @ x + own.bias) + 0.4 * k

        h = jnp.tanh(host.inner[0](x))
        return host.norm(h + second(jax.nn.relu(second(h)))) * host.gain

    assert_close(EQUINOX.over(model.module, X), EQUINOX.over(by_hand, X))
    nan = jax.tree.map(lambda p: p * jnp.nan, kernel)
    failing = EQUINOX.wrap(host).load_kernel("inner.1", 0, nan).observe(X)
    assert failing.seeds.error_count[1, 0] == 1
    flat = EQUINOX.api.to_functional(model)
    assert flat.combine(flat.params).name == "residual"


def test_surgery_keeps_the_very_leaves():
    host = residual()
    model = EQUINOX.wrap(host).load_kernel("inner.1", 2, dense_kernel(0, 5, 5))
    assert model.module.inner[0].weight is host.inner[0].weight
    assert model.module.inner[1].weight is host.inner[1].weight
    assert model.module.inner[1].esper_host.bias is host.inner[1].bias
    back = EQUINOX.api.unwrap(model.unload_kernel("inner.1", 2))
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(host), strict=True):
        assert ours is theirs


def tie_weights():
    """Two layers of one weight and two biases."""
    pair = (equinox_linear(3, 3), equinox_linear(3, 3))
    return eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)


def tie_layers():
    pair = (equinox_linear(3, 3), equinox_linear(3, 3))
    return eqx.nn.Shared(pair, lambda pair: pair[1], lambda pair: pair[0])


class Tied(eqx.Module):
    shared: eqx.nn.Shared
    out: eqx.nn.Linear

    def __call__(self, x):
        first, second = self.shared()
        return self.out(second(jnp.tanh(first(x))))


FIRST, SECOND = "shared.pytree.0", "shared.pytree.1"


@pytest.mark.parametrize("sites", [(FIRST,), (SECOND,), (FIRST, SECOND, "out")])
def test_weights_tied_by_shared_stay_tied(sites):
    host = Tied(tie_weights(), equinox_linear(3, 5))
    model = EQUINOX.wrap(host)
    assert model.sites == (FIRST, SECOND, "out")
    sizes = {FIRST: (3, 3), SECOND: (3, 3), "out": (3, 5)}
    for site in sites:
        model = model.load_kernel(site, 0, dense_kernel(0, *sizes[site]), alpha=0.4)

    def by_hand(x):
        def grafted(site, h, x):
            kernel = dense_kernel(0, *sizes[site])
            k = kernel.program.apply(kernel.params, x)
            return 0.6 * h + 0.4 * k if site in sites else h

        weight, (a, b) = host.shared.pytree[0].weight, host.shared.pytree
        h = jnp.tanh(grafted(FIRST, weight @ x + a.bias, x))
        h = grafted(SECOND, weight @ h + b.bias, h)
        return grafted("out", host.out(h), h)

    assert_close(EQUINOX.over(model.module, X), EQUINOX.over(by_hand, X))
    flat = EQUINOX.api.to_functional(model)
    y, _ = forward_batch(flat.net, model.plan, flat.params, model.live, X)
    assert_close(y, EQUINOX.over(by_hand, X))

    model = model.with_module(trained(EQUINOX, model.module))
    layers = model.module.shared()
    assert layers[0].weight is layers[1].weight
    for site in sites:
        model = model.unload_kernel(site, 0)
    back = EQUINOX.api.unwrap(model)
    assert jax.tree.structure(back) == jax.tree.structure(host)
    assert len(arrays(back)) == len(arrays(host)) == 5
    first, second = back.shared()
    assert first.weight is second.weight
    assert (np.asarray(first.weight) != np.asarray(host.shared.pytree[0].weight)).any()


def test_a_layer_tied_as_a_whole_is_one_site_in_both_places():
    host = Tied(tie_layers(), equinox_linear(3, 2))
    model = EQUINOX.wrap(host)
    assert model.sites == (FIRST, "out")
    kernel = dense_kernel(0, 3, 3)
    model = model.load_kernel(FIRST, 0, kernel, alpha=0.4)

    def grafted(x):
        own = host.shared.pytree[0]
        return 0.6 * (own.weight @ x + own.bias) + 0.4 * kernel.program.apply(kernel.params, x)

    expected = EQUINOX.over(lambda x: host.out(grafted(jnp.tanh(grafted(x)))), X)
    assert_close(EQUINOX.over(model.module, X), expected)
    first, second = model.module.shared()
    assert first.esper_kernels[0]["w"] is second.esper_kernels[0]["w"]


def test_what_would_break_a_tie_is_refused():
    host = Tied(tie_weights(), equinox_linear(3, 2))
    model = EQUINOX.wrap(host, example=(X[0],))
    affine = model.load_kernel(FIRST, 0, affine_kernel(0, 3, 3))
    with pytest.raises(FoldError, match="'shared.pytree.0' shares its weights with another layer"):
        affine.fold(FIRST, 0)
    for site in (FIRST, SECOND):
        grown = model.load_kernel(site, 0, dense_kernel(0, 3, 3))
        with pytest.raises(KasminaException, match=f"{site!r} is tied to others by eqx.nn.Shared"):
            EQUINOX.api.export_plain(grown)
    folded = model.load_kernel("out", 0, affine_kernel(0, 3, 2)).fold("out", 0)
    assert folded.plan.dormant


def dropout():
    layers = [equinox_linear(3, 5), eqx.nn.Dropout(0.5), equinox_linear(5, 2)]
    model = EQUINOX.wrap(eqx.nn.Sequential(layers), target_layers=[eqx.nn.Dropout, eqx.nn.Linear])
    return model.load_kernel("layers.1", 0, dense_kernel(0, 5, 5), alpha=0.4)


def test_keys_reach_the_host_through_the_graft():
    model, key = dropout(), jax.random.key(3)
    kernel, (first, drop, last) = dense_kernel(0, 5, 5), model.host.layers
    own = jax.random.split(key, 3)[1]
    h = first(X[0])
    y = last(0.6 * drop(h, key=own) + 0.4 * kernel.program.apply(kernel.params, h))
    assert_close(model.module(X[0], key=key), y)
    assert (np.asarray(model.module(X[0], key=jax.random.key(4))) != np.asarray(y)).any()
    with pytest.raises(RuntimeError, match="requires a key"):
        model.module(X[0])


def test_inference_mode_reaches_the_host_through_the_graft_and_stays():
    model = dropout()
    inference = eqx.nn.inference_mode(model.module)
    assert_bitwise(inference(X[0]), inference(X[0], key=jax.random.key(3)))
    after = model.with_module(inference).unload_kernel("layers.1", 0)
    assert EQUINOX.api.unwrap(after).layers[1].inference
    again = eqx.nn.inference_mode(inference, value=False)
    assert not again.layers[1].esper_host.inference


def test_a_batch_norm_with_a_state_is_a_site():
    host, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(
            [equinox_linear(3, 5), eqx.nn.BatchNorm(5, "batch", mode="batch"), equinox_linear(5, 2)]
        )
    )()
    model = EQUINOX.wrap(host, target_layers=[eqx.nn.BatchNorm, eqx.nn.Linear])
    assert model.sites == ("layers.0", "layers.1", "layers.2")
    kernel = dense_kernel(0, 5, 5)
    model = model.load_kernel("layers.1", 0, kernel, alpha=0.4)

    def over(call):
        own = jax.tree.map(jnp.asarray, state)
        return jax.vmap(lambda x: call(x, own), axis_name="batch", out_axes=(0, None))(X)

    def by_hand(x, state):
        first, norm, last = host.layers
        x = first(x)
        h, state = norm(x, state)
        return last(0.6 * h + 0.4 * kernel.program.apply(kernel.params, x)), state

    y, after = over(model.module)
    expected, expected_after = over(by_hand)
    assert_close(y, expected)
    assert_bitwise(jax.tree.leaves(after), jax.tree.leaves(expected_after))
    flat = EQUINOX.api.to_functional(model)
    y, after = over(
        lambda x, own: forward(flat.net, model.plan, flat.params, model.live, (x, own))[0]
    )
    assert_close(y, expected)
    assert_tree_close(jax.tree.leaves(after), jax.tree.leaves(expected_after))


def test_a_graft_hides_no_attribute_of_its_layer():
    class Weighted(eqx.Module):
        weights: jax.Array
        errors: jax.Array
        name: str
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer(x) * self.weights + self.errors

    class Host(eqx.Module):
        part: Weighted

        def __call__(self, x):
            return self.part(x) + self.part.weights + self.part.errors + self.part.layer(x)

    part = Weighted(jnp.arange(3.0), jnp.ones(3), "part", equinox_linear(3, 3))
    model = EQUINOX.wrap(Host(part), target_layers=["part"])
    kernel = dense_kernel(0, 3, 3)
    model = model.load_kernel("part", 0, kernel, alpha=0.4)
    own = at(model.module, "part")
    assert own.weights is part.weights
    assert own.errors is part.errors
    assert own.name == "part"

    def by_hand(x):
        h = 0.6 * part(x) + 0.4 * kernel.program.apply(kernel.params, x)
        return h + part.weights + part.errors + part.layer(x)

    assert_close(EQUINOX.over(model.module, X), EQUINOX.over(by_hand, X))
    flat = EQUINOX.api.to_functional(model)
    y, _ = forward_batch(flat.net, model.plan, flat.params, model.live, X)
    assert_close(y, EQUINOX.over(by_hand, X))


def test_equinoxs_own_surgery_and_files_work_on_a_grafted_module():
    model = EQUINOX.wrap().load_kernel("layers.0", 0, dense_kernel())
    zeroed = eqx.tree_at(lambda m: m.layers[0].weight, model.module, jnp.zeros((5, 3)))
    assert not np.asarray(model.with_module(zeroed).host.layers[0].weight).any()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model.module)
    file.seek(0)
    blank = jax.tree.map(jnp.zeros_like, model.module)
    loaded = eqx.tree_deserialise_leaves(file, blank)
    assert_bitwise(EQUINOX.over(loaded, X), EQUINOX.over(model.module, X))


def test_a_host_in_bfloat16_stays_in_bfloat16():
    model = EQUINOX.wrap(EQUINOX.mlp(dtype=jnp.bfloat16))
    model = model.load_kernel("layers.0", 0, dense_kernel(dtype=jnp.bfloat16), alpha=0.4)
    x = X.astype(jnp.bfloat16)
    y = EQUINOX.over(model.module, x)
    assert y.dtype == jnp.bfloat16
    kernel = dense_kernel(dtype=jnp.bfloat16)
    first, last = model.host.layers
    k = kernel.program.apply(kernel.params, x)
    h = jnp.tanh(0.6 * jax.vmap(first)(x) + 0.4 * k)
    assert_close(y, jax.vmap(last)(h))
    moved = trained(EQUINOX, model.module, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(EQUINOX.split(moved)[0])} == {"bfloat16"}


def test_sequences_are_mapped_within_and_a_batch_without():
    host = HOSTS["equinox sequence"]()
    model = EQUINOX.wrap(host.module).load_kernel("linear", 0, dense_kernel(0, 6, 6), alpha=0.4)
    y = host.apply(model.module, host.x)
    assert_close(y, jnp.stack([model.module(ids) for ids in host.x]))
