"""The kernels of a gym: blueprints, filled up to one shape.

Hosts of many widths share one program where each kernel is one for the widest, with the rows and
columns of units that are not there at 0. They stay at 0: what reaches such a unit is 0, so is what
comes back from it, and an optimiser moves nothing whose gradient has always been 0. This
holds for operations that take 0 to 0; others are refused.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tamiyo.graph import COSTS, describe_costs, describe_operations
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tezzeret._resolve import Graph, resolve
from esper_functional import Kernel, kernel_id_words

_KEEP_ZERO = frozenset({"linear", "relu", "gelu", "silu", "tanh", "add", "multiply", "residual"})


class Offered(NamedTuple):
    """One kernel that an environment offers."""

    blueprint: str
    width: int
    """Of what the blueprint names its one size: hidden units, or a rank."""


class _Spec(NamedTuple):
    """One parameter of a kernel, for every host."""

    name: str
    shape: tuple[int, ...]
    """Filled up."""
    true: np.ndarray
    """i32 `[offers, inputs, outputs, rank]`: what of it is there, by the host's sizes less 1."""
    bound: np.ndarray
    """f32 `[offers, inputs, outputs]`: of its uniform first values; 0 for zeros."""


class KernelTable:
    """What an environment offers, by row: programs, first parameters, costs.

    Args:
        offers: at least one.
        width: of the widest site, on both sides.

    Raises:
        InputError: for a blueprint that cannot be filled up, or that has not just one size.
    """

    def __init__(self, offers: Sequence[Offered], width: int) -> None:
        if not offers:
            raise InputError("an environment offers no kernel: name at least one")
        self.offers = tuple(offers)
        self.names = tuple(dict.fromkeys(offer.blueprint for offer in offers))
        self.program_of = np.array([self.names.index(o.blueprint) for o in offers], np.int32)
        self.patterns: tuple[Kernel, ...] = tuple(
            _pattern(name, max(o.width for o in offers if o.blueprint == name), width)
            for name in self.names
        )
        sizes = range(1, width + 1)
        graphs = [[[_graph(offer, i, o) for o in sizes] for i in sizes] for offer in offers]
        self.parameters = np.array(
            [[[g.parameter_count for g in row] for row in rows] for rows in graphs], np.float32
        )
        """f32 `[offers, inputs, outputs]`, sizes less 1."""
        self.flops = np.array(
            [[[g.flops for g in row] for row in rows] for rows in graphs], np.float32
        )
        self.ids = tuple(hashlib.sha256(repr(tuple(o)).encode()).hexdigest() for o in offers)
        """By row: what stands for a kernel's id where controllers see it."""
        self.id_words = np.array([kernel_id_words(own) for own in self.ids], np.int32)
        self.described = np.stack([_described(offer.blueprint) for offer in offers])
        """f32 `[offers, KERNEL - COSTS]`: what describes them beside their costs."""
        self._specs = [
            [_spec(self, graphs, program, name, leaf.shape) for name, leaf in kernel.params.items()]
            for program, kernel in enumerate(self.patterns)
        ]

    def first_params(
        self, key: jax.Array, row: Any, inputs: Any, outputs: Any
    ) -> tuple[dict[str, jax.Array], ...]:
        """First parameters of the kernel of a row, for each program; 0 for programs not its own.

        Args:
            row: i32 `[]`, which may be traced as all that follows.
            inputs: of the site, from 1.
            outputs: of the site, from 1.
        """
        own = jnp.asarray(self.program_of)[row]
        found: list[dict[str, jax.Array]] = []
        for program, specs in enumerate(self._specs):
            params: dict[str, jax.Array] = {}
            for place, spec in enumerate(specs):
                bound = jnp.asarray(spec.bound)[row, inputs - 1, outputs - 1]
                there = jnp.asarray(spec.true)[row, inputs - 1, outputs - 1]
                here = own == program
                for axis, size in enumerate(spec.shape):
                    line = jnp.arange(size) < there[axis]
                    here = here & line.reshape(-1, *[1] * (len(spec.shape) - 1 - axis))
                at = jax.random.fold_in(jax.random.fold_in(key, program), place)
                draw = jax.random.uniform(at, spec.shape, minval=-1.0, maxval=1.0)
                params[spec.name] = jnp.where(here, draw * bound, 0.0)
            found.append(params)
        return tuple(found)


def _pattern(name: str, most: int, width: int) -> Kernel:
    blueprint = load_blueprint(name)
    return kernel_from_blueprint(blueprint, _signature(width, width), sizes={_size_of(name): most})


def _signature(inputs: int, outputs: int) -> KernelSignature:
    return KernelSignature(input_shape=(inputs,), output_shape=(outputs,))


def _size_of(name: str) -> str:
    blueprint = load_blueprint(name)
    strange = sorted({node.op for node in blueprint.nodes} - _KEEP_ZERO)
    if strange or len(blueprint.sizes) != 1:
        raise InputError(
            f"the blueprint {name!r} cannot be offered by a gym: expected one named size, and"
            f" operations among {', '.join(sorted(_KEEP_ZERO))}; it has the sizes"
            f" {', '.join(blueprint.sizes) or 'none'}"
            + (f", and {', '.join(strange)}" if strange else "")
        )
    return next(iter(blueprint.sizes))


def _graph(offer: Offered, inputs: int, outputs: int) -> Graph:
    blueprint = load_blueprint(offer.blueprint)
    sizes = {_size_of(offer.blueprint): offer.width}
    return resolve(blueprint, _signature(inputs, outputs), sizes)


def _described(name: str) -> np.ndarray:
    blueprint = load_blueprint(name)
    operations = describe_operations(blueprint)
    own = describe_costs(
        0.0, 0.0, 1.0, 1.0,
        birth=blueprint.birth, confidence=blueprint.confidence, operations=operations,
    )  # fmt: skip
    return own[COSTS:]


def _spec(
    table: KernelTable, graphs: list[list[list[Graph]]], program: int, name: str,
    shape: tuple[int, ...],
) -> _Spec:  # fmt: skip
    count = len(graphs[0])
    true = np.zeros((len(graphs), count, count, len(shape)), np.int32)
    bound = np.zeros((len(graphs), count, count), np.float32)
    for row, rows in enumerate(graphs):
        if table.program_of[row] != program:
            continue
        for i in range(count):
            for o in range(count):
                spec = next(s for s in rows[i][o].parameters if s.name == name)
                if spec.init not in ("fan_in", "zeros"):
                    raise InputError(
                        f"the blueprint {table.names[program]!r} cannot be offered by a gym: its"
                        f" {name} is born as {spec.init}, and expected are fan_in or zeros"
                    )
                true[row, i, o] = spec.shape
                bound[row, i, o] = 0.0 if spec.init == "zeros" else spec.fan_in**-0.5
    return _Spec(name, shape, true, bound)
