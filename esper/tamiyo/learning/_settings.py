"""How a policy learns from its own steps, as a value with its own rules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from esper.errors import InputError
from esper.tamiyo._check import require, require_one_of

Algorithm = Literal["ppo", "a2c"]
Decay = Literal["constant", "linear"]


@dataclass(frozen=True)
class LearningSettings:
    """How a policy learns from its own steps.

    Raises:
        InputError: for a value outside of its range, by its name.
    """

    algorithm: Algorithm = "ppo"
    """`a2c` takes one step on each rollout as a whole: with 1 epoch and 1 minibatch."""
    iterations: int = 100
    """From 1, as all counts here."""
    envs: int = 64
    steps: int = 32
    """Of each environment in an iteration."""
    epochs: int = 4
    """How often each step is learnt from."""
    minibatches: int = 4
    """They divide `envs` times `steps`."""
    discount: float = 0.99
    """From 0 to 1."""
    trace: float = 0.95
    """λ of `gae`, from 0 to 1."""
    normalise: bool = True
    """Whether advantages of an iteration are given mean 0 and standard deviation 1."""
    clip: float = 0.2
    """Of the ratio of probabilities, from 0."""
    value_clip: float | None = None
    """Of values, from 0; see `value_error`."""
    entropy_weight: float = 0.01
    """From 0."""
    entropy_decay: Decay = "constant"
    """`linear` lets its weight fall to 0 over the iterations: a policy that is asked for its
    likeliest choice has then learned to be nearly sure of it."""
    value_weight: float = 0.5
    """From 0."""
    target_kl: float | None = None
    """In nats, from 0: an iteration stops to learn where a minibatch is beyond 1.5 times that."""
    kl_penalty: float | None = None
    """β at the beginning, from 0: a penalty on the divergence. It is doubled after an iteration
    beyond 1.5 times `target_kl` and halved after one below 2/3 of it (Schulman et al., 2017,
    section 4), in place of stopping."""
    rate: float = 3e-4
    """Of Adam, from 0."""
    decay: Decay = "constant"
    """`linear` lets the rate fall to 0 over the iterations."""
    most_gradient: float = 0.5
    """The gradient's norm at most, from 0; a longer one is shortened."""

    def __post_init__(self) -> None:
        whole = ("iterations", "envs", "steps", "epochs", "minibatches")
        unit = ("discount", "trace")
        positive = ("clip", "entropy_weight", "value_weight", "rate", "most_gradient")
        optional = ("value_clip", "target_kl", "kl_penalty")
        require_settings(self, whole, unit, positive, optional)
        require_one_of("algorithm of learning", self.algorithm, ("ppo", "a2c"))
        for name in ("decay", "entropy_decay"):
            require_one_of(f"{name} of learning", getattr(self, name), ("constant", "linear"))
        if self.envs * self.steps % self.minibatches:
            raise InputError(
                f"{self.minibatches} minibatches do not divide the {self.envs * self.steps} steps"
                f" of an iteration, {self.envs} envs times {self.steps} steps"
            )
        if self.algorithm == "a2c" and (self.epochs, self.minibatches) != (1, 1):
            raise InputError(
                f"a2c learns once from each step: epochs and minibatches are 1 each, and not"
                f" {self.epochs} and {self.minibatches}"
            )
        if self.kl_penalty is not None and self.target_kl is None:
            raise InputError("kl_penalty adapts to target_kl: give that too")


def require_settings(
    settings: object,
    whole: Sequence[str],
    unit: Sequence[str] = (),
    positive: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Refuse settings out of range.

    Args:
        whole: names of those that are whole numbers from 1.
        unit: of those from 0 to 1.
        positive: of those from 0.
        optional: of those from 0, or None.

    Raises:
        InputError: saying what was expected.
    """
    for names, least, most in ((unit, 0.0, 1.0), (positive, 0.0, math.inf)):
        for name in names:
            require(f"{name} of learning", getattr(settings, name), least, most)
    for name in whole:
        require(f"{name} of learning", getattr(settings, name), 1, whole=True)
    for name in optional:
        if (value := getattr(settings, name)) is not None:
            require(f"{name} of learning", value, 0.0)
