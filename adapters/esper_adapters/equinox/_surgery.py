"""How Equinox models are taken apart and put together: as pytrees of modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from esper_adapters._errors import tied_weights
from esper_adapters._functional import Call, FunctionalModel, call_layer, forward_and_faults
from esper_adapters._graft import Blending, Graft
from esper_adapters._naming import HOST_FIELD, describe_array, two_of_a_name
from esper_adapters._plain import PLAIN_ADVICE, plain_function
from esper_adapters._surgery import Linear, Probed, Signature, Stripped, Surgery
from esper_adapters.equinox._layer import GraftedLayer, graft_layer, is_stateful
from esper_functional import KasminaException, Live, Plan, Site

Path = jax.tree_util.KeyPath


def path_name(path: Path) -> str:
    """A pytree path as a dotted name, such as `layers.0`, of the layer in the bare host."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return ".".join(part for part in name.split(".") if part != HOST_FIELD)


def rebuild(tree: Any, change: Callable[[str, Any], Any]) -> Any:
    """The tree with `change(path, module)` in place of every module, the inner ones first."""

    def visit(node: Any, path: Path) -> Any:
        def child(inner: Path, leaf: Any) -> Any:
            return visit(leaf, (*path, *inner)) if isinstance(leaf, eqx.Module) else leaf

        rebuilt = jax.tree_util.tree_map_with_path(
            child, node, is_leaf=lambda n: n is not node and isinstance(n, eqx.Module)
        )
        return change(path_name(path), rebuilt) if isinstance(node, eqx.Module) else rebuilt

    return visit(tree, ())


def _collect(tree: Any, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Modules by path, the outer ones first; a grafted layer stands for its host as well."""
    found: dict[str, Any] = {}

    def visit(node: Any, path: Path) -> None:
        name = path_name(path)
        if isinstance(node, eqx.Module) and wanted(node) and name:
            outer = found.setdefault(name, node)
            if outer is not node and not isinstance(outer, GraftedLayer):
                raise two_of_a_name(name)
        inner = jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda n: n is not node and isinstance(n, eqx.Module)
        )
        for step, leaf in inner:
            if isinstance(leaf, eqx.Module):
                visit(leaf, (*path, *step))

    visit(tree, ())
    return found


def layers(host: Any) -> dict[str, Any]:
    """All callable modules by path, but for the model itself."""
    return _collect(host, callable)


def signature(layer: Any) -> Signature | None:
    """Of a linear layer, whose weights say it."""
    if not _is_linear(layer):
        return None
    outputs, inputs = layer.weight.shape
    return Signature((inputs,), (outputs,), layer.weight.dtype, layer.weight.dtype)


def stacked(layer: Any) -> bool:
    """Whether a linear layer has the weights of several, for a scan or a map over layers."""
    return isinstance(layer, eqx.nn.Linear) and eqx.is_array(layer.weight) and layer.weight.ndim > 2


def graft(host: Any, grafts: Mapping[str, Graft]) -> Any:
    """The host itself where there is nothing to graft."""
    if not grafts:
        return host
    return rebuild(
        host,
        lambda name, layer: graft_layer(layer, grafts[name]) if name in grafts else layer,
    )


def strip(module: Any) -> Stripped:
    """The bare host of a network, and what its grafted layers hold."""
    kernels: dict[str, Mapping[int, Any]] = {}
    blending: dict[str, Blending] = {}

    def change(name: str, node: Any) -> Any:
        if not isinstance(node, GraftedLayer):
            return node
        kernels[name], blending[name] = node.esper_kernels, node.esper_blending
        return node.esper_host

    return Stripped(rebuild(module, change), kernels, blending)


class _Call(eqx.nn.StatefulLayer):
    """A module of a traced network, in a layer's place."""

    esper_host: Any
    """A part of the tree, so that `eqx.nn.Shared` finds what it ties."""
    esper_name: str = eqx.field(static=True)
    esper_site: Site = eqx.field(static=True)

    def is_stateful(self) -> bool:
        return is_stateful(self.esper_host)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.esper_site(self.esper_name, call_layer, self.esper_host, *args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "esper_")):
            raise AttributeError(name)
        return getattr(self.esper_host, name)


def functional(host: Any, sites: Sequence[str], call: Call | None = None) -> FunctionalModel:
    """The host over its inexact arrays; an input that is a tuple is its arguments."""
    call = call or (lambda network, *args: network(*args))
    params, static = eqx.partition(host, eqx.is_inexact_array)
    chosen = frozenset(sites)

    def combine(params: Any) -> Any:
        return eqx.combine(params, static)

    def net(params: Any, site: Site, x: Any) -> Any:
        def change(name: str, layer: Any) -> Any:
            if name not in chosen:
                return layer
            return _Call(  # pyright: ignore[reportCallIssue] (an abstract method, not a field)
                esper_host=layer, esper_name=name, esper_site=site
            )

        network = rebuild(combine(params), change)
        return call(network, *x) if isinstance(x, tuple) else call(network, x)

    return FunctionalModel(net, params, combine)


@eqx.filter_jit
def probe(
    host: Any,
    sites: tuple[str, ...],
    planned: Plan,
    live: Live | None,
    args: tuple[Any, ...],
    call: Call | None,
) -> Probed:
    """One forward pass over a batch, by `call`, or for a network of one example."""
    flat = functional(host, sites, call)
    if call is not None:
        return forward_and_faults(flat.net, planned, flat.params, live, args)
    x = args[0] if len(args) == 1 else args
    return forward_and_faults(flat.net, planned, flat.params, live, x, batched=True)


def _is_linear(layer: Any) -> bool:
    """Whether it is an `eqx.nn.Linear` of vectors that computes what its class does."""
    if not isinstance(layer, eqx.nn.Linear) or type(layer).__call__ is not eqx.nn.Linear.__call__:
        return False
    scalars = "scalar" in (layer.in_features, layer.out_features)
    return eqx.is_array(layer.weight) and not scalars and not stacked(layer)


def linear(layer: Any) -> Linear | None:
    """The weights of a linear layer of vectors."""
    if not _is_linear(layer):
        return None
    bias = None if layer.bias is None else np.asarray(layer.bias)
    return Linear(np.asarray(layer.weight), bias)


def _tied(host: Any, name: str) -> bool:
    """Whether a layer lies within an `eqx.nn.Shared`."""
    shared = _collect(host, lambda node: isinstance(node, eqx.nn.Shared))
    inside = any(name.startswith(f"{path}.") for path in shared)
    return inside or isinstance(host, eqx.nn.Shared)


def with_linear(host: Any, name: str, weights: Linear) -> Any:
    """The host with other weights in one linear layer.

    Raises:
        FoldError: for a layer that is tied to others.
    """
    if _tied(host, name):
        raise tied_weights(name)

    def change(path: str, layer: Any) -> Any:
        if path != name:
            return layer
        layer = eqx.tree_at(lambda own: own.weight, layer, jnp.asarray(weights.weight))
        if weights.bias is None:
            return layer
        return eqx.tree_at(lambda own: own.bias, layer, jnp.asarray(weights.bias))

    return rebuild(host, change)


def plain(host: Any, grafts: Mapping[str, Graft], signatures: Mapping[str, Signature]) -> Any:
    """Grafted layers as `eqx.nn.Lambda` of a function that carries their parameters."""
    for name in grafts:
        if _tied(host, name):
            raise KasminaException(
                f"export_plain: layer {name!r} is tied to others by eqx.nn.Shared, which would not"
                f" find its parameters in a function: {PLAIN_ADVICE}"
            )

    def change(name: str, layer: Any) -> Any:
        if name not in grafts:
            return layer
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        own, structure = jax.tree.flatten(params)

        def call(own: Sequence[Any], x: Any) -> Any:
            return eqx.combine(jax.tree.unflatten(structure, own), static)(x)

        evaluate, kernels = plain_function(call, own, grafts[name], signatures[name], batched=False)
        return eqx.nn.Lambda(jax.tree_util.Partial(evaluate, *own, *kernels))

    return rebuild(host, change)


def structure(module: Any) -> tuple[Any, dict[str, str]]:
    """The tree, and the shape and dtype of each of its arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): describe_array(leaf)
        for path, leaf in leaves
        if eqx.is_array(leaf)
    }
    return jax.tree.structure(module), arrays


SURGERY = Surgery(
    framework="equinox",
    layers=layers,
    signature=signature,
    stacked=stacked,
    graft=graft,
    strip=strip,
    grafted=lambda module: _collect(module, callable),
    structure=structure,
    functional=functional,
    probe=probe,
    linear=linear,
    with_linear=with_linear,
    plain=plain,
    mutable=False,
)
