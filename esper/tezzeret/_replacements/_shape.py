"""Shapes: what lies where."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

F = "nn.functional."

_MODES: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""numpy's names of torch's modes of padding."""


def _expand(x: Any, sizes: Sequence[int]) -> Any:
    old = (1,) * (len(sizes) - x.ndim) + x.shape
    shape = [before if size == -1 else size for before, size in zip(old, sizes, strict=True)]
    return jnp.broadcast_to(x, shape)


def _slice(x: Any, dim: int, start: int | None, end: int | None, step: int = 1) -> Any:
    size = x.shape[dim]
    # An open batch compares with nothing; a slice of all of it never comes here.
    if not isinstance(size, int):
        raise NotImplementedError("a part of the batch")
    return lax.slice_in_dim(x, *slice(start, end, step).indices(size), axis=dim % x.ndim)


def _select(x: Any, dim: int, index: int) -> Any:
    return lax.index_in_dim(x, index, axis=dim % x.ndim, keepdims=False)


def _to(x: Any, dtype: Any) -> Any:
    return x.astype(jnp.dtype(str(dtype).removeprefix("torch.")))


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    # torch names the last axis first.
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    if mode != "constant":
        for axis, pair in enumerate(pairs, x.ndim - len(pairs)):
            index = np.pad(np.arange(x.shape[axis]), pair, _MODES[mode])
            x = jnp.take(x, index, axis=axis)
        return x
    widths = [(0, 0, 0)] * (x.ndim - len(pairs)) + [(low, high, 0) for low, high in pairs]
    return lax.pad(x, jnp.asarray(0.0 if value is None else value, x.dtype), widths)


def _pixel_shuffle(x: Any, factor: int) -> Any:
    batch, channels, height, width = x.shape
    split = x.reshape(batch, channels // factor**2, factor, factor, height, width)
    moved = split.transpose(0, 1, 4, 2, 5, 3)
    return moved.reshape(batch, channels // factor**2, height * factor, width * factor)


SHAPES: dict[str, Callable[..., Any]] = {
    "reshape": jnp.reshape,
    "transpose": jnp.swapaxes,
    "permute": jnp.transpose,
    "broadcast_to": _expand,
    "cat": lambda tensors, dim=0: jnp.concatenate(tensors, axis=dim),
    "stack": lambda tensors, dim=0: jnp.stack(tensors, axis=dim),
    "select": _select,
    "slice": _slice,
    "to": _to,
    F + "pad": _pad,
    F + "pixel_shuffle": _pixel_shuffle,
    "flip": lambda x, dims: jnp.flip(x, axis=tuple(dims)),
    "detach": lax.stop_gradient,
}
