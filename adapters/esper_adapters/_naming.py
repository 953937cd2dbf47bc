"""What both faces say alike."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper_functional import BlendError, Event, EventKind, KasminaException, SeedIndexError

HOST_FIELD = "esper_host"
"""Under this name a grafted node holds the host's layer: an attribute, or a key of a dict."""

KERNELS_FIELD = "esper_kernels"
"""Under this name a grafted node holds its kernels' parameters, a dict by seed."""


def find_row(name: str, names: Sequence[str]) -> int:
    """The row of a layer in the seed state.

    Raises:
        SeedIndexError: for a name that no layer has, with the nearest ones.
    """
    if name in names:
        return list(names).index(name)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"; the nearest are {near}" if near else ""
    raise SeedIndexError(f"no wrapped layer is called {name!r}: there are {list(names)}{hint}")


def two_of_a_name(name: str) -> KasminaException:
    """The error for two layers that one path names, because a key has a dot in it."""
    return KasminaException(
        f"wrap: two layers of the model are called {name!r}: rename the key that has a dot in it"
    )


def describe_array(array: Any) -> str:
    """Such as `float32[8, 4]`."""
    return f"{array.dtype}{list(np.shape(array))}"


def step_reached(step: int | None, reached: int) -> int:
    """The step asked for, or the one that a model's seeds have reached.

    Raises:
        KasminaException: for a step that is over.
    """
    if step is None:
        return reached
    if step < reached:
        raise KasminaException(
            f"step {step} is over: this model's seeds have reached step {reached}; give a"
            " later one, or none"
        )
    return step


def first_alpha(confidence: float) -> float:
    """The alpha of a freshly loaded kernel that is not ramped: min(0.6·confidence, 0.5)."""
    return min(0.6 * confidence, 0.5)


def check_alpha(alpha: float) -> float:
    """`alpha`, if it is in [0, 1].

    Raises:
        BlendError: for anything else, NaN included.
    """
    if not 0.0 <= alpha <= 1.0:
        raise BlendError(f"alpha must be in [0, 1], got {alpha}")
    return float(alpha)


def load_events(
    step: int, layer: int, seed: int, slot: int, kernel_id: str, alpha: float
) -> tuple[Event, Event]:
    """The two events of a kernel that was at hand when it was asked for."""
    return (
        Event(step, layer, seed, EventKind.LOAD, kernel_id, float(slot)),
        Event(step, layer, seed, EventKind.ACTIVATE, kernel_id, alpha),
    )
