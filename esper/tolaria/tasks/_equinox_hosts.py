"""The hosts as Equinox modules of one example."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


def filled(build: Callable[[Any], Any], params: Mapping[str, np.ndarray]) -> Any:
    """The module that `build(key)` describes, holding `params`.

    The key is only traced, so nothing is drawn and nothing is compiled.
    """
    left = dict(params)

    def fill(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        value = left.pop(jax.tree_util.keystr(path, simple=True, separator="."))
        # Equinox's convolutions keep a bias as [out, 1, 1].
        return jnp.asarray(value.reshape(leaf.shape), leaf.dtype)

    # The type of a key, made without running anything.
    key = jax.eval_shape(lambda: jax.random.key(0))
    module = jax.tree_util.tree_map_with_path(fill, eqx.filter_eval_shape(build, key))
    assert not left, f"no place for {sorted(left)}"
    return module


class MLP(eqx.Module):
    """Linear layers with ReLU between them."""

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, sizes: Sequence[int], key: PRNGKeyArray) -> None:
        self.layers = tuple(eqx.nn.Linear(a, b, key=key) for a, b in pairwise(sizes))

    def __call__(
        self, x: Float[Array, " features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " outputs"]:
        """One vector."""
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


class ConvBlock(eqx.Module):
    """A convolution, a group norm, ReLU."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm

    def __init__(self, before: int, width: int, groups: int, key: PRNGKeyArray) -> None:
        self.conv = eqx.nn.Conv2d(before, width, 3, padding=1, key=key)
        self.norm = eqx.nn.GroupNorm(groups, width)

    def __call__(
        self, x: Float[Array, "channels height width"]
    ) -> Float[Array, "features height width"]:
        """One image."""
        return jax.nn.relu(self.norm(self.conv(x)))


class ConvNet(eqx.Module):
    """Blocks with 2×2 means between them, the mean over places, and a linear layer."""

    blocks: tuple[ConvBlock, ...]
    head: eqx.nn.Linear

    def __init__(self, sizes: Sequence[int], classes: int, groups: int, key: PRNGKeyArray) -> None:
        self.blocks = tuple(ConvBlock(a, b, groups, key) for a, b in pairwise(sizes))
        self.head = eqx.nn.Linear(sizes[-1], classes, key=key)

    def __call__(
        self, x: Float[Array, "channels height width"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " classes"]:
        """One image."""
        for i, block in enumerate(self.blocks):
            if i:
                channels, height, width = x.shape
                x = x.reshape(channels, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class TextNet(eqx.Module):
    """An embedding, a causal convolution, and an MLP at every position."""

    embed: eqx.nn.Embedding
    mix: eqx.nn.Conv1d
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        window: int,
        channels: int,
        hidden: int,
        key: PRNGKeyArray,
    ) -> None:
        self.embed = eqx.nn.Embedding(vocabulary, embedding, key=key)
        # Zeros before the text and none after it: a position sees no later one.
        past = ((window - 1, 0),)
        self.mix = eqx.nn.Conv1d(embedding, channels, window, padding=past, key=key)
        self.hidden = eqx.nn.Linear(channels, hidden, key=key)
        self.head = eqx.nn.Linear(hidden, vocabulary, key=key)

    def __call__(
        self, tokens: Int[Array, " time"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "time vocabulary"]:
        """One text."""
        vectors = jax.vmap(self.embed)(tokens)
        x = jax.nn.relu(jax.vmap(self.hidden)(self.mix(vectors.T).T))
        return jax.vmap(self.head)(x)
