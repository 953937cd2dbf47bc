"""The learning rate of every step, as a table: both backends take the same numbers."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Literal["constant", "cosine", "linear"]


def rate_table(schedule: Schedule, peak: float, *, steps: int, warmup: int = 0) -> np.ndarray:
    """The learning rates `[steps]` f32 of a run.

    Rises linearly from peak / warmup to `peak` in `warmup` steps; then stays (`constant`), or falls
    to 0 at the run's end along half a cosine (Loshchilov and Hutter, 2017) or a line.
    """
    rest = max(1, steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[schedule]
    at = np.maximum(np.arange(steps, dtype=np.int32) - warmup, 0)
    # optax divides steps, which are integers: strict promotion forbids that.
    with jax.numpy_dtype_promotion("standard"):
        rates = np.asarray(after(jnp.asarray(at)), np.float32)
    falling = np.broadcast_to(rates, (steps,))
    if not warmup:
        return np.array(falling)
    rising = np.float32(peak) * (np.arange(steps, dtype=np.float32) + 1) / np.float32(warmup)
    return np.where(np.arange(steps) < warmup, rising, falling).astype(np.float32)
