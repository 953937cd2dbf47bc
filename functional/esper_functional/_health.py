"""Health of a seed, measured on its kernel's output.

All take the outputs of one batch, `[batch, features]`, and return a scalar.
Written against the array API, so that both backends report the same numbers.

On sampled steps a program takes `measure_health` of the outputs that `forward`
captured, and hands one small array back: one transfer for the whole model.
`observe_statistics` takes it into moving averages, on the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32

from esper_functional._arrays import Array, Scalar, namespace
from esper_functional._errors import KasminaException
from esper_functional._plan import running_seeds
from esper_functional._state import SeedState
from esper_functional._transition import moving_average, observe_health

DEAD_BELOW = 1e-6
"""A feature is dead whose range over a batch is below this, or below this part of its largest
magnitude. (The range of equal numbers is exactly 0; their standard deviation need not be.)"""


def _flat(outputs: Float[Array, "*batch features"]) -> Float32[Array, "rows features"]:
    xp = namespace(outputs)
    return xp.astype(xp.reshape(outputs, (-1, outputs.shape[-1])), xp.float32)


def _still(rows: Float32[Array, "rows features"]) -> Bool[Array, " features"]:
    """Which features do not vary."""
    xp = namespace(rows)
    scale = xp.maximum(xp.max(xp.abs(rows), axis=0), xp.asarray(1.0, dtype=xp.float32))
    spread = xp.max(rows, axis=0) - xp.min(rows, axis=0)
    return spread < xp.asarray(DEAD_BELOW, dtype=xp.float32) * scale


def activation_variance(outputs: Float[Array, "*batch features"]) -> Float32[Scalar, ""]:
    """Mean over features of the variance over the batch."""
    xp = namespace(outputs)
    return xp.mean(xp.var(_flat(outputs), axis=0))


def dead_ratio(outputs: Float[Array, "*batch features"]) -> Float32[Scalar, ""]:
    """Share of features, in [0, 1], that do not vary over the batch."""
    xp = namespace(outputs)
    return xp.mean(xp.astype(_still(_flat(outputs)), xp.float32))


def mean_abs_correlation(outputs: Float[Array, "*batch features"]) -> Float32[Scalar, ""]:
    """Mean absolute correlation between different features, in [0, 1].

    Dead features correlate with nothing; a single feature gives 0.
    """
    xp = namespace(outputs)
    rows = _flat(outputs)
    features = rows.shape[1]
    centred = rows - xp.mean(rows, axis=0)
    spread = xp.std(rows, axis=0)
    alive = ~_still(rows)
    one = xp.asarray(1.0, dtype=xp.float32)
    unit = xp.where(alive, centred / xp.where(alive, spread, one), 0.0 * one)
    correlation = xp.abs(unit.T @ unit) / rows.shape[0]
    pairs = max(features * (features - 1), 1)
    return (xp.sum(correlation) - xp.sum(xp.diagonal(correlation))) / pairs


def health_score(outputs: Float[Array, "*batch features"]) -> Float32[Scalar, ""]:
    """1 − `dead_ratio`, the score that `SeedState.health` averages; NaN if not finite."""
    xp = namespace(outputs)
    nan = xp.asarray(float("nan"), dtype=xp.float32)
    # A compiler may contract a mean and this difference, and leave the interval by a rounding.
    alive = xp.clip(xp.asarray(1.0, dtype=xp.float32) - dead_ratio(outputs), 0.0, 1.0)
    return xp.where(xp.all(xp.isfinite(outputs)), alive, nan)


STATISTICS: tuple[str, ...] = ("health", "variance", "dead_ratio", "correlation")
"""The columns of `measure_health`."""


def measure_health(
    outputs: Sequence[Float[jax.Array, "..."] | None], *, feature_axis: int = -1
) -> Float32[jax.Array, "runs 4"]:
    """`STATISTICS` of each kernel's outputs in one array, to be fetched at once.

    Args:
        outputs: as `Observed.outputs`, in plan order; each `[*batch, ...]`. None for what was
            not seen, of which nothing is measured: NaN.
        feature_axis: -1, or -3 for images with channels first.
    """
    rows: list[jax.Array] = []
    for k in outputs:
        if k is None:
            rows.append(jnp.full(len(STATISTICS), jnp.nan, jnp.float32))
            continue
        features = jnp.moveaxis(k, feature_axis, -1)
        values = (
            health_score(features),
            activation_variance(features),
            dead_ratio(features),
            mean_abs_correlation(features),
        )
        rows.append(jnp.stack([jnp.asarray(value, jnp.float32) for value in values]))
    return jnp.stack(rows) if rows else jnp.zeros((0, len(STATISTICS)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class HealthStatistics:
    """Moving averages of what was measured of each seed's kernel: a pytree.

    f32 `[layers, seeds]` each, NaN before the first observation. They describe, and
    decide nothing: what a run depends on is the score in `SeedState.health`.
    """

    variance: Any
    dead_ratio: Any
    correlation: Any


jax.tree_util.register_dataclass(
    HealthStatistics, data_fields=["variance", "dead_ratio", "correlation"], meta_fields=[]
)


def init_statistics(*axes: int) -> HealthStatistics:
    """Nothing observed yet, in numpy, with leading axes `axes` (layers, seeds)."""
    return HealthStatistics(*(np.full(axes, np.nan, np.float32) for _ in range(3)))


def observe_statistics(
    state: SeedState, statistics: HealthStatistics, measured: Any, *, step: int
) -> tuple[SeedState, HealthStatistics]:
    """Take one sampled step into the state's health and the statistics' averages.

    Each is an average with factor `EMA_FACTOR` whose first value is taken as is; what is not
    finite is passed over. A statistic of a seed that no longer runs starts anew.

    Args:
        state: the state that the step was planned from, in numpy.
        measured: f32 `[running seeds, 4]` of `measure_health`; waits for the device.

    Raises:
        KasminaException: for the measurements of another plan.
    """
    at, rows = running_seeds(state), np.asarray(measured)
    if rows.shape != (len(at), len(STATISTICS)):
        raise KasminaException(
            f"observe_statistics: the state runs {len(at)} seeds, which gives measurements of shape"
            f" {(len(at), len(STATISTICS))}; got {rows.shape}: measure with the plan of this state"
        )
    columns = np.full((len(STATISTICS), *state.shape), np.nan, np.float32)
    where = np.zeros(state.shape, np.bool_)
    for place, row in zip(at, rows, strict=True):
        columns[(slice(None), *place)] = row
        where[place] = True
    averages = []
    for old, new in zip(
        (statistics.variance, statistics.dead_ratio, statistics.correlation),
        columns[1:],
        strict=True,
    ):
        kept = np.where(where, np.asarray(old), np.float32(np.nan))
        averages.append(moving_average(kept, new, where & np.isfinite(new)))
    return observe_health(state, where, columns[0], step=step), HealthStatistics(*averages)
