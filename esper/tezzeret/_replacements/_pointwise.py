"""Activations and arithmetic."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esper.tezzeret._ops._base import narrow, wide

F = "nn.functional."


def _widely(function: Callable[..., Any]) -> Callable[..., Any]:
    """In float32, and rounded once."""

    def apply(x: Any, **options: Any) -> Any:
        return narrow(function(wide(x), **options), x)

    return apply


def _gelu(x: Any, approximate: str = "none") -> Any:
    # torch2jax takes the tanh form for both.
    return narrow(jax.nn.gelu(wide(x), approximate=approximate == "tanh"), x)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = wide(x) * beta
    # The inner choice keeps the branch that is not taken finite, in the gradient too.
    low = jnp.where(scaled > threshold, 0.0, scaled)
    return narrow(jnp.where(scaled > threshold, wide(x), jnp.log1p(jnp.exp(low)) / beta), x)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0.0, x)))


def _selu(x: Any) -> Any:
    return 1.0507009873554805 * _elu(x, 1.6732632423543772)


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * negative_slope)


def _prelu(x: Any, weight: Any) -> Any:
    slope = weight.reshape(-1, *(1,) * (x.ndim - 2)) if weight.size > 1 else weight
    return jnp.where(x > 0, x, x * slope)


def _glu(x: Any, dim: int = -1) -> Any:
    value, gate = jnp.split(x, 2, axis=dim)
    return value * jax.nn.sigmoid(gate)


def _hard_tanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    # At a bound torch gives no gradient, and jnp.clip a half.
    return jnp.where(x <= min_val, min_val, jnp.where(x >= max_val, max_val, x)).astype(x.dtype)


def _hard_sigmoid(x: Any) -> Any:
    inside = (x > -3) & (x < 3)
    return jnp.where(inside, x / 6 + 0.5, jnp.where(x > 0, 1.0, 0.0)).astype(x.dtype)


def _hard_swish(x: Any) -> Any:
    inside = (x > -3) & (x < 3)
    return jnp.where(inside, x * (x + 3) / 6, jnp.where(x > 0, x, 0.0)).astype(x.dtype)


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    low = x if min is None else jnp.where(x < min, jnp.asarray(min, x.dtype), x)
    return low if max is None else jnp.where(low > max, jnp.asarray(max, x.dtype), low)


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands in the wider of their dtypes, as torch has it; numbers take the other's."""
    if not (hasattr(a, "dtype") and hasattr(b, "dtype")):
        return a, b
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(a: Any, b: Any) -> Any:
        return function(*_alike(a, b))

    return apply


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    a, b = _alike(a, b)
    return a + (b if alpha == 1 else alpha * b)


def _sub(a: Any, b: Any, alpha: float = 1) -> Any:
    return _add(a, b, -alpha)


def _rsub(a: Any, b: Any, alpha: float = 1) -> Any:
    return _add(b, a, -alpha)


def _power(x: Any, exponent: Any) -> Any:
    # By whole numbers as torch differentiates it: jnp.power has no gradient at 0.
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    return jnp.power(x, exponent)


def _where(condition: Any, a: Any, b: Any) -> Any:
    a, b = _alike(a, b)
    return jnp.where(condition, a, b)


def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


POINTWISE: dict[str, Callable[..., Any]] = {
    "tanh": _widely(jnp.tanh),
    "sigmoid": _widely(jax.nn.sigmoid),
    "exp": _widely(jnp.exp),
    "log": _widely(jnp.log),
    "log1p": _widely(jnp.log1p),
    "expm1": _widely(jnp.expm1),
    "sqrt": _widely(jnp.sqrt),
    "rsqrt": _widely(jax.lax.rsqrt),
    "erf": _widely(jax.lax.erf),
    "sin": _widely(jnp.sin),
    "cos": _widely(jnp.cos),
    "neg": jnp.negative,
    "square": jnp.square,
    "reciprocal": _widely(lambda x: 1 / x),
    "sign": lambda x: jax.lax.stop_gradient(jnp.sign(x)),
    F + "gelu": _gelu,
    F + "silu": _widely(jax.nn.silu),
    F + "mish": _widely(lambda x: x * jnp.tanh(_softplus(x))),
    F + "softplus": _softplus,
    F + "logsigmoid": _widely(jax.nn.log_sigmoid),
    F + "elu": _widely(_elu),
    F + "selu": _widely(_selu),
    F + "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    F + "glu": _widely(_glu),
    F + "hardtanh": _hard_tanh,
    F + "relu6": lambda x: _hard_tanh(x, 0.0, 6.0),
    F + "hardsigmoid": _hard_sigmoid,
    F + "hardswish": _widely(_hard_swish),
    "clamp": _clamp,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _binary(lambda a, b: a * b),
    "div": _binary(lambda a, b: a / b),
    "pow": _power,
    "maximum": _binary(jnp.maximum),
    "minimum": _binary(jnp.minimum),
    "gt": _binary(lambda a, b: a > b),
    "lt": _binary(lambda a, b: a < b),
    "ge": _binary(lambda a, b: a >= b),
    "le": _binary(lambda a, b: a <= b),
    "eq": _binary(lambda a, b: a == b),
    "ne": _binary(lambda a, b: a != b),
    "where": _where,
    "masked_fill": _masked_fill,
}
