"""A host on jax with its sites, as the programs of a run call it: Equinox or Flax NNX.

Equinox hosts take one example and are mapped over a batch; NNX hosts take a batch, and
may have a state of their own (running statistics, random streams), which training carries
from step to step and judging leaves as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tamiyo.graph import Node, Topology, kind_of, make_topology
from esper.tamiyo.graph.jax_flow import jax_flow
from esper.tolaria._jax_survey import Site, Survey, add_kept, keep, site_signature, survey
from esper.tolaria.tasks import CustomHost, Host
from esper_adapters.equinox import FunctionalModel, SeededModel, to_functional
from esper_functional import (
    KasminaException,
    Live,
    Observed,
    Plan,
    SeedIndexError,
    forward,
    forward_batch,
    shadow_forward,
    shadow_forward_batch,
)


class _Nudged:
    """A site that adds to what some layers return, and keeps what they took and gave."""

    def __init__(self, site: Any, nudges: Mapping[str, Any], context: Sequence[Any]) -> None:
        self._site = site
        self._nudges = nudges
        self._context = context
        self.seen: dict[str, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def __call__(self, name: str, layer: Any, params: Any, /, *args: Any, **options: Any) -> Any:
        result = self._site(name, layer, params, *args, **options)
        if name not in self._nudges:
            return result
        several = isinstance(result, tuple | list)
        first: Any = result[0] if several else result
        given = args[0] if args else next(iter(options.values()))
        self.seen[name] = (keep(given, self._context), keep(first, self._context))
        nudged = add_kept(first, self._nudges[name])
        return type(result)((nudged, *result[1:])) if several else nudged


@dataclasses.dataclass(frozen=True)
class Network:
    """A host's structure, with sites; parameters come with every call."""

    model: SeededModel
    training: FunctionalModel
    judging: FunctionalModel
    mapped: bool
    """Whether the host takes one example."""
    keyed: bool
    """Whether training gives it random keys."""
    survey: Survey
    example: jax.ShapeDtypeStruct
    """One example, as the host takes it."""

    @functools.cached_property
    def topology(self) -> Topology:
        """Which site feeds which, as the host trains."""
        layers = self.model.surgery.layers(self.model.host)
        nodes: list[Node] = []
        for name in self.model.sites:
            site = self.survey.sites[name]
            shapes = ((), ()) if isinstance(site, str) else (site.whole_inputs, site.whole_outputs)
            layer = layers[name]
            parameters = sum(array.size for array in _parameters(layer))
            nodes.append(Node(name, kind_of(type(layer)), *shapes, parameters))
        run = _training_run(self.training, self.mapped, self.keyed)
        two = jax.ShapeDtypeStruct((2, *self.example.shape), self.example.dtype)
        return make_topology(
            nodes, jax_flow(lambda site, x: run(site, x)[0], self.model.sites, two)
        )

    @property
    def stateful(self) -> bool:
        """Whether it has a state besides its parameters."""
        return self.training.rest is not None

    def first(self, host: Host, seed: int) -> tuple[Any, Any]:
        """First parameters and state, in this structure.

        Functions that a module was built with, such as an activation, are new objects in each
        building, so what is built now has another structure to jax, and only its arrays are taken.

        Raises:
            InputError: where a seed changes more of a host than its values.
        """
        built = self.model.surgery.functional(host.jax(seed), self.model.sites, self.model.call)
        found = []
        for own, new in ((self.training.params, built.params), (self.training.rest, built.rest)):
            shapes = [_shapes(tree) for tree in (own, new)]
            if shapes[0] != shapes[1]:
                changed = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
                raise InputError(
                    f"the host {host.name!r} is another network for seed {seed} than for seed 0,"
                    f" first in {changed[0][0]!r}: expected a function whose seed decides the"
                    " values of arrays and nothing else"
                )
            found.append(jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(new)))
        return found[0], found[1]

    def by_site(self, params: Any, rest: Any) -> list[list[Any]]:
        """The host's parameters, or what is shaped like them, at each site."""
        host = self.training.combine(*((params, rest) if self.stateful else (params,)))
        layers = self.model.surgery.layers(host)
        return [_parameters(layers[name]) for name in self.model.sites]

    def signature(self, name: str) -> KernelSignature:
        """What a kernel of a layer takes and gives; see `site_signature`."""
        surgery = self.model.surgery
        linear = surgery.signature(surgery.layers(self.model.host)[name])
        return site_signature(name, linear, self.survey.sites[name])

    def probed(self, name: str) -> Site:
        """What is known of a layer that is to be probed.

        Raises:
            InputError: for a layer that the host does not call once in a pass.
        """
        site = self.survey.sites[name]
        if isinstance(site, str):
            raise InputError(
                f"layer {name!r} cannot be probed: {site}. Let kernels be grafted elsewhere, by"
                " `grow_at`, or take triggers and initialisations that need no probe"
            )
        return site

    def _inputs(self, rest: Any, x: Any, key: Any) -> Any:
        return _inputs(self.training, self.mapped, self.keyed, rest, x, key)

    def train(
        self, plan: Plan, params: Any, live: Live | None, rest: Any, x: Any, key: Any
    ) -> tuple[Any, Observed, Any]:
        """Outputs, what was seen, and the host's next state."""
        run = forward_batch if self.mapped else forward
        y, seen = run(self.training.net, plan, params, live, self._inputs(rest, x, key))
        return (y[0], seen, y[1]) if self.stateful else (y, seen, None)

    def shadows(
        self, plan: Plan, params: Any, live: Live | None, rest: Any, x: Any, key: Any
    ) -> tuple[Sequence[Any], Observed]:
        """The outputs of each incubating kernel's shadow."""
        run = shadow_forward_batch if self.mapped else shadow_forward
        ys, seen = run(self.training.net, plan, params, live, self._inputs(rest, x, key))
        return [y[0] if self.stateful else y for y in ys], seen

    def judge(
        self, plan: Plan, params: Any, live: Live | None, rest: Any, x: Any
    ) -> tuple[Any, Observed]:
        """Outputs as the network is judged (no dropout, running statistics), and the kernels'."""
        run = forward_batch if self.mapped else forward
        inputs = (rest, x) if self.stateful else x
        y, seen = run(self.judging.net, plan, params, live, inputs, capture=True)
        return (y[0] if self.stateful else y), seen

    def probe(
        self, plan: Plan, params: Any, live: Live | None, rest: Any, x: Any,
        nudges: Mapping[str, Any],
    ) -> tuple[Any, Mapping[str, tuple[Any, Any]]]:  # fmt: skip
        """Outputs with `nudges` added to what sites return; what each takes and returns, by name.

        Args:
            nudges: by name, shaped as the sites' outputs, the axes of maps inside of the host
                included.
        """
        run = forward_batch if self.mapped else forward

        def net(params: Any, own: Any, given: Any) -> Any:
            x, nudges = given
            nudged = _Nudged(own, nudges, [x])
            y = self.judging.net(params, nudged, (rest, x) if self.stateful else x)
            return (y[0] if self.stateful else y), nudged.seen

        return run(net, plan, params, live, (x, dict(nudges)))[0]


def _inputs(flat: FunctionalModel, mapped: bool, keyed: bool, rest: Any, x: Any, key: Any) -> Any:
    if keyed:
        x = (x, jax.random.split(key, len(x)) if mapped else key)
    return x if flat.rest is None else (rest, x)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _call_keyed(module: Any, x: Any, key: Any = None) -> Any:
    """How Equinox modules that draw random numbers take one example."""
    return module(x, key=key)


def narrow(tree: Any, precision: str) -> Any:
    """What a forward pass computes with, in another precision; what is no float stays."""
    if precision == "float32":
        return tree
    dtype = jnp.dtype(precision)

    def of_leaf(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(of_leaf, tree)


def _narrow_equinox(module: Any, precision: str) -> Any:
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    return eqx.combine(narrow(arrays, precision), static)


def _narrow_nnx(module: Any, precision: str) -> Any:
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return nnx.merge(graph, narrow(params, precision), rest, copy=True)


def network_of(
    host: Host,
    *,
    seeds_per_layer: int,
    blend: str,
    isolate: bool,
    grow_at: tuple[str, ...],
    example: jax.ShapeDtypeStruct,
    precision: str = "float32",
) -> Network:
    """Wrap a host: all of its linear layers have seeds, and those of `grow_at`.

    Args:
        example: one example, as the data has it.
        precision: "float32" or "bfloat16", of forward and backward passes.

    Raises:
        InputError: for a module of neither framework, or one that cannot be called on an example
            or does not return one array for it.
        SeedIndexError: where `grow_at` names a layer that is not there.
    """
    module = host.jax(0)
    call, keyed = (host.call, host.keyed) if isinstance(host, CustomHost) else (None, False)
    options: dict[str, Any] = {
        "seeds_per_layer": seeds_per_layer,
        "blend": blend,
        "isolate": isolate,
        "call": call,
    }
    if isinstance(module, eqx.Module):
        from esper_adapters.equinox import wrap

        module = _narrow_equinox(module, precision)
        judged, mapped = eqx.nn.inference_mode(module), call is None
        layers = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, eqx.nn.Linear))
        linear: tuple[type, ...] = (eqx.nn.Linear,)
        if keyed and mapped:
            options["call"] = _call_keyed
    else:
        from flax import nnx

        from esper_adapters.flax import wrap

        if not isinstance(module, nnx.Module):
            raise InputError(
                f"the host {host.name!r} builds a {type(module).__name__} for jax: expected an"
                " equinox.Module or a flax.nnx.Module"
            )
        module = _narrow_nnx(module, precision)
        judged, mapped = nnx.clone(module), False
        layers = [own for _, own in nnx.iter_modules(module)]
        linear = (nnx.Linear,)
        judged.eval()
    targets = (*(linear if any(isinstance(own, linear) for own in layers) else ()), *grow_at)
    short = precision if jnp.issubdtype(example.dtype, jnp.floating) else example.dtype
    given = jax.ShapeDtypeStruct(example.shape, short)
    batch = given if mapped else jax.ShapeDtypeStruct((1, *given.shape), given.dtype)
    keys = (jax.eval_shape(lambda: jax.random.key(0)),) if keyed else ()
    try:
        model: SeededModel = wrap(module, target_layers=targets, example=(batch, *keys), **options)
    except SeedIndexError:
        raise
    except KasminaException as error:
        raise InputError(
            f"the host {host.name!r} cannot be grown on jax: {error}. A module that draws random"
            " numbers by keys needs CustomHost(..., keyed=True), and one that is not called as"
            " module(x) needs CustomHost(..., call=call)"
        ) from error
    judging: SeededModel = wrap(judged, target_layers=targets, **options)
    flat = to_functional(model)
    run = _training_run(flat, mapped, keyed)
    found = survey(host.name, run, flat.rest, model.sites, given)
    return Network(model, flat, to_functional(judging), mapped, keyed, found, given)


def _parameters(layer: Any) -> list[Any]:
    if isinstance(layer, eqx.Module):
        return jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    from flax import nnx

    return jax.tree.leaves(nnx.state(layer, nnx.Param))


def _training_run(flat: FunctionalModel, mapped: bool, keyed: bool) -> Callable[..., Any]:
    """`run(site, x)` of a batch, as it trains: what the host returns, and its next state."""

    def run(site: Any, x: Any) -> tuple[Any, Any]:
        def net(own: Any) -> Any:
            return flat.net(flat.params, site, own)

        given = _inputs(flat, mapped, keyed, flat.rest, x, jax.random.key(0) if keyed else None)
        y = jax.vmap(net)(given) if mapped else net(given)
        return (y, None) if flat.rest is None else y

    return run
