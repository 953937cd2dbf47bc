"""What a host on jax shows when it is traced on a few examples; nothing is run."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from pydantic import ValidationError

from esper.contracts import KernelSignature
from esper.errors import InputError

Context = Sequence[Any]
"""Arrays that the host was given: a map that maps none of them lies inside of the host."""


@custom_vmap
def _kept(values: Any, context: Context) -> Any:
    return values


@_kept.def_vmap
def _kept_rule(_: int, in_batched: Any, values: Any, context: Context) -> Any:
    return _kept(values, context), in_batched[0] and any(in_batched[1])


def keep(values: Any, context: Context) -> Any:
    """An array, with a leading axis for each `jax.vmap` inside of the host; without gradient."""
    stop = jax.lax.stop_gradient
    return _kept(stop(values), [stop(array) for array in context])


@custom_vmap
def _nudged(value: Any, nudge: Any) -> Any:
    # Only shapes count: where this is not under a map, the two are of one shape.
    return value + nudge.sum(axis=tuple(range(nudge.ndim - value.ndim)))


@_nudged.def_vmap
def _nudged_rule(_: int, in_batched: Any, value: Any, nudge: Any) -> Any:
    if in_batched[0] and not in_batched[1]:
        return add_kept(value, nudge), True
    axes = [0 if batched else None for batched in in_batched]
    return jax.vmap(add_kept, in_axes=axes)(value, nudge), True


def add_kept(value: Any, nudge: Any) -> Any:
    """Add an array of the shape that `keep` gives, each call of a map inside its own part."""
    nudge = nudge.astype(value.dtype)
    return value + nudge if value.shape == nudge.shape else _nudged(value, nudge)


def stage() -> Any:
    """What identifies the program being traced; maps and derivatives do not count."""
    return getattr(jnp.zeros((), jnp.bool_), "_trace", None)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Shapes of a layer's input and output, as it sees them."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]


class _Recorder:
    """A site that notes what each layer takes and gives."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stage = stage()
        self.calls: dict[str, list[_Call | str]] = {}
        self.arrays: dict[str, list[Any]] = {}
        """Input and output of each call, with the axes of maps inside of the host."""

    def __call__(self, name: str, layer: Any, params: Any, /, *args: Any, **options: Any) -> Any:
        result = layer(params, *args, **options)
        x: Any = args[0] if args else next(iter(options.values()), None)
        h: Any = result[0] if isinstance(result, tuple | list) and result else result
        calls = self.calls.setdefault(name, [])
        if not all(hasattr(array, "shape") and hasattr(array, "dtype") for array in (x, h)):
            calls.append("it does not take and return arrays")
        elif stage() is not self._stage:
            calls.append("its host calls it inside jax.jit, jax.checkpoint, a scan or a loop")
        else:
            calls.append(_Call((x.shape, h.shape), (str(x.dtype), str(h.dtype))))
            self.arrays.setdefault(name, []).extend(keep(a, self._context) for a in (x, h))
        return result


@dataclasses.dataclass(frozen=True)
class Site:
    """What one call of a layer took and gave; shapes are of one example."""

    inputs: tuple[int, ...]
    """As the layer sees it: without the axes of maps inside of the host."""
    outputs: tuple[int, ...]
    whole_inputs: tuple[int, ...]
    """With them."""
    whole_outputs: tuple[int, ...]
    dtypes: tuple[str, str]
    batch_axis: int
    """In the whole input and output."""
    leads: bool
    """Whether the batch, where the layer sees it, is its first axis."""


class Linear(Protocol):
    """The sizes of a linear layer, as its weights say them."""

    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def input_dtype(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of a host from tracing it."""

    sites: Mapping[str, Site | str]
    """By name; in words why nothing is known, where that is so."""
    outputs: tuple[int, ...]
    """Shape of what the host returns for one example."""

    def positions(
        self, names: Iterable[str], rank: int, wanted: tuple[int, ...] | None = None
    ) -> int:
        """How often a kernel runs for one example: at its layer, or at the layers that it fits.

        Args:
            names: of the layers.
            rank: axes of the kernel's input.
            wanted: their sizes, where it is not known which of the layers it is for.
        """
        sites = [self.sites[name] for name in names]
        shapes = [site.whole_inputs for site in sites if isinstance(site, Site)]
        fits = [shape for shape in shapes if wanted in (None, shape[-rank:])]
        return max((math.prod(shape[:-rank]) for shape in fits), default=1)


def survey(
    name: str,
    run: Callable[[Any, Any], tuple[Any, Any]],
    rest: Any,
    names: Sequence[str],
    example: jax.ShapeDtypeStruct,
) -> Survey:
    """Trace a host on two and on three examples.

    Args:
        name: of the host, for messages.
        run: `run(site, x)` gives the outputs of a batch and the host's next state.
        rest: the state before.
        names: of the layers with seeds.
        example: one example.

    Raises:
        InputError: for a host that does not return one array with the batch first, or whose state
            changes its type in a step.
    """
    two, three = (_traced(name, run, rest, example, count) for count in (2, 3))
    sites = {
        layer: _site(*(own.get(layer, ([], [])) for own in (two[0], three[0]))) for layer in names
    }
    return Survey(sites, two[1])


_Calls = tuple[list[_Call | str], list[Any]]


def _traced(
    name: str, run: Any, rest: Any, example: jax.ShapeDtypeStruct, count: int
) -> tuple[dict[str, _Calls], tuple[int, ...]]:
    recorders: list[_Recorder] = []

    def recorded(x: Any) -> Any:
        recorder = _Recorder([x])
        recorders.append(recorder)
        y, after = run(recorder, x)
        return y, after, recorder.arrays

    x = jax.ShapeDtypeStruct((count, *example.shape), example.dtype)
    y, after, arrays = jax.eval_shape(recorded, x)
    if not isinstance(y, jax.ShapeDtypeStruct) or y.shape[:1] != (count,):
        found = list(y.shape) if isinstance(y, jax.ShapeDtypeStruct) else f"a {type(y).__name__}"
        raise InputError(
            f"the host {name} returned {found} for {count} examples: expected one array of outputs,"
            f" [{count}, ...], with the batch first"
        )
    _check_state(name, rest, after)
    calls = {layer: (own, arrays.get(layer, [])) for layer, own in recorders[-1].calls.items()}
    return calls, y.shape[1:]


def _check_state(name: str, before: Any, after: Any) -> None:
    """A state of another type would be another program in every step."""
    kinds = [
        {
            jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (before, after)
    ]
    for path in sorted(kinds[0].keys() | kinds[1].keys()):
        was, now = (kind.get(path, "nothing") for kind in kinds)
        if was != now:
            raise InputError(
                f"a training step of the host {name} makes of its state {path!r}, which is {was},"
                f" {now}: expected a state that keeps its shapes and dtypes. Create all of it when"
                " the module is built"
            )


def _batch_axis(two: Sequence[int], three: Sequence[int]) -> int | None:
    """The axis that is as long as the batch, in calls with two and with three examples."""
    if len(two) != len(three):
        return None
    changed = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    same = len(changed) == 1 and (two[changed[0]], three[changed[0]]) == (2, 3)
    return changed[0] if same else None


def _without(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != axis)


def _site(two: _Calls, three: _Calls) -> Site | str:
    if len(two[0]) != 1 or len(three[0]) != 1:
        return f"its host calls it {len(two[0])} times in a forward pass, and not once"
    one, other = two[0][0], three[0][0]
    if isinstance(one, str) or isinstance(other, str):
        return one if isinstance(one, str) else str(other)
    whole = [tuple(array.shape) for array in two[1]]
    pairs = zip(two[1], three[1], strict=True)
    axes = [_batch_axis(a.shape, b.shape) for a, b in pairs]
    if axes[0] is None or axes[0] != axes[1]:
        return "its input and output have no axis for the batch alone"
    # Under a map over the batch itself the layer sees no batch.
    seen = [_batch_axis(a, b) for a, b in zip(one.shapes, other.shapes, strict=True)]
    inputs, outputs = (_without(s, axis) for s, axis in zip(one.shapes, seen, strict=True))
    whole_inputs, whole_outputs = (_without(shape, axes[0]) for shape in whole)
    leads = seen in ([None, None], [0, 0])
    return Site(inputs, outputs, whole_inputs, whole_outputs, one.dtypes, axes[0], leads)


def site_signature(name: str, linear: Linear | None, site: Site | str) -> KernelSignature:
    """What a kernel of a layer takes and gives: by the layer's own sizes, else by the call.

    Linear layers take kernels of vectors, whatever axes lie around them.

    Args:
        linear: what a linear layer's weights say; None for other layers.

    Raises:
        InputError: for a layer that no kernel can be compiled for.
    """
    where = f"no kernel can be compiled for layer {name!r}"
    elsewhere = "Let kernels be grafted elsewhere, by `grow_at`"
    if linear is not None:
        inputs, outputs = linear.inputs, linear.outputs
        dtypes = (str(linear.input_dtype), str(linear.dtype))
    elif isinstance(site, str):
        raise InputError(f"{where}: {site}. {elsewhere}")
    elif not site.leads:
        raise InputError(
            f"{where}: the batch is not the first axis of what it takes and returns, where kernels"
            f" expect it. {elsewhere}"
        )
    else:
        inputs, outputs, dtypes = site.inputs, site.outputs, site.dtypes
        # A kernel of vectors serves a layer that keeps positions, at each of them.
        if len(inputs) == 2 and inputs[:-1] == outputs[:-1]:
            inputs, outputs = inputs[-1:], outputs[-1:]
        if len(inputs) not in (1, 3) or len(outputs) != len(inputs):
            raise InputError(
                f"{where}, which takes {list(inputs)} and returns {list(outputs)}: kernels are"
                f" compiled for vectors and for images [channels, height, width]. {elsewhere}"
            )
    found = sorted(set(dtypes))
    if len(found) != 1 or found[0] not in ("float32", "bfloat16"):
        raise InputError(
            f"{where}: kernels take and give float32 or bfloat16, and the layer is"
            f" {' and '.join(found)}. Cast the host, or let kernels be grafted elsewhere, by"
            " `grow_at`"
        )
    try:
        return KernelSignature(
            input_shape=inputs,
            output_shape=outputs,
            dtype=found[0],
        )
    except ValidationError as error:
        raise InputError(
            f"{where}, which takes {list(inputs)} and returns {list(outputs)}:"
            f" {error.errors()[0]['msg'].lower()}"
        ) from error
