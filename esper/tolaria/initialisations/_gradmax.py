"""GradMax: weights that change nothing yet, and are changed most by the first step.

Evci, van Merriënboer, Unterthiner, Pedregosa and Vladymyrov, GradMax: Growing Neural Networks
using Gradient Information, ICLR 2022, arXiv:2201.05125 (section 3). There, neurons are added
between two layers of a network; here, a kernel is that pair of layers, beside the host's layer.

With h what the kernel's hidden map reads, W that map, f what follows it, and Ω the kernel's last
map, the output is k = Ω f(W h). With W = 0 and f(0) = 0 the output is 0 and so is the gradient by
Ω, while that by W is f'(0) Ω^T M, with M = Σ g h^T the sum over examples and positions of gradient
by output times what is read. Of all maps Ω with given singular values, the norm of Ω^T M is largest
where Ω's left singular vectors are M's, in the same order (von Neumann's trace inequality).

So f has to be 0 at 0, and its derivative there has not to be: ELU, GELU, SiLU, tanh, and products
with what does not depend on W. A ReLU's derivative at 0 is 0 in jax and in torch.

The paper asks for the top left singular vectors and bounds the norm of Ω. With that bound alone the
largest norm is that of a map with every unit on the first vector, whose units would all be alike;
here each vector has its own unit, scaled by its singular value. So where singular values are nearly
equal, a random map of the same norm may have the larger gradient; one unit has the largest of all.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import svds

from esper.artifacts import Artifact
from esper.tamiyo import Probe
from esper.tezzeret import GraphNode
from esper.tolaria.initialisations._anatomy import (
    INPUT,
    Anatomy,
    anatomy_of,
    on_cpu,
    run_node,
    upstream,
)
from esper.tolaria.initialisations._linear_map import design, output_rows, patches_of
from esper.tolaria.initialisations._parameters import compiled, silenced, with_roles
from esper.tolaria.initialisations._vanishing import Branch, find_branch

_SMALLEST = 1e-6
"""Of the largest singular value: what is below it is rounding."""

_WHOLE = 256
"""Rows and columns of which all singular vectors are computed, where a few are needed."""

_FEW = 8
"""Directions that units with gates take turns at: the gates make them differ by themselves."""

_AT_ONCE = 1 << 26
"""Numbers that are held of what units see."""


def gradmax(artifact: Artifact, probe: Probe, scale: float) -> dict[str, np.ndarray]:
    """Parameters with output 0 and a gradient as large as the norm of the last map allows.

    The hidden map and all offsets on its way to the output are 0; the last map's weights have the
    norm `scale · √(outputs / 3)`, which is what random ones of PyTorch's default have. Where there
    are more hidden units than directions, a direction is used again with the opposite sign, then
    with half of its weight, and so on, so that no two units are alike. Where the gradient is zero
    no direction is better than another, and the answer is that of `zero_output`.

    Raises:
        InputError: where the graph has no hidden map that may be zero without being dead: a ReLU
            after it, whose derivative at 0 is 0, a normalisation, or groups.
    """
    anatomy = anatomy_of(artifact, "gradmax")
    last = anatomy.last
    branch = find_branch(anatomy, artifact.manifest.blueprint)
    params = silenced(compiled(artifact), branch.hidden)
    for node in (*branch.between, last):
        if "bias" in node.params:
            params = with_roles(params, node, {"bias": np.zeros_like(params[node.params["bias"]])})
    gradients = anatomy.pull_back(params, probe.gradients)
    read = anatomy.value(branch.hidden.op.inputs[0], params, probe.inputs)
    if branch.depends_on_input:
        weight = _unit_by_unit(anatomy, branch, params, probe.inputs, read, gradients)
    else:
        weight = _all_units(anatomy, branch, params, read, gradients)
    norm = float(np.sqrt((weight**2).sum()))
    if not norm > 0.0:
        return silenced(compiled(artifact), last)
    weight *= scale * np.sqrt(weight.shape[0] / 3.0) / norm
    shape = params[last.params["weight"]].shape
    return with_roles(params, last, {"weight": weight.reshape(shape)})


def _all_units(
    anatomy: Anatomy,
    branch: Branch,
    params: Mapping[str, np.ndarray],
    read: np.ndarray,
    gradients: np.ndarray,
) -> np.ndarray:
    """Where what follows the hidden map is one matrix J near 0: k ≈ Ω J W h.

    The gradient is J^T Ω^T M, so Ω's right singular vectors are J's left ones.

    Returns:
        `[outputs, units, window]`, of no particular norm.
    """
    moment = _moment(anatomy.last, patches_of(branch.hidden, read), gradients)
    many = branch.hidden.output_shape[_unit_axis(branch.hidden)]
    directions, sizes = _top(moment.reshape(-1, moment.shape[-1]), many)
    jacobian = _jacobian(anatomy, branch, params)
    if _is_diagonal(jacobian):
        # The singular vectors of a diagonal matrix, as they are where all its entries are equal.
        slopes = np.abs(np.diag(jacobian))
        order = np.argsort(-slopes, kind="stable")
        units, slopes = np.eye(len(slopes))[:, order], slopes[order]
    else:
        units, slopes, _ = np.linalg.svd(jacobian, full_matrices=False)
        units = _with_fixed_signs(units)
    weight = np.zeros((moment.shape[0] * moment.shape[1], units.shape[0]))
    for unit in range(units.shape[1] if len(sizes) else 0):
        which, share = _turn(unit, len(sizes))
        weight += (
            share * sizes[which] * slopes[unit] * np.outer(directions[:, which], units[:, unit])
        )
    by_window = weight.reshape(moment.shape[0], moment.shape[1], -1)
    return by_window.transpose(0, 2, 1)


def _unit_by_unit(
    anatomy: Anatomy,
    branch: Branch,
    params: Mapping[str, np.ndarray],
    x: np.ndarray,
    read: np.ndarray,
    gradients: np.ndarray,
) -> np.ndarray:
    """Where what follows depends on the input, as a gate does, each unit has an M of its own."""
    columns = []
    for own in _responses(anatomy, branch, params, x, patches_of(branch.hidden, read)):
        moment = _moment(anatomy.last, own, gradients)
        directions, sizes = _top(moment.reshape(-1, moment.shape[-1]), _FEW)
        column = np.zeros(moment.shape[:2])
        if len(sizes):
            which, share = _turn(len(columns), len(sizes))
            column = (share * sizes[which] * directions[:, which]).reshape(column.shape)
        columns.append(column)
    return np.stack(columns, axis=1)


def _moment(last: GraphNode, read: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """M = Σ g h^T, `[outputs, window, inputs]`.

    The gradient by the weights of the last map, if it read what the hidden map reads.
    """
    (goals,), (rows,) = output_rows(last, gradients), design(last, read)
    width = read.shape[-1] if last.op.kind == "linear" else read.shape[1]
    return (goals.T @ rows).reshape(goals.shape[1], width, -1).transpose(0, 2, 1)


def _top(moment: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` left singular vectors `[rows, rank]`, and values, the largest first."""
    if not moment.any():
        return moment[:, :0], np.zeros(0)
    least = min(moment.shape)
    if least > _WHOLE and count < least // 4:
        # From a fixed start, so that it takes the same steps every time.
        found: Any = svds(moment, k=count, v0=np.ones(least))
        left, sizes = found[0][:, ::-1], found[1][::-1]
    else:
        left, sizes, _ = np.linalg.svd(moment, full_matrices=False)
    rank = min(count, int((sizes > _SMALLEST * sizes[0]).sum()))
    return _with_fixed_signs(left[:, :rank]), sizes[:rank]


def _with_fixed_signs(vectors: np.ndarray) -> np.ndarray:
    """A singular vector's sign is the library's whim: here its largest entry is positive."""
    largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    return vectors * np.where(largest < 0, -1.0, 1.0)


def _turn(unit: int, directions: int) -> tuple[int, float]:
    """Which direction a unit has, and how much of it: 1, -1, ½, -½, ⅓ and so on."""
    which, turn = unit % directions, unit // directions
    return which, (1.0 if turn % 2 == 0 else -1.0) / (1 + turn // 2)


def _is_diagonal(matrix: np.ndarray) -> bool:
    return matrix.shape[0] == matrix.shape[1] and not (matrix - np.diag(np.diag(matrix))).any()


@dataclasses.dataclass(frozen=True, eq=False)
class _Slopes:
    jacobian: Any
    responses: Any


@lru_cache(maxsize=64)
def _slopes(anatomy: Anatomy, branch: Branch) -> _Slopes:
    hidden, features = branch.hidden, anatomy.features

    def tail(params: Any, pre: Any, values: dict[str, Any]) -> Any:
        values = {**values, hidden.name: pre}
        for node in branch.between:
            values[node.name] = run_node(node, [values[i] for i in node.op.inputs], params)
        return values[features]

    def jacobian(params: Any) -> Any:
        # One position stands for all: what lies between acts on each by itself.
        axis = _unit_axis(hidden)
        pre = jnp.zeros((1, *hidden.output_shape), jnp.float32)
        place = [0] * pre.ndim

        def push(unit: Any) -> Any:
            place[axis + 1] = unit
            tangent = pre.at[tuple(place)].set(1.0)
            _, out = jax.jvp(lambda p: tail(params, p, {}), (pre,), (tangent,))
            return jnp.moveaxis(out[0], axis, -1).reshape(-1, out.shape[axis + 1])[0]

        return jax.vmap(push, out_axes=1)(jnp.arange(hidden.output_shape[axis]))

    def responses(count: int, params: Any, x: Any, columns: Any, first: Any) -> Any:
        values: dict[str, Any] = {INPUT: x}
        for node in upstream(anatomy.graph, features):
            values[node.name] = run_node(node, [values[i] for i in node.op.inputs], params)
        pre, axis = values[hidden.name], _unit_axis(hidden) + 1

        def push(column: Any) -> Any:
            tangent = jnp.broadcast_to(jnp.expand_dims(column, axis), pre.shape)
            _, out = jax.jvp(lambda p: tail(params, p, values), (pre,), (tangent,))
            return jax.lax.dynamic_slice_in_dim(out, first, count, axis)

        return jax.lax.map(push, columns)

    return _Slopes(jax.jit(jacobian), jax.jit(responses, static_argnums=0))


def _unit_axis(hidden: GraphNode) -> int:
    """Which axis of an example is that of the units."""
    return len(hidden.output_shape) - 1 if hidden.op.kind == "linear" else 0


def _jacobian(anatomy: Anatomy, branch: Branch, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """J `[features, hidden]` of what follows the hidden map, at 0; f64."""
    shown = {name: np.asarray(p, np.float32) for name, p in params.items()}
    return on_cpu(_slopes(anatomy, branch).jacobian, shown).astype(np.float64)


def _responses(
    anatomy: Anatomy,
    branch: Branch,
    params: Mapping[str, np.ndarray],
    x: np.ndarray,
    read: np.ndarray,
    at_once: int = _AT_ONCE,
) -> Iterator[np.ndarray]:
    """For each unit, what its row of weights is multiplied by, in the form of `read`."""
    shown = {name: np.asarray(p, np.float32) for name, p in params.items()}
    axis = _unit_axis(branch.hidden) + 1
    columns = np.moveaxis(read, axis, 0).astype(np.float32)
    units = branch.hidden.output_shape[axis - 1]
    count = max(1, min(units, at_once // columns.size))
    program = _slopes(anatomy, branch).responses
    for first in range(0, units, count):
        # The last units come with some of those before them, so that one program serves all.
        begin = min(first, units - count)
        seen = on_cpu(program, count, shown, np.asarray(x, np.float32), columns, np.int32(begin))
        for own in np.moveaxis(seen, axis + 1, 0)[first - begin :]:
            yield np.moveaxis(own, 0, axis)
