"""What kernels are worth, what they cost, and what a change earns."""

from esper.tolaria.worth._components import (
    REWARD_COMPONENTS,
    Measurements,
    RewardComponent,
    SpeedFrom,
    components_table,
)
from esper.tolaria.worth._costs import Costs, Latency, costs, latencies, memory_bytes
from esper.tolaria.worth._growth import GROWTH_WEIGHTS, RENT
from esper.tolaria.worth._measure import Reference, measure, output_distance, reference
from esper.tolaria.worth._removal import PARTS, interval, removal_costs
from esper.tolaria.worth._reward import DEFAULT_WEIGHTS, Reward, reward
from esper.tolaria.worth._shapley import MOST_EXACT, ShapleyValue, shapley_values

__all__ = [
    "DEFAULT_WEIGHTS",
    "GROWTH_WEIGHTS",
    "MOST_EXACT",
    "PARTS",
    "RENT",
    "REWARD_COMPONENTS",
    "Costs",
    "Latency",
    "Measurements",
    "Reference",
    "Reward",
    "RewardComponent",
    "ShapleyValue",
    "SpeedFrom",
    "components_table",
    "costs",
    "interval",
    "latencies",
    "measure",
    "memory_bytes",
    "output_distance",
    "reference",
    "removal_costs",
    "reward",
    "shapley_values",
]
