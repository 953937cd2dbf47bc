"""Health of a seed, measured on its kernel's output.

All take the outputs of one batch, `[batch, features]`, and return a scalar.
Written against the array API, so that both backends report the same numbers.
"""

from jaxtyping import Bool, Float, Float32

from esper_functional._arrays import Array, Scalar, namespace

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
    alive = xp.asarray(1.0, dtype=xp.float32) - dead_ratio(outputs)
    return xp.where(xp.all(xp.isfinite(outputs)), alive, nan)
