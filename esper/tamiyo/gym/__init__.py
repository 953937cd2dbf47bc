"""The gym: growing networks as environments, thousands of them in one program."""

from esper.tamiyo.gym._environment import OFFERS, Environment
from esper.tamiyo.gym._families import FAMILIES, HELD_OUT, TRAINING, Family
from esper.tamiyo.gym._gymnasium import gymnasium_env, gymnasium_vector_env
from esper.tamiyo.gym._kernels import Offered
from esper.tamiyo.gym._state import Episode, State, Step

__all__ = [
    "FAMILIES",
    "HELD_OUT",
    "OFFERS",
    "TRAINING",
    "Environment",
    "Episode",
    "Family",
    "Offered",
    "State",
    "Step",
    "gymnasium_env",
    "gymnasium_vector_env",
]
