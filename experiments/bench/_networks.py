"""The networks and kernels that are measured."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Network,
    SeedState,
    Site,
    attention,
    fold_events,
    init_attention,
    init_layer_norm,
    init_linear,
    init_seeds,
    kernel_from_function,
    layer_norm,
    linear,
)


class Host(NamedTuple):
    """A network that can grow."""

    net: Network
    sites: tuple[str, ...]
    params: Any


# ---- kernels ----


def low_rank(params: Any, x: Any) -> Any:
    """x·A·B."""
    return x @ params["a"] @ params["b"]


def init_low_rank(key: Any, width: int, rank: int) -> Any:
    """A and B of unit gain."""
    a, b = jax.random.split(key)
    return {
        "a": jax.random.normal(a, (width, rank)) * width**-0.5,
        "b": jax.random.normal(b, (rank, width)) * rank**-0.5,
    }


def residual_mlp(params: Any, x: Any) -> Any:
    """An MLP with one hidden layer as wide as x, added to x."""
    h = jax.nn.gelu(x @ params["up"] + params["up_bias"])
    return x + h @ params["down"] + params["down_bias"]


def init_residual_mlp(key: Any, width: int, rank: int) -> Any:
    """Matrices of unit gain, biases 0; `rank` is for others."""
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (width, width)) * width**-0.5,
        "up_bias": jnp.zeros(width),
        "down": jax.random.normal(down, (width, width)) * width**-0.5,
        "down_bias": jnp.zeros(width),
    }


KERNELS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, int, int], Any]]] = {
    "low rank": (low_rank, init_low_rank),
    "residual MLP": (residual_mlp, init_residual_mlp),
}


def make_kernels(kind: str, count: int, width: int, rank: int, seed: int) -> dict[int, Kernel]:
    """Kernels of one program, by slot."""
    apply, init = KERNELS[kind]
    keys = jax.random.split(jax.random.key(seed), count)
    return {i: kernel_from_function(apply, init(key, width, rank)) for i, key in enumerate(keys)}


def grafted(layers: int, seeds: int, places: Sequence[tuple[int, int]], alpha: float) -> SeedState:
    """A state with a kernel at work in each of some (layer, seed), in the slots 0, 1, ..."""
    events: list[Event] = []
    for slot, (layer, seed) in enumerate(places):
        events.append(Event(0, layer, seed, EventKind.LOAD, value=float(slot)))
        events.append(Event(0, layer, seed, EventKind.ACTIVATE, value=alpha))
    return fold_events(init_seeds(layers, seeds), events)


# ---- hosts ----


def make_stack(depth: int, width: int, seed: int) -> Host:
    """Linear layers with ReLU between them; every layer is a site."""
    names = tuple(f"layer {i}" for i in range(depth))
    keys = jax.random.split(jax.random.key(seed), depth)
    params = [init_linear(key, width, width) for key in keys]

    def net(params: Any, site: Site, x: Any) -> Any:
        for name, own in zip(names[:-1], params[:-1], strict=True):
            x = jax.nn.relu(site(name, linear, own, x))
        return site(names[-1], linear, params[-1], x)

    return Host(net, names, params)


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """A transformer encoder without embeddings."""

    blocks: int = 12
    features: int = 64
    heads: int = 4
    hidden: int = 256
    length: int = 16
    batch: int = 8

    def __str__(self) -> str:
        """As rows name it."""
        return f"transformer {self.blocks} × {self.features}, T {self.length} batch {self.batch}"


PARTS = ("norm 1", "attention", "norm 2", "feed-forward")
"""The sites of a block."""


def feed_forward(params: Any, x: Any) -> Any:
    """Two linear layers with GELU between them, as one layer."""
    return linear(params["down"], jax.nn.gelu(linear(params["up"], x)))


def make_transformer(shape: TransformerShape, seed: int) -> Host:
    """Pre-norm blocks of attention and feed-forward; four sites each."""
    names = tuple(f"block {i} {part}" for i in range(shape.blocks) for part in PARTS)

    def init_block(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        return {
            "norm 1": init_layer_norm(shape.features),
            "attention": init_attention(keys[0], shape.features, shape.heads),
            "norm 2": init_layer_norm(shape.features),
            "feed-forward": {
                "up": init_linear(keys[1], shape.features, shape.hidden),
                "down": init_linear(keys[2], shape.hidden, shape.features),
            },
        }

    def net(params: Any, site: Site, x: Any) -> Any:
        for i, own in enumerate(params):
            norm_1, attend, norm_2, feed = (f"block {i} {part}" for part in PARTS)
            h = site(norm_1, layer_norm, own["norm 1"], x)
            x = x + site(attend, attention, own["attention"], h, num_heads=shape.heads)
            h = site(norm_2, layer_norm, own["norm 2"], x)
            x = x + site(feed, feed_forward, own["feed-forward"], h)
        return x

    keys = jax.random.split(jax.random.key(seed), shape.blocks)
    return Host(net, names, [init_block(key) for key in keys])


def feed_forward_rows(shape: TransformerShape, count: int) -> list[int]:
    """Rows of the feed-forward sites of `count` blocks, evenly spread."""
    blocks = [i * shape.blocks // count for i in range(count)]
    return [block * len(PARTS) + PARTS.index("feed-forward") for block in blocks]
