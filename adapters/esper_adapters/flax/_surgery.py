"""How NNX models are taken apart and put together: as graphs of mutable modules.

Nothing here changes a module that it was given: it changes a clone, which shares
the arrays and no `Variable`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esper_adapters._errors import tied_weights
from esper_adapters._functional import (
    Call,
    FunctionalModel,
    StaticTree,
    call_layer,
    forward_and_faults,
    join_arrays,
    split_arrays,
)
from esper_adapters._graft import Blending, Graft
from esper_adapters._naming import HOST_FIELD, describe_array, two_of_a_name
from esper_adapters._plain import check_stateless, plain_function
from esper_adapters._surgery import Linear, Probed, Signature, Stripped, Surgery
from esper_adapters.flax._layer import GraftedLayer, StandIn, blending_of, kernel_params
from esper_functional import Live, Plan, Site


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(part) for part in path if part != HOST_FIELD)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    own = node if isinstance(node, Mapping) else vars(node)
    # Cloning sorts a module's attributes; here they always are.
    named = sorted(own.items(), key=lambda item: str(item[0]))
    return [(key, value) for key, value in named if not str(key).startswith("_pytree__")]


def modules(model: Any) -> dict[str, Any]:
    """All callable modules by path, but for the model itself; attributes in sorted order.

    A shared module has several paths; a grafted layer stands for its host as well.
    """
    found: dict[str, Any] = {}

    def visit(node: Any, path: tuple[Any, ...], around: tuple[int, ...]) -> None:
        if not isinstance(node, nnx.Module | list | tuple | dict) or id(node) in around:
            return
        if path and isinstance(node, nnx.Module) and callable(node):
            outer = found.setdefault(_name(path), node)
            if outer is not node and not isinstance(outer, StandIn):
                raise two_of_a_name(_name(path))
        for key, child in _children(node):
            visit(child, (*path, key), (*around, id(node)))

    visit(model, (), ())
    return found


def exchange(model: Any, old: Any, new: Any) -> Callable[[], None]:
    """Put `new` wherever the graph refers to `old`; returns what undoes it."""
    undo: list[Callable[[], None]] = []

    def put(parent: Any, key: Any, value: Any) -> None:
        if isinstance(parent, nnx.List):
            parent[key] = value
        else:
            setattr(parent, key, value)

    parents = [module for _, module in nnx.iter_modules(model)]
    for parent in parents:
        for key, value in _children(parent):
            if value is old:
                put(parent, key, new)
                undo.append(lambda parent=parent, key=key: put(parent, key, old))
            elif isinstance(value, dict | list | tuple):
                leaves, structure = jax.tree.flatten(value, is_leaf=_is_module)
                if any(leaf is old for leaf in leaves):
                    changed = [new if leaf is old else leaf for leaf in leaves]
                    put(parent, key, nnx.data(jax.tree.unflatten(structure, changed)))
                    undo.append(
                        lambda parent=parent, key=key, value=value: put(
                            parent, key, nnx.data(value)
                        )
                    )

    def undone() -> None:
        for step in reversed(undo):
            step()

    return undone


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Module)


def _deepest_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: -name.count("."))


def graft(host: Any, grafts: Mapping[str, Graft]) -> Any:
    """A clone of the host, with grafted layers."""
    model = nnx.clone(host)
    layers = modules(model)
    for name in _deepest_first(list(grafts)):
        exchange(model, layers[name], GraftedLayer(layers[name], grafts[name]))
    return model


def strip(module: Any) -> Stripped:
    """A clone without grafts, and what the grafted layers hold."""
    model = nnx.clone(module)
    kernels: dict[str, Mapping[int, Any]] = {}
    blending: dict[str, Blending] = {}
    grafted = [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, GraftedLayer)]
    for path, layer in sorted(grafted, key=lambda item: -len(item[0])):
        kernels[_name(path)], blending[_name(path)] = kernel_params(layer), blending_of(layer)
        exchange(model, layer, layer.esper_host)
    return Stripped(model, kernels, blending)


def signature(layer: Any) -> Signature | None:
    """Of a linear layer, whose weights say it."""
    if not _is_linear(layer):
        return None
    weight = layer.kernel[...]
    inputs, outputs = weight.shape
    dtype = weight.dtype if layer.dtype is None else jnp.dtype(layer.dtype)
    return Signature((inputs,), (outputs,), dtype, dtype)


class SiteLayer(StandIn):
    """A layer of a traced network, whose calls go through a site."""

    def __init__(self, layer: nnx.Module, name: str, site: Site) -> None:
        self.esper_host = layer
        self.esper_name = name
        self.esper_site = site

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.esper_site(self.esper_name, call_layer, self.esper_host, *args, **options)


def stacked(layer: Any) -> bool:
    """Whether a linear layer has the weights of several, for a scan or a map over layers."""
    return isinstance(layer, nnx.Linear) and layer.kernel[...].ndim > 2


def functional(host: Any, sites: Sequence[str], call: Call | None = None) -> FunctionalModel:
    """The host over its `nnx.Param`s; an input that is a tuple is its arguments."""
    call = call or (lambda model, *args: model(*args))
    graph, params, rest = nnx.split(host, nnx.Param, ...)
    stateful = bool(jax.tree.leaves(rest))
    chosen = tuple(sites)

    def combine(params: Any, rest: Any = rest) -> Any:
        return nnx.merge(graph, params, rest, copy=True)

    def net(params: Any, site: Site, x: Any) -> Any:
        state, x = x if stateful else (rest, x)
        model = combine(params, state)
        layers = modules(model)
        undo = [
            exchange(model, layers[name], SiteLayer(layers[name], name, site))
            for name in _deepest_first(chosen)
        ]
        y = call(model, *x) if isinstance(x, tuple) else call(model, x)
        if not stateful:
            return y
        for step in reversed(undo):
            step()
        return y, nnx.split(model, nnx.Param, ...)[2]

    return FunctionalModel(net, params, combine, rest if stateful else None)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _probe(
    graph: Any,
    sites: tuple[str, ...],
    planned: Plan,
    call: Call | None,
    static: StaticTree,
    state: Any,
    live: Live | None,
    arrays: Sequence[Any],
) -> Probed:
    flat = functional(nnx.merge(graph, state), sites, call)
    args = join_arrays(arrays, static)
    x = args if flat.rest is None else (flat.rest, args)
    y, faults = forward_and_faults(flat.net, planned, flat.params, live, x)
    return (y if flat.rest is None else y[0]), faults


def probe(
    host: Any,
    sites: tuple[str, ...],
    planned: Plan,
    live: Live | None,
    args: tuple[Any, ...],
    call: Call | None,
) -> Probed:
    """One forward pass on whatever the model takes; its state stays as it was."""
    graph, state = nnx.split(host)
    arrays, static = split_arrays(args)
    return _probe(graph, sites, planned, call, static, state, live, arrays)


def _is_linear(layer: Any) -> bool:
    """Whether it is an `nnx.Linear` that computes what its class does."""
    if not isinstance(layer, nnx.Linear) or type(layer).__call__ is not nnx.Linear.__call__:
        return False
    return not stacked(layer)


def linear(layer: Any) -> Linear | None:
    """The weights of a linear layer."""
    if not _is_linear(layer):
        return None
    weight = np.asarray(layer.kernel[...]).T
    return Linear(weight, None if layer.bias is None else np.asarray(layer.bias[...]))


def _holds(module: Any, layer: Any) -> bool:
    """Whether a module has a `Variable` of a layer for its own."""
    own = [child for _, child in _children(module)]
    leaves = jax.tree.leaves(own, is_leaf=lambda n: isinstance(n, nnx.Module | nnx.Variable))
    return any(leaf is layer.kernel or (leaf is layer.bias is not None) for leaf in leaves)


def with_linear(host: Any, name: str, weights: Linear) -> Any:
    """A clone of the host with other weights in one linear layer.

    Raises:
        FoldError: for weights that are another layer's too.
    """
    model = nnx.clone(host)
    layer = modules(model)[name]
    if any(m is not layer and _holds(m, layer) for _, m in nnx.iter_modules(model)):
        raise tied_weights(name)
    layer.kernel[...] = jnp.asarray(weights.weight.T)
    if weights.bias is not None:
        layer.bias[...] = jnp.asarray(weights.bias)
    return model


def plain(host: Any, grafts: Mapping[str, Graft], signatures: Mapping[str, Signature]) -> Any:
    """A clone with grafted layers as `nnx.Sequential` of a function with parameters."""
    model = nnx.clone(host)
    layers = modules(model)
    for name in _deepest_first(list(grafts)):
        layer = layers[name]
        # Keys of random streams and the like stay as they are.
        variables = [v for _, v in _variables(layer) if _is_inexact(v)]
        evaluate, own = plain_function(
            _pure_call(name, layer, variables),
            [variable[...] for variable in variables],
            grafts[name],
            signatures[name],
            batched=True,
        )
        kernels = [nnx.Param(leaf) if _is_inexact(leaf) else nnx.Variable(leaf) for leaf in own]
        function = jax.tree_util.Partial(evaluate, *variables, *kernels)
        exchange(model, layer, nnx.Sequential(nnx.data(function)))
    return model


def _variables(module: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The variables of a module by path; without arrays that are none."""
    state = nnx.to_flat_state(nnx.state(module))
    return [(path, leaf) for path, leaf in state if isinstance(leaf, nnx.Variable)]


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf[...].dtype, jnp.inexact))


def _pure_call(
    name: str, layer: Any, variables: Sequence[Any]
) -> Callable[[Sequence[Any], Any], Any]:
    """A layer's call as a function of the values of its variables."""

    def call(own: Sequence[Any], x: Any) -> Any:
        copied, pairs = nnx.clone((layer, list(variables)))
        for variable, value in zip(pairs, own, strict=True):
            variable[...] = value
        before = [v[...] for _, v in _variables(copied)]
        y = copied(x)
        after = zip(_variables(copied), before, strict=True)
        changed = [_name(path) for (path, v), old in after if v[...] is not old]
        check_stateless(f"layer {name!r}", changed)
        return y

    return call


def structure(module: Any) -> tuple[Any, dict[str, str]]:
    """Grafts, and variables by path, kind and shape; but not modes, such as `deterministic`."""
    state = nnx.to_flat_state(nnx.state(module))
    arrays = {
        ".".join(map(str, path)): f"{type(leaf).__name__} {describe_array(leaf[...])}"
        for path, leaf in state
    }
    grafted = [(p, m) for p, m in nnx.iter_modules(module) if isinstance(m, GraftedLayer)]
    return [(path, layer.esper_anatomy) for path, layer in grafted], arrays


SURGERY = Surgery(
    framework="flax",
    layers=modules,
    signature=signature,
    stacked=stacked,
    graft=graft,
    strip=strip,
    grafted=modules,
    structure=structure,
    functional=functional,
    probe=probe,
    linear=linear,
    with_linear=with_linear,
    plain=plain,
    mutable=True,
)
