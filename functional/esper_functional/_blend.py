"""Blending a host's output with its kernels' outputs.

With host output h, running seeds with alphas a_i, outputs k_i and s = Σ a_i:

    convex       h·(1 − min(s, 1)) + Σ a_i·k_i / max(s, 1)
    residual     h + Σ a_i·k_i
    sequential   y ← (1 − a_i)·y + a_i·k_i, in seed order, from y = h

The weights depend on the alphas alone, so they are computed where the alphas
change, on the host; `mix` spends nothing on them. A kernel output that is not
finite is replaced by what leaves the blend as it was without it: h under
convex, 0 under residual, y under sequential.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Bool, Float32

from esper_functional._arrays import Array, namespace
from esper_functional._errors import BlendError

Blend = Literal["convex", "residual", "sequential"]
BLENDS: tuple[Blend, ...] = get_args(Blend)


def check_blend(name: str) -> Blend:
    """`name`, if it is a blend; raises `BlendError` naming those there are."""
    if name in BLENDS:
        return name
    near = difflib.get_close_matches(str(name), BLENDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BlendError(f"unknown blend {name!r}: expected one of {', '.join(BLENDS)}{hint}")


class BlendWeights(NamedTuple):
    """What `mix` multiplies outputs by."""

    host: Float32[Array, "*layers"]
    """Weight of the host's output."""
    kernels: Float32[Array, "*layers seeds"]
    """Weights of the kernels' outputs; 0 where a seed does not run."""


def blend_weights(
    blend: str,
    alpha: Float32[Array, "*layers seeds"],
    runs: Bool[Array, "*layers seeds"],
) -> BlendWeights:
    """The weights of one blend, for every layer at once."""
    check_blend(blend)
    xp = namespace(alpha, runs)
    a = xp.where(runs, alpha, xp.asarray(0.0, dtype=xp.float32))
    ones = xp.ones(a.shape[:-1], dtype=xp.float32)
    if blend != "convex":
        return BlendWeights(ones, a)
    total = xp.sum(a, axis=-1, dtype=xp.float32)
    return BlendWeights(ones - xp.minimum(total, ones), a / xp.maximum(total, ones)[..., None])


def mix(
    blend: str,
    host: Any,
    outputs: Sequence[Any],
    finite: Sequence[Any],
    host_weight: Any,
    weights: Sequence[Any],
    where: Callable[[Any, Any, Any], Any],
) -> Any:
    """Blend `outputs` into `host`; the one definition for jax, numpy and torch.

    Args:
        host: h, `[..., features]`.
        outputs: the k_i, in seed order, each of h's shape.
        finite: for each a bool that broadcasts against it; False replaces.
        host_weight: weight of h, a scalar of h's dtype.
        weights: weight of each k_i, likewise.
        where: the framework's `where`.
    """
    if check_blend(blend) == "convex":
        y = host * host_weight
        for k, ok, w in zip(outputs, finite, weights, strict=True):
            y = y + where(ok, k, host) * w
        return y
    y = host
    for k, ok, w in zip(outputs, finite, weights, strict=True):
        if blend == "residual":
            y = y + where(ok, k, 0.0) * w
        else:
            y = y * (1.0 - w) + where(ok, k, y) * w
    return y
