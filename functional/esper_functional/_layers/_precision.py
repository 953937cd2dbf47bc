"""Half precision: what is drawn or summed in float32, and rounded once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def widened(dtype: Any) -> Any:
    """The dtype in which statistics of `dtype` are taken: float32, or wider where it is."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], bound: float, dtype: Any
) -> Float[Array, "..."]:
    """Uniform in ±bound; in half precision the float32 draw of the same key, rounded."""
    return jax.random.uniform(key, shape, widened(dtype), -bound, bound).astype(dtype)
