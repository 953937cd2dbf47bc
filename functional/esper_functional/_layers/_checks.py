"""What fits a layer, checked while it is traced.

The checks are Python on shapes, dtypes and options: they add nothing to the
compiled program and run once for each compilation.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from esper_functional._errors import LayerShapeError


def described(array: Any) -> str:
    """An array's dtype and shape as one word."""
    return f"{array.dtype}{list(array.shape)}"


def check_sizes(where: str, **sizes: Any) -> None:
    """Refuse sizes that are not integers of at least 1."""
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise LayerShapeError(
                f"{where}: expected {name} to be an integer of at least 1; got {size!r}"
            )


def is_integer(value: Any) -> bool:
    """True for Python's and numpy's integers; bools are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_divides(where: str, name: str, count: int, **sizes: int) -> None:
    """Refuse a number of groups or heads that does not divide every size."""
    check_sizes(where, **{name: count})
    for what, size in sizes.items():
        if size % count:
            raise LayerShapeError(
                f"{where}: expected {name} to divide {what}; {size} is not a multiple of {count}."
                f" Choose a divisor of {size}"
            )


def check_dtype(where: str, dtype: Any) -> None:
    """Refuse parameters of a dtype that is not floating."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise LayerShapeError(
            f"{where}: expected a floating dtype, such as float32 or bfloat16; got"
            f" {jnp.dtype(dtype).name}"
        )


def check_one_dtype(where: str, x: Any, **params: Any) -> None:
    """Refuse an input whose dtype is not floating and the parameters' own."""
    for name, param in params.items():
        if param is None:
            raise LayerShapeError(
                f"{where}: expected an array for {name!r}; got None. Leave the entry out for a"
                " layer without it"
            )
        if param.dtype != x.dtype:
            raise LayerShapeError(
                f"{where}: expected input and parameters of one dtype; got {described(x)} for the"
                f" input and {described(param)} for {name!r}. Nothing is promoted silently: cast"
                " one of them with astype"
            )
    check_dtype(where, x.dtype)


def check_param(where: str, name: str, param: Any, shape: tuple[int, ...]) -> None:
    """Refuse a parameter that is not of `shape`."""
    if tuple(param.shape) != shape:
        raise LayerShapeError(
            f"{where}: expected {name!r} of shape {list(shape)}, as the weight has it; got"
            f" {described(param)}"
        )


def check_weight_rank(where: str, weight: Any, axes: str) -> None:
    """Refuse a weight that has not the axes that `axes` names."""
    if weight.ndim != len(axes.split()):
        raise LayerShapeError(
            f"{where}: expected a weight [{', '.join(axes.split())}]; got {described(weight)}."
            " Map over stacked parameters with jax.vmap or jax.lax.scan"
        )


def check_rank(where: str, x: Any, axes: str, at_least: int) -> None:
    """Refuse an input that has fewer axes than a layer needs."""
    if x.ndim < at_least:
        raise LayerShapeError(f"{where}: expected an input {axes}; got {described(x)}")


def check_features(where: str, x: Any, axes: str, axis: int, expected: int) -> None:
    """Refuse an input whose features, at `axis`, are not the weight's."""
    if x.shape[axis] != expected:
        raise LayerShapeError(
            f"{where}: expected an input {axes} with {expected} features at axis {axis}, as the"
            f" weight has it; got {described(x)}. Change the input or build the layer for"
            f" {x.shape[axis]} features"
        )


def check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse an option that is none of `choices`, naming the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LayerShapeError(
            f"{where}: unknown {name} {value!r}: expected one of {', '.join(choices)}{hint}"
        )


def check_fraction(where: str, name: str, value: Any) -> None:
    """Refuse a number outside [0, 1]; NaN is outside."""
    if not 0 <= value <= 1:
        raise LayerShapeError(f"{where}: expected {name} in [0, 1]; got {value!r}")
