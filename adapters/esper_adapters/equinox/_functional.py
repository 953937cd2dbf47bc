"""The flat form of an Equinox model, for hot loops under plain `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax

from esper_adapters.equinox._layer import is_linear, path_name
from esper_adapters.equinox._model import SeededModel
from esper_functional import Network, Site


class FunctionalModel(NamedTuple):
    """A network over explicit parameters."""

    net: Network
    """`net(params, site, x)` for one example x."""
    params: Any
    """The host's parameters: a pytree of arrays, the rest None."""
    combine: Callable[[Any], Any]
    """From parameters back to the Equinox host."""


class _SiteCall:
    """Stands in for a layer with seeds while the network is traced."""

    def __init__(self, name: str, site: Site, layer: eqx.nn.Linear) -> None:
        self.name, self.site, self.layer = name, site, layer

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        def call(layer: eqx.nn.Linear, x: Any) -> Any:
            return layer(x, key=key)

        return self.site(self.name, call, self.layer, x)


def to_functional(model: SeededModel) -> FunctionalModel:
    """The host as a pure function of its parameters, with the model's sites.

    The network is one object per call: keep it, and compiled programs are kept.
    """
    params, static = eqx.partition(model.host, eqx.is_inexact_array)
    sites = frozenset(model.sites)

    def combine(params: Any) -> Any:
        return eqx.combine(params, static)

    def net(params: Any, site: Site, x: Any) -> Any:
        def at_site(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            return _SiteCall(name, site, leaf) if name in sites and is_linear(leaf) else leaf

        host = jax.tree_util.tree_map_with_path(at_site, combine(params), is_leaf=is_linear)
        return host(x)

    return FunctionalModel(net, params, combine)
