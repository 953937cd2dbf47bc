"""Comparing what tests compute: by the one table, or bit by bit."""

from typing import Any

import jax
import numpy as np

from esper_functional import difference


def assert_close(actual: Any, expected: Any) -> None:
    """Same shape and dtype, values within the table; NaN equals NaN, integers are exact."""
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if b.dtype.kind in "biu":
        np.testing.assert_array_equal(a, b)
        return
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    zero = b.dtype.type(0)
    gap = difference(np.where(np.isnan(a), zero, a), np.where(np.isnan(b), zero, b))
    assert gap.within, f"differs by {gap.largest:.3g}, allowed {gap.allowed:.3g}"


def assert_tree_close(actual: Any, expected: Any) -> None:
    """Same structure, and every leaf close."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Same structure, dtypes, shapes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def assert_finite(tree: Any) -> None:
    """No NaN and no infinity anywhere, and something to look at."""
    leaves = jax.tree.leaves(tree)
    assert leaves
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
