"""How a policy learns while it decides, as a value with its own rules."""

from dataclasses import dataclass
from typing import Literal

from esper.tamiyo._check import require, require_one_of
from esper.tamiyo.learning._settings import require_settings

Layers = Literal["heads", "all"]


@dataclass(frozen=True)
class OnlineSettings:
    """How a policy learns while it decides; see `OnlineLearner`.

    Raises:
        InputError: for a value outside of its range, by its name.
    """

    layers: Layers = "heads"
    """What learns. With `heads` a policy makes the same of a graph as before, so that estimates
    of effects, which read that, stay what they were; `all` moves what they read."""
    batch: int = 32
    """Transitions of an update, from 1."""
    least: int = 32
    """Transitions of one bucket from which on it is learned from; from 1."""
    replays: float = 4.0
    """How often each is learned from on average, from 0."""
    most_reward: float = 1.0
    """Rewards beyond it on either side count as it, from 0: a run that diverges loses more than
    any choice can win."""
    temperature: float = 0.1
    """β of `awr_loss`, in units of the reward, from 1e-6."""
    most: float = 20.0
    """ω of `awr_loss`, what one choice counts at most; from 1."""
    value_weight: float = 0.5
    """From 0."""
    discount: float = 0.99
    """From 0 to 1."""
    correction: float = 0.4
    """Of the importance weights, from 0 to 1; see `ReplayStore.draw`."""
    rate: float = 3e-4
    """Of Adam, from 0."""
    most_gradient: float = 1.0
    """The gradient's norm at most, from 0."""
    kl_weight: float = 1.0
    """Of the mean divergence from the policy that it began with, in the loss; from 0."""
    most_kl: float | None = 0.1
    """How far an update may lead from that policy, in nats, in any graph that it learns from; from
    0. None for any distance."""
    capacity: int = 1_024
    """Transitions of a bucket, from 1."""
    buckets: int = 8
    """From 1; models of others teach nothing."""
    most_bytes: int = 1 << 25
    """Of the transitions of a bucket, from 1; of large models there are fewer."""
    waiting: int = 1_024
    """Experiences that wait to be taken in; the oldest go. From 1."""
    exchange_every: int = 10
    """Updates after which the policy is exchanged; from 1."""
    save_every: int = 500
    """Updates after which all is written; from 1."""
    seed: int = 0
    """Of all draws, from 0."""

    def __post_init__(self) -> None:
        whole = ("batch", "least", "capacity", "buckets", "most_bytes", "waiting",
                 "exchange_every", "save_every")  # fmt: skip
        positive = ("replays", "most_reward", "value_weight", "rate", "most_gradient", "kl_weight")
        require_settings(self, whole, ("discount", "correction"), positive, ("most_kl",))
        require("temperature of learning", self.temperature, 1e-6)
        require("most of learning", self.most, 1.0)
        require("seed of learning", self.seed, 0, whole=True)
        require_one_of("layers of learning", self.layers, ("heads", "all"))
