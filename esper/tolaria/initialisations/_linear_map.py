"""The last linear map of a kernel as a problem of least squares.

A map's inputs are laid out as rows: one for each example and position, so that a linear layer of
vectors or sequences and a convolution are one and the same, `rows @ weight + bias`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from esper.tezzeret import GraphNode
from esper.tolaria.initialisations._anatomy import DENSE, on_cpu

RIDGE = 1e-3
"""Of ridge regression, in units of the mean square of a feature (Hoerl and Kennard, 1970)."""


def design(node: GraphNode, values: np.ndarray) -> np.ndarray:
    """What each output position of a dense map sees, f64 `[groups, rows, inputs]`.

    Args:
        values: `[examples, *shape]` with any number of features or channels that the map's groups
            divide. Of a convolution, the inputs of a row are ordered by channel, then by window.
    """
    if node.op.kind == "linear":
        return values.reshape(1, -1, values.shape[-1]).astype(np.float64)
    op: Any = node.op
    groups = int(op.groups)
    patches = patches_of(node, values)
    examples, width = patches.shape[:2]
    rows = patches.reshape(examples, groups, width // groups, -1)
    return rows.transpose(1, 0, 3, 2).reshape(groups, -1, width // groups).astype(np.float64)


def patches_of(node: GraphNode, values: np.ndarray) -> np.ndarray:
    """The same in its place: `[examples, inputs, *space]`, and of a linear layer `values`."""
    if node.op.kind == "linear":
        return values
    return on_cpu(_cut, _Geometry(node.op, values.shape[1]), values)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A convolution that takes its input apart: one output channel for each input of a row."""

    op: Any
    channels: int

    def __hash__(self) -> int:
        return hash((self.op.kind, self.op.window, self.channels))


@partial(jax.jit, static_argnums=0)
def _cut(geometry: _Geometry, values: Any) -> Any:
    # The operation itself, with weights of 0 and 1: strides, paddings and dilations are its own.
    op, channels = geometry.op, geometry.channels
    size = op.window**op.AXES
    one_each = np.tile(np.eye(size, dtype=np.float32), (channels, 1))
    weight = one_each.reshape(channels * size, 1, *(op.window,) * op.AXES)
    apart = op.model_copy(update={"features": channels * size, "groups": channels, "bias": False})
    return apart.jax([values], {"weight": weight})


def output_rows(node: GraphNode, outputs: np.ndarray) -> np.ndarray:
    """Outputs of a dense map as rows, f64 `[groups, rows, outputs]`."""
    if node.op.kind == "linear":
        return outputs.reshape(1, -1, outputs.shape[-1]).astype(np.float64)
    op: Any = node.op
    groups, (examples, width) = int(op.groups), outputs.shape[:2]
    rows = outputs.reshape(examples, groups, width // groups, -1)
    return rows.transpose(1, 0, 3, 2).reshape(groups, -1, width // groups).astype(np.float64)


def fitted(
    node: GraphNode,
    weight_shape: tuple[int, ...],
    features: np.ndarray,
    standardised: np.ndarray,
    target: np.ndarray,
) -> dict[str, np.ndarray]:
    """The map's parameters by role, by ridge regression of `target` on what it sees; f64.

    Args:
        features: the map's input, `[examples, *shape]`.
        standardised: what a map of each feature multiplies by its factors, `[examples, *out]`.
        target: `[examples, *out]`.
    """
    offset = "bias" in node.params
    if node.op.kind in DENSE:
        rows, goals = design(node, features), output_rows(node, target)
        solved = [_ridge(x, y, offset) for x, y in zip(rows, goals, strict=True)]
        # [groups, inputs, outputs] to PyTorch's layout, [outputs of all groups, inputs, window].
        weight = np.concatenate([w.T for w, _ in solved]).reshape(weight_shape)
        bias = np.concatenate([b for _, b in solved])
    else:
        axis = feature_axis(node)
        rows = np.moveaxis(standardised, axis, -1).reshape(-1, standardised.shape[axis])
        goals = np.moveaxis(target, axis, -1).reshape(rows.shape)
        each = [
            _ridge(x[:, None], y[:, None], offset)
            for x, y in zip(rows.T.astype(np.float64), goals.T.astype(np.float64), strict=True)
        ]
        weight = np.array([w[0, 0] for w, _ in each])
        bias = np.array([b[0] for _, b in each])
    return {"weight": weight, "bias": bias} if offset else {"weight": weight}


def feature_axis(node: GraphNode) -> int:
    """The axis of a batch along which a map of each feature has its factors."""
    if node.op.kind == "layer_scale":
        op: Any = node.op
        return op.axis % len(node.output_shape) + 1
    return -1 if node.op.kind in ("layer_norm", "rms_norm") else 1


def _ridge(x: np.ndarray, y: np.ndarray, offset: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[inputs, outputs]` and offsets `[outputs]`, of which the latter are not penalised.

    argmin |x w + b - y|² / rows + ridge · mean(x²) · |w|².
    """
    mean_x = x.mean(0) if offset else np.zeros(x.shape[1])
    mean_y = y.mean(0) if offset else np.zeros(y.shape[1])
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    level = np.trace(gram) / len(gram)
    # Features that do not vary, but for rounding, tell nothing: dividing by their spread would.
    if level <= 1e-12 * max(float((x * x).mean()), np.finfo(np.float64).tiny):
        weights = np.zeros((x.shape[1], y.shape[1]))
    else:
        moment = centred.T @ (y - mean_y) / len(x)
        weights = np.linalg.solve(gram + RIDGE * level * np.eye(len(gram)), moment)
    return weights, mean_y - mean_x @ weights if offset else mean_y
