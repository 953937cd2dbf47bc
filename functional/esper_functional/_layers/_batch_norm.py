"""Batch normalisation, its running statistics passed in and out.

S. Ioffe and C. Szegedy, Batch Normalization, 2015; running statistics as in
`torch.nn.BatchNorm1d` and `BatchNorm2d`.
"""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from esper_functional._errors import LayerShapeError
from esper_functional._layers._checks import (
    check_dtype,
    check_features,
    check_fraction,
    check_one_dtype,
    check_param,
    check_rank,
    check_sizes,
    check_weight_rank,
    described,
)
from esper_functional._layers._precision import widened


class BatchNormParams(TypedDict):
    """Parameters of a batch normalisation, as in PyTorch."""

    weight: Float[Array, " features"]
    bias: Float[Array, " features"]


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """Running statistics: PyTorch's `running_mean`, `running_var` and `num_batches_tracked`.

    float32 whatever the layer's dtype: a running average in half precision stands still.
    """

    mean: Any
    """f32 `[features]`."""
    var: Any
    """f32 `[features]`, of the unbiased variance."""
    count: Any
    """i32: batches seen in training."""


jax.tree_util.register_dataclass(BatchStats, data_fields=["mean", "var", "count"], meta_fields=[])


def init_batch_norm(
    features: int, *, dtype: DTypeLike = jnp.float32
) -> tuple[BatchNormParams, BatchStats]:
    """Weights 1, biases 0, running means 0 and variances 1, as in PyTorch.

    Raises:
        LayerShapeError: for features below 1, and dtypes that are not floating.
    """
    check_sizes("init_batch_norm", features=features)
    check_dtype("init_batch_norm", dtype)
    zeros, ones = jnp.zeros(features, jnp.float32), jnp.ones(features, jnp.float32)
    params: BatchNormParams = {
        "weight": jnp.ones(features, dtype),
        "bias": jnp.zeros(features, dtype),
    }
    return params, BatchStats(zeros, ones, jnp.zeros((), jnp.int32))


def batch_norm(
    params: BatchNormParams,
    x: Float[Array, "batch features *spatial"],
    stats: BatchStats,
    *,
    train: bool,
    momentum: float | int | None = 0.1,
    eps: float = 1e-5,
) -> tuple[Float[Array, "batch features *spatial"], BatchStats]:
    """(x − mean) / √(var + eps) · weight + bias for each feature.

    In training, mean and biased variance are the batch's, over all axes but that of the
    features, and the running statistics move towards its mean and *unbiased* variance:

        running ← (1 − momentum) · running + momentum · batch's

    Else they are the running ones. No gradient flows into the statistics returned. For inputs
    of half precision everything is computed in float32 and rounded once.

    Args:
        params: weight and bias `[features]`.
        x: `[batch, features, *spatial]`.
        stats: the running statistics.
        train: static.
        momentum: in [0, 1], static; None for the average over all batches, 1/count.
        eps: added to the variance.

    Returns:
        The output, and the next statistics: those given, where `train` is False.

    Raises:
        LayerShapeError: at trace time, for an input that does not fit parameters or statistics,
            for one value per feature in training, and for a momentum outside [0, 1].
    """
    weight = params["weight"]
    _check(params, x, stats, momentum)
    wide = widened(x.dtype)
    shape = (-1,) + (1,) * (x.ndim - 2)
    if train:
        axes = (0, *range(2, x.ndim))
        mean = jnp.mean(x.astype(wide), axis=axes)
        var = jnp.mean(jnp.square(x.astype(wide) - mean.reshape(shape)), axis=axes)
        stats = _updated(stats, mean, var, _values_per_feature(x), momentum)
    else:
        mean, var = stats.mean.astype(wide), stats.var.astype(wide)
    scale = jax.lax.rsqrt(var + eps) * weight.astype(wide)
    y = (x.astype(wide) - mean.reshape(shape)) * scale.reshape(shape)
    y = y + params["bias"].astype(wide).reshape(shape)
    return y.astype(x.dtype), stats


def _updated(stats: BatchStats, mean: Any, var: Any, values: int, momentum: Any) -> BatchStats:
    count = stats.count + 1
    factor = 1.0 / count.astype(jnp.float32) if momentum is None else momentum
    unbiased = var * (values / (values - 1))

    def moved(running: Any, batch: Any) -> Any:
        return (1.0 - factor) * running + factor * batch.astype(jnp.float32)

    return jax.lax.stop_gradient(
        BatchStats(moved(stats.mean, mean), moved(stats.var, unbiased), count)
    )


def _values_per_feature(x: Any) -> int:
    values = x.size // x.shape[1]
    if values < 2:
        raise LayerShapeError(
            "batch_norm: expected more than one value for each feature in training, because the"
            f" variance of one is no variance; got {described(x)}. Use a larger batch, or"
            " train=False"
        )
    return values


def _check(params: BatchNormParams, x: Any, stats: BatchStats, momentum: Any) -> None:
    where, axes = "batch_norm", "[batch, features, *spatial]"
    weight = params["weight"]
    check_one_dtype(where, x, **params)
    check_weight_rank(where, weight, "features")
    check_param(where, "bias", params["bias"], weight.shape)
    check_rank(where, x, axes, 2)
    check_features(where, x, axes, 1, weight.shape[0])
    for name, array in (("mean", stats.mean), ("var", stats.var)):
        if array.shape != weight.shape or array.dtype != jnp.float32:
            raise LayerShapeError(
                f"{where}: expected running statistics float32{list(weight.shape)}, whatever the"
                f" input's dtype; got {described(array)} for {name!r}. Start from"
                " init_batch_norm's, and cast parameters alone"
            )
    if momentum is not None:
        check_fraction(where, "momentum", momentum)
