"""Tasks that need no download: data in three parts, and the host that is too small for it.

The validation part is what controllers judge by; the test part is reported and
decides nothing.
"""

import dataclasses
import difflib
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from esper.errors import InputError


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples `[n, features]` f32 and their classes `[n]` i32."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task and the layer sizes of its host, input first."""

    name: str
    train: Split
    validation: Split
    test: Split
    host_sizes: tuple[int, ...]

    @property
    def splits(self) -> dict[str, Split]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def _spiral(count: int, offset: float) -> Split:
    """`count` points on each arm, starting `offset` of a point's distance further in."""
    i = np.arange(count) + offset
    angle, radius = i / 16 * np.pi, (104 - i) / 104
    arm = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    x = np.concatenate([arm, -arm]).astype(np.float32)
    return Split(x, np.repeat(np.arange(2, dtype=np.int32), count))


def spirals() -> Task:
    """The two spirals of 194 points (Lang and Witbrock, 1988), scaled to the unit disc.

    Validation and test points lie on the same arms, a third and two thirds of
    the way between training points.
    """
    return Task(
        "spirals", _spiral(97, 0.0), _spiral(96, 1 / 3), _spiral(96, 2 / 3), host_sizes=(2, 8, 2)
    )


def digits() -> Task:
    """Scikit-learn's 1,797 handwritten digits of 8×8, one fixed split: 997, 400 and 400."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16.0).astype(np.float32)  # pyright: ignore[reportAttributeAccessIssue]
    y = bunch.target.astype(np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    order = np.random.default_rng(20_260).permutation(len(x))
    parts = (order[:997], order[997:1397], order[1397:])
    train, validation, test = (Split(x[part], y[part]) for part in parts)
    return Task("digits", train, validation, test, host_sizes=(64, 8, 10))


TASKS: dict[str, Callable[[], Task]] = {"spirals": spirals, "digits": digits}


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        InputError: for an unknown one, with the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}{hint}")
    return TASKS[name]()


def batch_indices(task: Task, batch_size: int | None, seed: int, step: int) -> np.ndarray | None:
    """The examples of one step, `[batch]` i32; None for all of them.

    A function of seed and step alone: each epoch is a permutation of its own, so
    that the data cursor of a run is its step. A last, short batch is left out.
    """
    if batch_size is None:
        return None
    per_epoch = len(task.train) // batch_size
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(task.train))
    return order[place * batch_size : (place + 1) * batch_size].astype(np.int32)


def initial_host(sizes: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """A host's first parameters by name, the same for both backends.

    Weights `[out, in]` and biases uniform in ±1/√in, as torch and Equinox do.
    """
    random = np.random.default_rng([seed, 0])
    params: dict[str, np.ndarray] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        bound = fan_in**-0.5
        for role, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            draw = random.uniform(-bound, bound, shape)
            params[f"layers.{i}.{role}"] = draw.astype(np.float32)
    return params
