"""A small transformer of many blocks, each of whose layers is a site."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    Network,
    attention,
    init_attention,
    init_layer_norm,
    init_linear,
    layer_norm,
    linear,
)

WIDTH, HEADS, TIME, BATCH = 16, 2, 4, 2
LAYERS = ("attention_norm", "attention", "mlp_norm", "up", "down")


def transformer_sites(blocks: int) -> tuple[str, ...]:
    return tuple(f"{i}.{layer}" for i in range(blocks) for layer in LAYERS)


def init_transformer(seed: int, blocks: int) -> list[Any]:
    """Parameters of each block."""
    params: list[Any] = []
    for key in jax.random.split(jax.random.key(seed), blocks):
        keys = jax.random.split(key, 3)
        params.append(
            {
                "attention_norm": init_layer_norm(WIDTH),
                "attention": init_attention(keys[0], WIDTH, HEADS),
                "mlp_norm": init_layer_norm(WIDTH),
                "up": init_linear(keys[1], WIDTH, 4 * WIDTH),
                "down": init_linear(keys[2], 4 * WIDTH, WIDTH),
            }
        )
    return params


def transformer(blocks: int) -> Network:
    """Causal, with the normalisation before each part; `[batch, time, width]` to the same."""

    def net(params: Any, site: Any, x: Any) -> Any:
        for i in range(blocks):
            own = params[i]
            normed = site(f"{i}.attention_norm", layer_norm, own["attention_norm"], x)
            x = x + site(
                f"{i}.attention",
                attention,
                own["attention"],
                normed,
                num_heads=HEADS,
                causal=True,
            )
            normed = site(f"{i}.mlp_norm", layer_norm, own["mlp_norm"], x)
            wide = jax.nn.gelu(site(f"{i}.up", linear, own["up"], normed))
            x = x + site(f"{i}.down", linear, own["down"], wide)
        return x

    return net


def sequences(seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(BATCH, TIME, WIDTH)), jnp.float32)
