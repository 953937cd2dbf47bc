"""The gym's families as tasks of a run: what a policy was trained in, or never saw."""

import difflib

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._mlp_host import MLPHost
from esper.tolaria.tasks._task import Task

PARTS = {"train": 512, "validation": 256, "test": 512}
"""Examples; as many to train on and to judge by as in the gym."""


DRAWN_BY_SEED = "?draw=seed"
"""Behind the name of a task in a comparison: each seed draws data and host of its own."""


def task_of_seed(name: str, seed: int) -> str:
    """The task that a comparison's name stands for with one of its seeds."""
    base = name.removesuffix(DRAWN_BY_SEED)
    if base == name:
        return name
    return f"{base}?draw={seed}" if seed else base


def gym(family: str, draw: int = 0) -> Task:
    """`gym:FAMILY`, or `gym:FAMILY?draw=N`: data and a host's shape as the gym draws them.

    Depth and width of the host are the gym's, 1 or 2 hidden layers of 2 to 8 units, and each hidden
    layer may grow. Examples `[2]`, `[4]` or `[6]`, 2 classes.

    Args:
        family: of `esper.tamiyo.gym.FAMILIES`.
        draw: which data and which host, from 0.

    Raises:
        InputError: for an unknown family or a draw below 0.
    """
    # The gym brings jax and optax, which other tasks do without.
    import jax

    from esper.tamiyo.gym import FAMILIES, Environment

    check_gym(family, draw)
    own, shapes = FAMILIES[family], Environment()
    x, labels = (np.asarray(part) for part in own.draw(jax.random.key(draw), sum(PARTS.values())))
    ends = np.cumsum([0, *PARTS.values()])
    parts = {
        name: (x[a:b], labels[a:b].astype(np.int32))
        for name, a, b in zip(PARTS, ends[:-1], ends[1:], strict=True)
    }
    random = np.random.default_rng([draw, 1])
    width = int(random.choice(shapes.widths))
    hidden = int(random.integers(1, shapes.depth + 1))
    return make_task(
        f"gym:{family}?draw={draw}" if draw else f"gym:{family}",
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        host=MLPHost(
            (own.inputs, *[width] * hidden, 2), tuple(f"layers.{i}" for i in range(hidden))
        ),
    )


def check_gym(family: str, draw: int) -> None:
    """Whether there is such a task.

    Raises:
        InputError: where there is none.
    """
    from esper.tamiyo.gym import FAMILIES

    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"; did you mean 'gym:{near[0]}'?" if near else ""
        raise InputError(
            f"the gym has no family {family!r}: expected gym:FAMILY with one of"
            f" {', '.join(FAMILIES)}{hint}"
        )
    if draw < 0:
        raise InputError(f"the draw of gym:{family} is a whole number from 0, got {draw}")
