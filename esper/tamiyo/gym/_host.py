"""The hosts of a gym: multilayer perceptrons of many shapes, filled up to one.

Units that are not there have rows and columns of 0, and stay so in training; layers that are not
there are passed by. So hosts of all shapes are one program under `jax.vmap`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from esper.tamiyo.graph import Edges, Flow, Node, make_topology, pad_topology
from esper.tamiyo.gym._families import CLASSES, INPUTS
from esper_functional import Layer, linear

WIDTH = INPUTS
"""Of the widest layer, and room for the input: so one kernel's shape fits all sites."""

OUT = "out"
"""The last layer, in which nothing is grafted."""


class Shape(NamedTuple):
    """Of one host; i32 `[]` each."""

    inputs: Any
    """Features of an example."""
    width: Any
    """Units of each hidden layer, 1 to `WIDTH`."""
    depth: Any
    """Hidden layers, from 1."""


def site_names(depth: int) -> tuple[str, ...]:
    """Of the hidden layers, in each of which kernels may be grafted."""
    return tuple(f"layers.{i}" for i in range(depth))


def network(
    params: Any, site: Any, x: Float[Array, "batch inputs"], depth: Int32[Array, ""], most: int,
    layer: Layer = linear,
) -> Float[Array, "batch classes"]:  # fmt: skip
    """Logits; hidden layers from `depth` on are passed by."""
    for i, name in enumerate(site_names(most)):
        y = jax.nn.relu(site(name, layer, params[name], x))
        x = y if i == 0 else jnp.where(i < depth, y, x)
    return linear(params[OUT], x)[:, :CLASSES]


def first_params(key: jax.Array, shape: Shape, most: int) -> dict[str, Any]:
    """Weights and biases uniform in ±1/√inputs, as torch and Equinox do; 0 where no unit is."""
    keys = jax.random.split(key, most + 1)
    params: dict[str, Any] = {}
    for i, name in enumerate((*site_names(most), OUT)):
        inputs = shape.inputs if i == 0 else shape.width
        outputs = jnp.asarray(CLASSES) if name == OUT else shape.width
        there = jnp.logical_or(i < shape.depth, name == OUT)
        params[name] = _linear(keys[i], inputs, outputs, there)
    return params


def _linear(key: jax.Array, inputs: Any, outputs: Any, there: Any) -> dict[str, jax.Array]:
    bound = jnp.asarray(inputs).astype(jnp.float32) ** -0.5
    draw = jax.random.uniform(key, (WIDTH, WIDTH + 1), minval=-1.0, maxval=1.0) * bound
    rows = (jnp.arange(WIDTH) < outputs)[:, None] & there
    columns = (jnp.arange(WIDTH) < inputs)[None, :]
    weight = jnp.where(rows & columns, draw[:, :WIDTH], 0.0)
    return {"weight": weight, "bias": jnp.where(rows[:, 0], draw[:, WIDTH], 0.0)}


class Counted(NamedTuple):
    """What a host is, by node: its hidden layers, then `OUT`."""

    sizes: Any
    """f32 `[nodes, 3]`: parameters, inputs, outputs; as in `Readings`."""
    flops: Any
    """f32 `[nodes]`: of one example."""


def count(shape: Shape, most: int, nodes: int) -> Counted:
    """What the host costs, layer by layer; 0 for rows that are not there."""
    row = jnp.arange(nodes)
    hidden, last = row < shape.depth, row == most
    inputs = jnp.where(row == 0, shape.inputs, shape.width)
    outputs = jnp.where(last, CLASSES, shape.width)
    there = hidden | last
    inputs, outputs = (jnp.where(there, own, 0).astype(jnp.float32) for own in (inputs, outputs))
    parameters = inputs * outputs + outputs
    sizes = jnp.stack([parameters, inputs, outputs], axis=1)
    return Counted(sizes, 2.0 * inputs * outputs + outputs)


def edges_by_depth(most: int, nodes: int) -> Edges:
    """The edges of hosts of depth 1 to `most`, stacked: a host's are those at its depth less 1."""
    return jax.tree.map(lambda *own: np.stack(own), *(_edges(d, most, nodes) for d in _to(most)))


def _to(most: int) -> range:
    return range(1, most + 1)


def _edges(depth: int, most: int, nodes: int) -> Edges:
    count = depth + 1
    flow = Flow(tuple(range(count)), frozenset((i, i + 1) for i in range(depth)))
    site = [Node(str(i), "linear", (), (), 0) for i in range(count)]
    packed = pad_topology(make_topology(site, flow), nodes=nodes, slots=2, more=0)
    # The last layer keeps its row, however many there are before it.
    place = np.arange(nodes, dtype=np.int32)
    place[depth], place[most] = most, depth
    return packed._replace(
        slots=np.where(packed.taken, place[packed.slots], 0)[:, place],
        slot_kinds=packed.slot_kinds[:, place],
        taken=packed.taken[:, place],
        there=packed.there[place],
    )
