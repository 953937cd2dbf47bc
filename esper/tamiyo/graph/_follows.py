"""How much of what the loss asks of a layer could be had by growing there: a first-order forecast.

The gradient g of the loss by a layer's output says, example by example, how that output should
change. Where the layer is at rest, no linear map of its input x follows g any more: what is left
is the expressivity bottleneck of Verbockhaven et al. (Growing Tiny Networks, TMLR 2024). A kernel
reads x and adds to the output, so what it can bring is what some map of x follows. It is estimated
by random features of x (Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS
2007), on examples that the map was not fitted to: labels by lot have a gradient too, and nothing
follows that.
"""

import functools
from typing import Any

import numpy as np

FOLLOWED = ("follows_linearly", "follows")
"""By which maps: a linear one, and one with random features beside."""

MOST_ROWS = 512
"""Examples, or positions of examples, that are looked at."""

_HIDDEN = 32
_MOST_INPUTS = 16
"""Inputs beyond these are mixed to as many."""
_RIDGE = 0.03
_TINY = 1e-12


def follows(x: Any, g: Any, xp: Any) -> Any:
    """The share of a gradient that maps of a layer's input follow: R², by examples held out.

    Each half of the rows is told by the map that the other half was fitted to, by ridge regression.
    Inputs count by their size over their root mean square, so that units do not matter.

    Args:
        x: `[rows, in]`, what the layer takes; at least 2 rows.
        g: `[rows, out]`, the gradient of the loss by what it gives, in any unit.
        xp: numpy, or jax.numpy, which gives the same to rounding.

    Returns:
        f32 `[2]`, by `FOLLOWED`, in [-1, 1]; 0 where there is no gradient, NaN where something is
        not finite.
    """
    x, g = xp.asarray(x), xp.asarray(g)
    size = xp.sqrt(xp.mean(x**2, axis=0))
    there = size > _TINY
    count = xp.maximum(xp.sum(there.astype(x.dtype)), 1.0)
    x = xp.where(there, x / xp.where(there, size, 1.0), 0.0)
    inputs = x.shape[1]
    mix, weight, bias = (xp.asarray(own, dtype=x.dtype) for own in _drawn(inputs))
    own = x if inputs <= _MOST_INPUTS else x @ mix / xp.sqrt(count)
    one = xp.ones((len(x), 1), x.dtype)
    hidden = xp.maximum(x @ weight / xp.sqrt(count) + bias, 0.0)
    linear = xp.concatenate([one, own], axis=1)
    shares = [
        _share(columns, g, xp) for columns in (linear, xp.concatenate([linear, hidden], axis=1))
    ]
    return xp.clip(xp.stack(shares), -1.0, 1.0).astype(np.float32)


@functools.cache
def _drawn(inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same random maps at each boundary of each run."""
    random = np.random.default_rng([20_260, inputs])
    return (
        random.standard_normal((inputs, _MOST_INPUTS)),
        random.standard_normal((inputs, _HIDDEN)),
        random.uniform(-1.0, 1.0, _HIDDEN),
    )


def _share(columns: Any, g: Any, xp: Any) -> Any:
    half = len(columns) // 2
    halves = (columns[:half], g[:half]), (columns[half:], g[half:])
    missed = sum(
        xp.sum((other_g - other @ _fitted(own, own_g, xp)) ** 2)
        for (own, own_g), (other, other_g) in (halves, halves[::-1])
    )
    total = xp.sum(g**2)
    # A total that is not finite is neither above 0 nor 0.
    share = 1.0 - missed / xp.where(total > 0.0, total, 1.0)
    return xp.where(total > 0.0, share, xp.where(total == 0.0, 0.0, xp.nan))


def _fitted(columns: Any, g: Any, xp: Any) -> Any:
    ridge = _RIDGE * xp.eye(columns.shape[1], dtype=columns.dtype)
    products = columns.T @ columns / len(columns) + ridge
    return _solved(products, columns.T @ g / len(columns), xp)


def _solved(products: Any, right: Any, xp: Any) -> Any:
    """The solution of a system that is positive definite."""
    if xp is np:
        return np.linalg.solve(products, right)
    # LAPACK within a program that is mapped may wait for a thread that waits for it. Gauss and
    # Jordan's elimination needs no pivots here.
    import jax

    def eliminate(row: Any, both: Any) -> Any:
        own = both[row] / both[row, row]
        return (both - both[:, row][:, None] * own).at[row].set(own)

    both = xp.concatenate([products, right], axis=1)
    return jax.lax.fori_loop(0, len(products), eliminate, both)[:, len(products) :]
