"""Drawn shapes, with noise."""

import numpy as np

from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._conv_host import ConvHost
from esper.tolaria.tasks._task import Task

SHAPES = ("disc", "square", "triangle", "cross", "ring", "frame")
"""What is drawn, by class."""
_SIZE = 16
_NOISE = 0.2
"""Standard deviation of the noise; a shape's brightness is 0.6 to 1."""


def _distance(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far a place is outside of a shape of radius 1, negative inside."""
    round_, square = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    if kind == 0:
        return round_ - 1
    if kind == 1:
        return square - 0.85
    if kind == 2:
        return np.maximum(v - 0.7, 0.87 * np.abs(u) - 0.5 * v - 0.55)
    if kind == 3:
        return np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.28, square - 1)
    if kind == 4:
        return np.abs(round_ - 0.72) - 0.28
    return np.abs(square - 0.62) - 0.24


def _draw(random: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Images `[n, 1, 16, 16]` of the classes `y`."""
    n = len(y)
    radius = random.uniform(4.0, 6.5, n)
    centre = random.uniform(-1.0, 1.0, (2, n)) * (_SIZE / 2 - 1 - radius)
    angle = random.uniform(-0.3, 0.3, n)
    bright = random.uniform(0.6, 1.0, n)
    axis = np.arange(_SIZE) - (_SIZE - 1) / 2
    down, across = (
        grid[None] - centre[i][:, None, None]
        for i, grid in enumerate(np.meshgrid(axis, axis, indexing="ij"))
    )
    c, s = (f(angle)[:, None, None] / radius[:, None, None] for f in (np.cos, np.sin))
    u, v = c * across + s * down, c * down - s * across
    gap = np.stack([_distance(int(kind), u[i], v[i]) for i, kind in enumerate(y)])
    # One pixel wide at the edge, as if pixels were areas.
    cover = np.clip(0.5 - gap * radius[:, None, None], 0.0, 1.0)
    image = bright[:, None, None] * cover + random.normal(0.0, _NOISE, cover.shape)
    return image[:, None].astype(np.float32)


def shapes() -> Task:
    """3,000 drawings of six shapes, made here: 1,800, 600 and 600.

    A disc, a square, a triangle, a cross, a ring or a frame, of any place, size, tilt and
    brightness, under normal noise; as many of each class in each part. Every drawing is an
    independent draw, so none is in two parts. Examples `[1, 16, 16]`, 6 classes.
    """
    random = np.random.default_rng(20_262)
    parts = {}
    for part, count in (("train", 1_800), ("validation", 600), ("test", 600)):
        y = random.permutation(np.arange(count, dtype=np.int32) % len(SHAPES))
        parts[part] = (_draw(random, y), y)
    host = ConvHost(channels=1, size=_SIZE, widths=(2, 2), classes=len(SHAPES))
    return make_task("shapes", **parts, host=host)
