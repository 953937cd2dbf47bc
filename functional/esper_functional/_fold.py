"""Folding an affine kernel into the weights of its host.

A kernel k(x) = A·x + c on a linear host h(x) = W·x + b can be taken into W and b, so
that the blend of what remains gives the output of before. With alpha a of the
folded kernel and s = Σ a_j over all that run:

    convex, s ≤ 1   W' = ((1 − s)·W + a·A) / (1 − s + a), likewise b'
    residual        W' = W + a·A
    sequential      W' = (1 − a)·W + a·A, for the first kernel in seed order
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from esper_functional._blend import check_blend
from esper_functional._errors import FoldError
from esper_functional._kernel import Kernel
from esper_functional._tolerance import difference

_PROBES = 32
_SEED = 20
_ROUNDING = 1e-6


class Affine(NamedTuple):
    """k(x) = matrix·x + offset."""

    matrix: Float[np.ndarray, "out in"]
    offset: Float[np.ndarray, " out"]


def affine_form(kernel: Kernel, in_features: int, dtype: Any = jnp.float32) -> Affine:
    """The matrix and offset of a kernel of vectors, if it is affine; see `affine_of`.

    Raises:
        FoldError: for a kernel that is not affine, or not one of vectors.
    """
    apply = jax.jit(kernel.program.apply)

    def evaluate(rows: np.ndarray) -> np.ndarray:
        return np.asarray(apply(kernel.params, jnp.asarray(rows, dtype))).astype(np.float64)

    rank = kernel.program.example_rank
    return affine_of(evaluate, str(kernel.program.key), rank, in_features, np.dtype(dtype).name)


def affine_of(
    evaluate: Callable[[np.ndarray], np.ndarray],
    name: str,
    example_rank: int,
    in_features: int,
    dtype: str,
) -> Affine:
    """The matrix and offset of a function of vectors, if it is affine.

    Found by running it on the axes, and checked on 32 random points at scales from 0.1 to
    10 by the table of tolerances.

    Args:
        evaluate: `[rows, in]` in float64 to `[rows, out]` in float64; rounds to `dtype` itself.
        name: the kernel, for messages.

    Raises:
        FoldError: for a kernel that is not affine, or not one of vectors.
    """
    if example_rank != 1:
        raise FoldError(
            f"kernel {name} takes examples of rank {example_rank}, and only kernels of vectors can"
            " be folded into a linear layer's weights: fossilise it instead"
        )
    values = evaluate(np.concatenate([np.zeros((1, in_features)), np.eye(in_features)]))
    offset = values[0]
    matrix = (values[1:] - offset).T
    random = np.random.default_rng(_SEED)
    scales = 10.0 ** random.uniform(-1.0, 1.0, (_PROBES, 1))
    probes = np.asarray(random.normal(size=(_PROBES, in_features)) * scales, jnp.dtype(dtype))
    probes = probes.astype(np.float64)
    gap = difference(evaluate(probes), probes @ matrix.T + offset, dtype)
    if not gap.within:
        raise FoldError(
            f"kernel {name} is not affine, so it cannot be folded into its host's"
            f" weights: it differs from its own linear part by up to {gap.largest:.3g} (allowed"
            f" {gap.allowed:.3g}). Fossilise it instead, and export_plain keeps it beside the host"
        )
    return Affine(matrix, offset)


def fold_linear(
    weight: Float[np.ndarray, "out in"],
    bias: Float[np.ndarray, " out"] | None,
    own: Affine,
    blend: str,
    alphas: Float[np.ndarray, " runs"],
    place: int,
) -> tuple[Float[np.ndarray, "out in"], Float[np.ndarray, " out"] | None]:
    """The host's weight and bias with one running kernel taken in.

    Args:
        own: the kernel's `affine_form`.
        alphas: of all kernels that run at the site, in seed order.
        place: which of them is folded.

    Raises:
        BlendError: for an unknown blend.
        FoldError: where the rest could not be blended as before, or a bias is missing.
    """
    check_blend(blend)
    a, total = float(alphas[place]), float(np.sum(alphas))
    if blend == "convex":
        if total > 1.0 + _ROUNDING:
            raise FoldError(
                f"fold: the alphas of this layer sum to {total:.4g}, and above 1 taking one kernel"
                " away changes the weights of the others: lower them to a sum of at most 1"
            )
        total = min(total, 1.0)
        rest = 1.0 - total + a
        if rest <= 0.0:
            raise FoldError(
                "fold: a kernel at alpha 0 on a layer whose host has no weight left leaves nothing"
                " to fold into: unload the kernel"
            )
        host_part, kernel_part = (1.0 - total) / rest, a / rest
    elif blend == "residual":
        host_part, kernel_part = 1.0, a
    else:
        if place:
            raise FoldError(
                "fold: under the sequential blend only the first kernel in seed order can be"
                " folded: fold those before it first"
            )
        host_part, kernel_part = 1.0 - a, a
    folded = host_part * weight.astype(np.float64) + kernel_part * own.matrix
    if bias is None:
        if np.any(kernel_part * own.offset):
            raise FoldError(
                "fold: the kernel adds a constant and its host has no bias to take it: give the"
                " host a bias, or fossilise the kernel instead"
            )
        return folded.astype(weight.dtype), None
    shift = host_part * bias.astype(np.float64) + kernel_part * own.offset
    return folded.astype(weight.dtype), shift.astype(bias.dtype)
