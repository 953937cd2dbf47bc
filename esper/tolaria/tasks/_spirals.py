"""Two spirals."""

import numpy as np

from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._mlp_host import MLPHost
from esper.tolaria.tasks._task import Task


def _spiral(count: int, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """`count` points on each arm, starting `offset` of a point's distance further in."""
    i = np.arange(count) + offset
    angle, radius = i / 16 * np.pi, (104 - i) / 104
    arm = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    x = np.concatenate([arm, -arm]).astype(np.float32)
    return x, np.repeat(np.arange(2, dtype=np.int32), count)


def spirals() -> Task:
    """The two spirals of 194 points (Lang and Witbrock, 1988), scaled to the unit disc.

    Validation and test points, 192 each, lie on the same arms, a third and two thirds of
    the way between training points. Examples `[2]`, 2 classes.
    """
    return make_task(
        "spirals",
        train=_spiral(97, 0.0),
        validation=_spiral(96, 1 / 3),
        test=_spiral(96, 2 / 3),
        host=MLPHost((2, 8, 2)),
    )
