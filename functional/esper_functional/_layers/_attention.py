"""Multi-head attention.

A. Vaswani et al., Attention Is All You Need, 2017, section 3.2.
"""

from typing import Any, Literal, TypedDict, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from esper_functional import _arrays
from esper_functional._errors import LayerShapeError
from esper_functional._layers._checks import (
    check_divides,
    check_dtype,
    check_fraction,
    check_one_dtype,
    check_rank,
    check_sizes,
    check_weight_rank,
    described,
)
from esper_functional._layers._linear import LinearParams, project
from esper_functional._layers._precision import uniform, widened

Mask = Bool[_arrays.Array, "..."] | Float[_arrays.Array, "..."]
"""True where a query may attend to a key; or numbers that are added to the logits."""


class AttentionParams(TypedDict):
    """Parameters of multi-head attention: its four projections."""

    query: LinearParams
    key: LinearParams
    value: LinearParams
    out: LinearParams


def init_attention(
    key: PRNGKeyArray,
    features: int,
    num_heads: int,
    *,
    key_features: int | None = None,
    value_features: int | None = None,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> AttentionParams:
    """The distributions of `torch.nn.MultiheadAttention`; biases are 0.

    Query, key and value projections are uniform in ±√(6 / (fan_in + fan_out)) (X. Glorot and
    Y. Bengio, 2010). As in PyTorch, which packs the three into one matrix where they have
    equally many features, fan_out is 3·features there and features elsewhere. The output
    projection is uniform in ±1/√features.

    Args:
        features: of queries and outputs; each head has features / num_heads of them.
        key_features, value_features: of keys and values; `features` by default.

    Raises:
        LayerShapeError: for sizes below 1, heads that do not divide the features, and
            dtypes that are not floating.
    """
    where = "init_attention"
    key_features = features if key_features is None else key_features
    value_features = features if value_features is None else value_features
    check_sizes(where, features=features, key_features=key_features, value_features=value_features)
    check_divides(where, "num_heads", num_heads, features=features)
    check_dtype(where, dtype)
    packed = key_features == value_features == features
    fan_out = 3 * features if packed else features
    keys = jax.random.split(key, 4)

    def projection(key: PRNGKeyArray, in_features: int, bound: float) -> LinearParams:
        weight = uniform(key, (features, in_features), bound, dtype)
        return (
            {"weight": weight, "bias": jnp.zeros(features, dtype)} if bias else {"weight": weight}
        )

    return {
        "query": projection(keys[0], features, (6 / (features + fan_out)) ** 0.5),
        "key": projection(keys[1], key_features, (6 / (key_features + fan_out)) ** 0.5),
        "value": projection(keys[2], value_features, (6 / (value_features + fan_out)) ** 0.5),
        "out": projection(keys[3], features, features**-0.5),
    }


@overload
def attention(
    params: AttentionParams,
    query: Float[Array, "*batch targets features"],
    keys: Float[Array, "*batch sources key_features"] | None = None,
    values: Float[Array, "*batch sources value_features"] | None = None,
    *,
    num_heads: int,
    mask: Mask | None = None,
    causal: bool = False,
    dropout: float | int = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    need_weights: Literal[False] = False,
) -> Float[Array, "*batch targets features"]: ...


@overload
def attention(
    params: AttentionParams,
    query: Float[Array, "*batch targets features"],
    keys: Float[Array, "*batch sources key_features"] | None = None,
    values: Float[Array, "*batch sources value_features"] | None = None,
    *,
    num_heads: int,
    mask: Mask | None = None,
    causal: bool = False,
    dropout: float | int = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    need_weights: Literal[True],
) -> tuple[Float[Array, "*batch targets features"], Float[Array, "*batch targets sources"]]: ...


def attention(
    params: AttentionParams,
    query: Float[Array, "*batch targets features"],
    keys: Float[Array, "*batch sources key_features"] | None = None,
    values: Float[Array, "*batch sources value_features"] | None = None,
    *,
    num_heads: int,
    mask: Mask | None = None,
    causal: bool = False,
    dropout: float | int = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    need_weights: bool = False,
) -> Any:
    """softmax(Q·Kᵀ/√d + mask)·V in each head, projected; over any leading axes.

    The softmax is taken in float32 for inputs of half precision. A query that may attend to no
    key, because its whole row is masked, has weights 0 and so the output projection's bias
    alone for output; its gradients are finite. (`scaled_dot_product_attention` of PyTorch does
    the same; `nn.MultiheadAttention` gives NaN with need_weights, and
    `jax.nn.dot_product_attention` attends to all keys equally.)

    Args:
        params: see `init_attention`.
        query: `[*batch, targets, features]`.
        keys: `[*batch, sources, key_features]`; the query by default.
        values: `[*batch, sources, value_features]`; the keys by default.
        num_heads: a divisor of the features, and static.
        mask: broadcasts against `[*batch, heads, targets, sources]`, so that one for each
            example needs an axis for the heads. Either bool, True where a query may attend, as
            in `jax.nn.dot_product_attention` and `scaled_dot_product_attention` of PyTorch,
            whose `nn.MultiheadAttention` means the opposite; or of the input's dtype or
            float32, and added to the logits.
        causal: a query attends to no key of a higher index; composes with `mask`.
        dropout: probability in [0, 1], static, with which each weight is dropped; those that
            stay are divided by 1 − dropout. 0 outside of training.
        dropout_key: needed where `dropout` is not 0, and unused elsewhere. Under `jax.vmap`
            give each example a key of its own; over leading axes one key drops independently.
        need_weights: also return the weights that were used.

    Returns:
        `[*batch, targets, features]`; with `need_weights` a pair of this and the weights,
        averaged over the heads, `[*batch, targets, sources]`.

    Raises:
        LayerShapeError: at trace time, for inputs that do not fit the parameters or one
            another, and for a dropout without a key.
    """
    keys = query if keys is None else keys
    values = keys if values is None else values
    _check_inputs(params, query, keys, values, num_heads)
    if mask is not None:
        shape = (*query.shape[:-2], num_heads, query.shape[-2], keys.shape[-2])
        _check_mask(mask, shape, query.dtype)
    _check_dropout(dropout, dropout_key)

    q = _split("the query of attention", params["query"], query, num_heads)
    k = _split("the keys of attention", params["key"], keys, num_heads)
    v = _split("the values of attention", params["value"], values, num_heads)
    logits = jnp.einsum(
        "...thd,...shd->...hts", q, k, preferred_element_type=widened(query.dtype)
    ) * (q.shape[-1] ** -0.5)
    weights = _softmax(_masked(logits, mask, causal))
    if dropout:
        weights = _dropped(weights, dropout, dropout_key)
    heads = jnp.einsum("...hts,...shd->...thd", weights.astype(query.dtype), v)
    joined = heads.reshape(*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
    y = project("the output of attention", params["out"], joined)
    if not need_weights:
        return y
    return y, jnp.mean(weights, axis=-3).astype(query.dtype)


def _split(where: str, params: LinearParams, x: Any, num_heads: int) -> Any:
    """Projected, as `[*batch, length, heads, features of a head]`."""
    projected = project(where, params, x)
    return projected.reshape(*projected.shape[:-1], num_heads, projected.shape[-1] // num_heads)


def _masked(logits: Any, mask: Any, causal: bool) -> Any:
    if mask is not None and mask.dtype == jnp.bool_:
        logits = jnp.where(mask, logits, -jnp.inf)
    elif mask is not None:
        logits = logits + mask.astype(logits.dtype)
    if causal:
        targets = jax.lax.broadcasted_iota(jnp.int32, logits.shape[-2:], 0)
        sources = jax.lax.broadcasted_iota(jnp.int32, logits.shape[-2:], 1)
        logits = jnp.where(sources <= targets, logits, -jnp.inf)
    return logits


def _softmax(logits: Any) -> Any:
    """Softmax along the last axis; zeros, with finite gradients, for a row of −∞."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    powers = jnp.exp(logits - jnp.where(largest == -jnp.inf, 0.0, largest))
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers / jnp.where(total == 0.0, 1.0, total)


def _dropped(weights: Any, dropout: float | int, key: Any) -> Any:
    kept = jax.random.bernoulli(key, 1.0 - dropout, weights.shape)
    scale = 1.0 / (1.0 - dropout) if dropout < 1 else 0.0
    return jnp.where(kept, weights * scale, 0.0)


def _check_inputs(
    params: AttentionParams, query: Any, keys: Any, values: Any, num_heads: int
) -> None:
    for name in ("query", "key", "value", "out"):
        check_weight_rank(f"the {name} projection of attention", params[name]["weight"], "out in")
    widths = {name: params[name]["weight"].shape[0] for name in ("query", "key", "value")}
    if len(set(widths.values())) != 1:
        raise LayerShapeError(
            "attention: expected projections of query, key and value to equally many features; got"
            f" {widths}"
        )
    check_divides("attention", "num_heads", num_heads, features=widths["query"])
    for name, x in (("query", query), ("keys", keys), ("values", values)):
        check_rank(f"the {name} of attention", x, "[*batch, length, features]", 2)
    check_one_dtype("attention", query, keys=keys, values=values)
    if keys.shape[:-2] != query.shape[:-2] or values.shape[:-1] != keys.shape[:-1]:
        raise LayerShapeError(
            "attention: expected query, keys and values of the same leading axes, and keys and"
            f" values of one length; got {described(query)}, {described(keys)} and"
            f" {described(values)}"
        )


def _check_mask(mask: Any, shape: tuple[Any, ...], dtype: Any) -> None:
    if mask.dtype not in (jnp.bool_, dtype, jnp.float32):
        numbers = " or ".join(dict.fromkeys((str(dtype), "float32")))
        raise LayerShapeError(
            f"attention: expected a mask of bool (True may attend) or {numbers} (added to the"
            f" logits); got {described(mask)}. Cast it with astype"
        )
    own = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or not all(size in (1, full) for size, full in own):
        raise LayerShapeError(
            "attention: expected a mask that broadcasts against [*batch, heads, targets, sources],"
            f" here {list(shape)}; got {described(mask)}. A mask for each example needs an axis of"
            " size 1 for the heads"
        )


def _check_dropout(dropout: Any, dropout_key: Any) -> None:
    check_fraction("attention", "dropout", dropout)
    if dropout and dropout_key is None:
        raise LayerShapeError(
            f"attention: expected a dropout_key with dropout {dropout}; got none. Split one off"
            " the step's key, or set dropout to 0 outside of training"
        )
