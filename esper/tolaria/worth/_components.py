"""The seven components of the reward, each defined once, from measurements alone.

Each is a potential, a number in [0, 1] that a network's measurements have; what a change earns is
its difference. The formulas are arithmetic on arrays of whatever library the measurements come in.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple


class Measurements(NamedTuple):
    """What was measured of a network at one moment: numbers, or arrays of one shape.

    What has a unit is divided by what the bare host had at the run's beginning, so that 1 is "as
    then". None may be negative but `worth`; what is not finite is taken as the worst there is.
    """

    loss: Any = 1.0
    """Mean validation loss, over the host's at the beginning."""
    flops: Any = 1.0
    """Counted FLOPs of a forward pass, over the host's."""
    latency: Any = 1.0
    """Measured time of a forward pass, over the host's; for reports."""
    memory: Any = 1.0
    """Bytes of parameters and moments, over the host's."""
    parameters: Any = 1.0
    """Parameters, over the host's; at least 1."""
    loss_spread: Any = 0.0
    """Standard deviation of the training losses since the last boundary, over their mean."""
    rollbacks: Any = 0.0
    """How often the run was taken back, since it began."""
    faults: Any = 0.0
    """Failures of kernels, since the run began."""
    vetoes: Any = 0.0
    """Decisions that safety refused, since the run began."""
    novelty: Any = 0.0
    """Distance of the outputs on held-out data from those without kernels, in [0, 1]: see
    `output_distance`."""
    worth: Any = 0.0
    """Removal cost of all kernels together, over the host's loss at the beginning."""
    worth_spread: Any = 0.0
    """Standard deviation of that over held-out parts, in the same unit."""
    worth_spread_of_seeds: Any = 0.0
    """Standard deviation of that over seeds of the run; 0 where there is one."""


SpeedFrom = Literal["flops", "latency"]
"""What speed is taken from: counted in decisions, measured in reports, and never both."""


class RewardComponent(NamedTuple):
    """One component: the table's row, and the function that computes what the row says."""

    name: str
    formula: str
    """Of the potential, over the names of `Measurements`, as an expression of Python."""
    unit: str
    range: str
    """Of what a change earns."""
    sign: str
    """What is positive."""
    source: str
    """Where its measurements come from."""
    potential: Callable[[Measurements, Any, SpeedFrom], Any]
    """Of measurements, with the arrays' library, in [0, 1]."""


_SPREAD_FLOOR = 0.05
"""Worth, over the host's loss, at which a kernel without any spread is half as consistent as it can
be: without it the smallest worth would count as much as a large one."""


def _share(x: Any, xp: Any) -> Any:
    """1 / (1 + x), and 0 for what is not finite."""
    fine = xp.isfinite(x)
    x = xp.where(fine & (x > 0.0), x, xp.zeros_like(x))
    return xp.where(fine, 1.0 / (1.0 + x), xp.zeros_like(x))


def _positive(x: Any, xp: Any) -> Any:
    """max(x, 0), and 0 for what is not finite."""
    return xp.where(xp.isfinite(x) & (x > 0.0), x, xp.zeros_like(x))


def _innovation(m: Measurements, xp: Any, _: SpeedFrom) -> Any:
    worth = _positive(m.worth, xp)
    paid = worth / (1.0 + worth)
    novelty = _positive(m.novelty, xp)
    novelty = xp.where(novelty < 1.0, novelty, xp.ones_like(novelty))
    known = xp.isfinite(m.parameters)
    size = xp.where(known & (m.parameters > 1.0), m.parameters, xp.ones_like(m.parameters))
    value = xp.where(novelty < paid, novelty, paid) / size
    return xp.where(known, value, xp.zeros_like(value))


def _consistency(m: Measurements, xp: Any, _: SpeedFrom) -> Any:
    worth = _positive(m.worth, xp)
    spread = xp.hypot(m.worth_spread, m.worth_spread_of_seeds)
    fine = xp.isfinite(spread)
    spread = xp.where(fine, spread, xp.zeros_like(spread))
    value = worth / (worth + spread + _SPREAD_FLOOR)
    return xp.where(fine, value, xp.zeros_like(value))


REWARD_COMPONENTS: Mapping[str, RewardComponent] = MappingProxyType(
    {
        row.name: row
        for row in (
            RewardComponent(
                "accuracy",
                "1 / (1 + loss)",
                "host's first validation loss",
                "[-1, 1]",
                "a lower loss",
                "`Trainee.losses_without`",
                lambda m, xp, _: _share(m.loss, xp),
            ),
            RewardComponent(
                "speed",
                "1 / (1 + flops), in reports 1 / (1 + latency)",
                "host's FLOPs, in reports host's µs",
                "[-1, 1]",
                "less work",
                "`Trainee.cost`, in reports `latencies`",
                lambda m, xp, speed: _share(m.flops if speed == "flops" else m.latency, xp),
            ),
            RewardComponent(
                "memory",
                "1 / (1 + memory)",
                "host's bytes",
                "[-1, 1]",
                "fewer bytes",
                "`memory_bytes`",
                lambda m, xp, _: _share(m.memory, xp),
            ),
            RewardComponent(
                "stability",
                "1 / (1 + loss_spread + rollbacks)",
                "mean training loss; count",
                "[-1, 1]",
                "steadier losses, no rollback",
                "losses of the steps since the last boundary, the ledger",
                lambda m, xp, _: _share(m.loss_spread + m.rollbacks, xp),
            ),
            RewardComponent(
                "safety",
                "1 / (1 + faults + vetoes + rollbacks)",
                "count since the run began",
                "[-1, 1]",
                "no incident; none is earned back",
                "the ledger",
                lambda m, xp, _: _share(m.faults + m.vetoes + m.rollbacks, xp),
            ),
            RewardComponent(
                "innovation",
                "min(novelty, max(worth, 0) / (1 + max(worth, 0))) / max(parameters, 1)",
                "1 a host's parameters",
                "[-1, 1]",
                "behaviour that is new and that pays, with few parameters",
                "`output_distance`, `Trainee.losses_without`, `Trainee.cost`",
                _innovation,
            ),
            RewardComponent(
                "consistency",
                "max(worth, 0) / (max(worth, 0)"
                f" + (worth_spread**2 + worth_spread_of_seeds**2)**0.5 + {_SPREAD_FLOOR})",
                "1",
                "[-1, 1]",
                "worth that is the same on all data and seeds",
                "`Trainee.losses_without` by parts, runs of a study",
                _consistency,
            ),
        )
    }
)
"""By name. `components_table` prints it."""


def components_table() -> str:
    """`REWARD_COMPONENTS` as a table in Markdown, for the documents."""
    fields = [f for f in RewardComponent._fields if f != "potential"]
    rows = [[str(getattr(row, f)) for f in fields] for row in REWARD_COMPONENTS.values()]
    formula = fields.index("formula")
    for row in rows:
        row[formula] = f"`{row[formula]}`"
    lines = [fields, ["---"] * len(fields), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
