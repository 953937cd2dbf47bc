"""Sites of every kind: sites within sites, images, sequences, running statistics."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import kernel_from_function
from tests.adapters.faces import EQUINOX, FACES, FLAX, at, dense_kernel, layer_weights
from tests.adapters.hosts import HOSTS, scaled_kernel, shapes_of_examples
from tests.tolerance import assert_close, assert_tree_close


def mixing(params, x):
    """A kernel of sequences `[batch, time, features]`."""
    return jnp.tanh(x - jnp.mean(x, 1, keepdims=True)) @ params["w"]


def split_heads(params, x):
    y = jnp.tanh(x @ params["w"])
    return y.reshape((*y.shape[:-1], 2, 3))


W = jnp.asarray(layer_weights(6, 6)[0])
MIXING = kernel_from_function(mixing, {"w": W}, example_rank=2)


class EquinoxByHand(eqx.Module):
    layer: Any
    kernel: Any
    rank: int = eqx.field(static=True)

    def __call__(self, x, *args, **options):
        flat = x.reshape((-1, *x.shape[x.ndim - self.rank :]))
        k = self.kernel(flat)
        h = self.layer(x, *args, **options)
        return 0.7 * h + 0.3 * k.reshape(h.shape)


class FlaxByHand(nnx.Module):
    def __init__(self, layer, kernel):
        self.layer, self.kernel = layer, kernel

    def __call__(self, x, *args, **options):
        return 0.7 * self.layer(x, *args, **options) + 0.3 * self.kernel(x)


def test_sites_within_sites_of_equinox():
    host = HOSTS["equinox sequence"]()
    sites = ["attention", "attention.query_proj", "norm", "linear"]
    model = EQUINOX.wrap(host.module, target_layers=sites)
    assert model.sites == ("norm", "attention", "attention.query_proj", "linear")
    pointwise = dense_kernel(0, 6, 6)
    for site in sites:
        kernel = MIXING if site == "attention" else pointwise
        model = model.load_kernel(site, 0, kernel, alpha=0.3)

    def hand(module, site):
        kernel, rank = (MIXING, 2) if site == "attention" else (pointwise, 1)
        call = partial(kernel.program.apply, kernel.params)
        return eqx.tree_at(
            lambda m: at(m, site), module, EquinoxByHand(at(module, site), call, rank)
        )

    expected = host.module
    for site in ("attention.query_proj", "attention", "norm", "linear"):
        expected = hand(expected, site)
    y = host.apply(model.module, host.x)
    assert_close(y, host.apply(expected, host.x))
    assert not np.allclose(y, host.apply(host.module, host.x))
    layers = model.kasmina_layers
    assert layers["attention.query_proj"] is layers["attention"].query_proj


def test_sites_within_sites_of_flax():
    host = HOSTS["flax sequence"]()
    sites = ["attention", "attention.query", "norm", "linear"]
    model = FLAX.wrap(host.module, target_layers=sites)
    assert model.sites == ("attention", "attention.query", "linear", "norm")
    kernels = {
        "attention": MIXING,
        "attention.query": kernel_from_function(split_heads, {"w": W}),
        "norm": dense_kernel(0, 6, 6),
        "linear": dense_kernel(1, 6, 6),
    }
    for site, kernel in kernels.items():
        model = model.load_kernel(site, 0, kernel, alpha=0.3)
    expected = nnx.clone(host.module)
    for site in ("attention.query", "attention", "norm", "linear"):
        *path, name = site.split(".")
        parent = at(expected, ".".join(path)) if path else expected
        call = partial(kernels[site].program.apply, kernels[site].params)
        setattr(parent, name, FlaxByHand(getattr(parent, name), call))
    y = host.apply(model.module, host.x)
    assert_close(y, host.apply(expected, host.x))
    assert not np.allclose(y, host.apply(host.module, host.x))
    layers = model.kasmina_layers
    assert layers["attention.query"] is layers["attention"].query


@pytest.mark.parametrize("name", HOSTS)
def test_every_kind_of_layer_takes_kernels_and_gives_them_gradients(name):
    host, face = HOSTS[name](), FACES[name.split()[0]]
    model = face.wrap(host.module, target_layers=host.types, blend="residual", example=host.example)
    shapes = shapes_of_examples(name, model)
    assert set(shapes) == set(model.sites)
    for site in model.sites:
        model = model.load_kernel(site, 1, scaled_kernel(*shapes[site]), alpha=0.5)
    params, rebuild = face.split(model.module)

    def total(params):
        y = host.apply(rebuild(params), host.x)
        return jnp.sum((y[0] if isinstance(y, tuple) else y) ** 2)

    grads = rebuild(jax.jit(jax.grad(total))(params))
    found = model.surgery.grafted(grads)
    for site in model.sites:
        (own,) = face.kernels(found[site]).values()
        assert np.asarray(own["b"]).any()
    for site in model.sites:
        model = model.unload_kernel(site, 1)
    before = host.apply(face.wrap(host.module, target_layers=host.types).module, host.x)
    assert_tree_close(host.apply(model.module, host.x), before)
