"""How far a step is from what its device can do.

The roofline of S. Williams, A. Waterman and D. Patterson, 2009: a step is bound by
arithmetic or by memory, whichever of the two takes it nearer to the device's peak.
The peaks are measured here, on one large matrix product and one large copy.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._results import Figure


def best_seconds(function: Callable[..., Any], *args: Any, tries: int) -> float:
    """The least time of a compiled call, to its end."""
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return best


def peak_flops(size: int, tries: int) -> float:
    """FLOP/s of a product of two float32 matrices, at jax's default precision."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    return 2 * size**3 / best_seconds(jax.jit(jnp.matmul), a, a, tries=tries)


def peak_bytes(megabytes: int, tries: int) -> float:
    """Bytes/s that a copy reads and writes."""
    a = jnp.zeros(megabytes * 2**20 // 4, jnp.float32)
    return 2 * a.nbytes / best_seconds(jax.jit(lambda a: a + 1.0), a, tries=tries)


def measure_roofline(
    work: tuple[Callable[..., Any], tuple[Any, ...]],
    device: str,
    *,
    size: int = 8192,
    megabytes: int = 1024,
    tries: int = 10,
) -> list[Figure]:
    """What a step achieves of the peaks; FLOPs and bytes are those that XLA counts.

    Args:
        work: a function and its arguments.
        device: for the names.
        size, megabytes: of the matrices and the copy that give the peaks.
        tries: of which the best counts.
    """
    function, args = work
    compiled = jax.jit(function).lower(*args).compile()
    cost: Any = compiled.cost_analysis()
    seconds = best_seconds(compiled, *args, tries=tries)
    flops, moved = float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0))
    most_flops, most_bytes = peak_flops(size, tries), peak_bytes(megabytes, tries)
    title = f"{device}, widest training step"
    return [
        Figure(f"{title}: time", seconds * 1e6, "µs"),
        Figure(f"{title}: achieved", flops / seconds / 1e12, "TFLOP/s"),
        Figure(f"{title}: of the matrix peak", 100 * flops / seconds / most_flops, "%"),
        Figure(f"{title}: moved", moved / seconds / 1e9, "GB/s"),
        Figure(f"{title}: of the copy peak", 100 * moved / seconds / most_bytes, "%"),
        Figure(f"{device}: matrix peak, measured", most_flops / 1e12, "TFLOP/s"),
        Figure(f"{device}: copy peak, measured", most_bytes / 1e9, "GB/s"),
    ]
