"""What it is worth to grow: one weighing of the components, for policies and for comparisons."""

from collections.abc import Mapping
from types import MappingProxyType

GROWTH_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "accuracy": 8.0,
        "speed": 1.0,
        "memory": 0.5,
        "stability": 0.25,
        "safety": 1.0,
        "innovation": 0.25,
        "consistency": 0.25,
    }
)
"""Of the components. From a host that learned nothing to one that learned everything there are 4.0
to gain by accuracy; to be twice as large costs 0.17 of speed and 0.08 of memory, to be many times
as large 0.5 and 0.25. What could be had without learning anything counts little."""

RENT = 0.1
"""What a network of twice the host's FLOPs pays over a run, and one of four times them twice over,
in part for each step: to be large early or late is not the same work, and what is grafted and
dropped was not free."""
