"""Host layers beside their torch twins, and a table of them for laws that all obey."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import torch

import esper_functional as ef
from tests.tolerance import assert_close


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def assert_parity(
    ours: Callable[..., Any], theirs: Callable[..., Any], arrays: dict[str, np.ndarray], seed: int
) -> None:
    """Equal outputs, and equal gradients of every array for a random cotangent."""
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}
    expected = theirs(**tensors)
    cotangent = draw(seed, *expected.shape)
    expected.backward(torch.tensor(cotangent))

    def both(arrays: Any, cotangent: Any) -> Any:
        y, pull_back = jax.vjp(lambda own: ours(**own), arrays)
        return y, pull_back(cotangent)[0]

    y, gradients = jax.jit(both)(arrays, cotangent)
    assert_close(y, expected.detach())
    for name, tensor in tensors.items():
        assert_close(gradients[name], tensor.grad)


@contextmanager
def unhooked() -> Iterator[None]:
    """Without the tests' own check of annotations, which would refuse bad input first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def with_gradients(apply: Any, params: Any, x: Any, cotangent: Any) -> Any:
    """The output, and the gradients of parameters and input."""
    y, pull_back = jax.vjp(apply, params, x)
    return y, *pull_back(cotangent)


# Compiled once for each layer and shape: operation by operation takes far longer.
jitted = jax.jit(with_gradients, static_argnums=0)


class Case(NamedTuple):
    """A layer with its options, and how to make what it takes."""

    init: Callable[..., Any]
    """Of a key and a dtype."""
    apply: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    """Of one example; for batch_norm of one batch."""
    batched: bool = True
    """Whether leading axes are examples."""


def _conv(options: dict[str, Any], **init: Any) -> Case:
    groups = options.get("groups", 1)
    return Case(
        lambda key, dtype: ef.init_conv2d(key, 4, 6, (3, 2), groups=groups, dtype=dtype, **init),
        lambda params, x: ef.conv2d(params, x, **options),
        (4, 6, 5),
    )


def _attention(**options: Any) -> Case:
    return Case(
        lambda key, dtype: ef.init_attention(key, 8, 2, dtype=dtype),
        lambda params, x: ef.attention(params, x, num_heads=2, **options),
        (5, 8),
    )


def _norm(shape: Any) -> Case:
    def init(key: Any, dtype: Any) -> Any:
        params = ef.init_layer_norm(shape, dtype=dtype)
        return jax.tree.map(lambda p: p + jax.random.uniform(key, p.shape, dtype), params)

    return Case(init, ef.layer_norm, (3, 4))


def _batch_norm(train: bool) -> Case:
    def init(key: Any, dtype: Any) -> Any:
        params, _ = ef.init_batch_norm(3, dtype=dtype)
        return jax.tree.map(lambda p: p + jax.random.uniform(key, p.shape, dtype), params)

    def apply(params: Any, x: Any) -> Any:
        stats = ef.BatchStats(
            jnp.array([0.1, 0.2, 0.3]), jnp.array([0.5, 1.0, 2.0]), jnp.array(3, jnp.int32)
        )
        return ef.batch_norm(params, x, stats, train=train)[0]

    return Case(init, apply, (6, 3, 4), batched=False)


HALF_MASK = np.arange(25).reshape(5, 5) % 3 > 0

CASES: dict[str, Case] = {
    "linear": Case(lambda key, dtype: ef.init_linear(key, 4, 3, dtype=dtype), ef.linear, (4,)),
    "conv2d": _conv({"stride": 2, "padding": (1, 2), "dilation": (2, 1)}),
    "conv2d, reflected": _conv({"padding": 1, "padding_mode": "reflect", "groups": 2}, bias=False),
    "attention, masked": _attention(mask=HALF_MASK, causal=True),
    "attention, dropout": _attention(dropout=0.25, dropout_key=jax.random.key(5)),
    "layer_norm": _norm(4),
    "layer_norm, two axes": _norm((3, 4)),
    "batch_norm, training": _batch_norm(True),
    "batch_norm, evaluation": _batch_norm(False),
}


def made(name: str, *lead: int) -> tuple[Case, Any, jax.Array, jax.Array]:
    """A case, its parameters, its input with leading axes, and a cotangent."""
    case = CASES[name]
    params = case.init(jax.random.key(1), jnp.float32)
    x = jnp.asarray(draw(2, *lead, *case.shape))
    return case, params, x, jnp.asarray(draw(3, *jax.eval_shape(case.apply, params, x).shape))
