"""First parameters, drawn by numpy so that both backends begin alike."""

import math

import numpy as np


def draw_layer(
    random: np.random.Generator, name: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Weight `[out, in, *window]` and bias `[out]`, uniform in ±1/√fan-in, f32."""
    bound = math.prod(shape[1:]) ** -0.5
    return {
        f"{name}.{role}": random.uniform(-bound, bound, own).astype(np.float32)
        for role, own in (("weight", shape), ("bias", shape[:1]))
    }


def draw_norm(name: str, width: int) -> dict[str, np.ndarray]:
    """Scale `[width]` of 1 and shift of 0, f32."""
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }
