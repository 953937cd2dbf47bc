"""Larger hosts in both JAX frameworks: images, sequences, running statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_adapters.equinox import SeededModel
from esper_functional import Kernel, kernel_from_function

KEY = jax.random.key(0)


class Host(NamedTuple):
    """A host, the layers of it that may carry seeds, and how it is called."""

    module: Any
    types: tuple[type, ...]
    x: Any
    """A batch."""
    apply: Callable[[Any, Any], Any]
    """`apply(module, x)`: all that a call returns."""
    example: tuple[Any, ...] | None
    """For `wrap`."""


class EquinoxBlock(eqx.Module):
    """Token ids `[time]` to one vector per position."""

    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    linear: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(KEY, 3)
        self.embed = eqx.nn.Embedding(7, 6, key=keys[0])
        self.norm = eqx.nn.LayerNorm(6)
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[1])
        self.linear = eqx.nn.Linear(6, 6, key=keys[2])

    def __call__(self, ids: Any, *, key: Any = None) -> Any:
        x = jax.vmap(self.embed)(ids)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=jnp.tri(len(h), dtype=bool))
        return x + jax.vmap(self.linear)(jnp.tanh(x))


class FlaxBlock(nnx.Module):
    """Token ids `[batch, time]` to one vector per position."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        h = self.norm(x)
        x = x + self.attention(h, mask=nnx.make_causal_mask(ids))
        return x + self.linear(jnp.tanh(x))


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 4)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 2)), jnp.float32)
VECTORS = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)


def over(module: Any, x: Any) -> Any:
    return jax.vmap(module)(x)


def call(module: Any, x: Any) -> Any:
    return module(x)


def equinox_images() -> Host:
    keys = jax.random.split(KEY, 3)
    layers = [
        eqx.nn.Conv2d(2, 3, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(3, 2, 3, key=keys[1]),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(8, 2, key=keys[2]),
    ]
    types = (eqx.nn.Conv2d, eqx.nn.Linear)
    images = jnp.moveaxis(IMAGES, -1, 1)
    return Host(eqx.nn.Sequential(layers), types, images, over, (images[0],))


def flax_images() -> Host:
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Conv(2, 3, (3, 3), rngs=rngs),
        nnx.relu,
        nnx.Conv(3, 2, (3, 3), padding="VALID", rngs=rngs),
        lambda x: x.reshape(x.shape[0], -1),
        nnx.Linear(8, 2, rngs=rngs),
    ]
    types = (nnx.Conv, nnx.Linear)
    return Host(nnx.Sequential(*layers), types, IMAGES, call, (IMAGES,))


def equinox_sequence() -> Host:
    types = (eqx.nn.Embedding, eqx.nn.LayerNorm, eqx.nn.MultiheadAttention, eqx.nn.Linear)
    return Host(EquinoxBlock(), types, IDS, over, (IDS[0],))


def flax_sequence() -> Host:
    types = (nnx.Embed, nnx.LayerNorm, nnx.MultiHeadAttention, nnx.Linear)
    return Host(FlaxBlock(), types, IDS, call, (IDS,))


def equinox_statistics() -> Host:
    def make() -> Any:
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(3, 5, key=KEY),
                eqx.nn.BatchNorm(5, axis_name="batch", mode="batch"),
                eqx.nn.Dropout(0.5),
                eqx.nn.Linear(5, 2, key=KEY),
            ]
        )

    module, state = eqx.nn.make_with_state(make)()

    def apply(module: Any, x: Any) -> Any:
        # Equinox lets a state be used once.
        own = jax.tree.map(jnp.asarray, state)
        run = jax.vmap(
            lambda x, key: module(x, own, key=key), axis_name="batch", out_axes=(0, None)
        )
        return run(x, jax.random.split(KEY, len(x)))

    types = (eqx.nn.BatchNorm, eqx.nn.Dropout, eqx.nn.Linear)
    return Host(module, types, VECTORS, apply, None)


def flax_statistics() -> Host:
    rngs = nnx.Rngs(0, dropout=1)
    module = nnx.Sequential(
        nnx.Linear(3, 5, rngs=rngs),
        nnx.BatchNorm(5, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(5, 2, rngs=rngs),
    )
    types = (nnx.BatchNorm, nnx.Dropout, nnx.Linear)
    return Host(module, types, VECTORS, call, (VECTORS,))


HOSTS: dict[str, Callable[[], Host]] = {
    "equinox images": equinox_images,
    "equinox sequence": equinox_sequence,
    "equinox statistics": equinox_statistics,
    "flax images": flax_images,
    "flax sequence": flax_sequence,
    "flax statistics": flax_statistics,
}


def scaled(params: Any, x: Any) -> Any:
    """A learnt array for each example, by its mean; fits any layer."""
    mean = jnp.mean(x.reshape((len(x), -1)).astype(jnp.float32), axis=1)
    return (1 + mean.reshape((-1,) + (1,) * params["b"].ndim)) * params["b"]


def scaled_kernel(inputs: tuple[int, ...], outputs: tuple[int, ...], seed: int = 0) -> Kernel:
    """A kernel of one example's shapes."""
    b = np.random.default_rng([seed, *outputs]).normal(size=outputs)
    params = {"b": jnp.asarray(b, jnp.float32)}
    return kernel_from_function(scaled, params, example_rank=len(inputs))


def shapes_of_examples(name: str, model: SeededModel) -> dict[str, tuple[Any, Any]]:
    """What each layer of a wrapped host takes and returns for one example, by site."""
    if name == "equinox statistics":
        # Its state and its axis are not there in an example.
        return {site: (WIDTHS[site][:1], WIDTHS[site][1:]) for site in model.sites}
    batch = int(name.startswith("flax"))
    return {
        site: (known.inputs[batch:], known.outputs[batch:])
        for site, known in model.signatures.items()
    }


WIDTHS = {"layers.0": (3, 5), "layers.1": (5, 5), "layers.2": (5, 5), "layers.3": (5, 2)}
