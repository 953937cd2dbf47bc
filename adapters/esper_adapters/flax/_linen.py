"""Sites in Flax Linen modules, by interception: nothing about the module changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn

from esper_adapters._functional import join_arrays, split_arrays
from esper_adapters._select import Target, select_layers
from esper_functional import Site


def _path(module: nn.Module) -> str:
    return ".".join(module.path)


@contextmanager
def linen_sites(site: Site, names: Sequence[str]) -> Iterator[None]:
    """Let the calls of some layers go through a site, while a Linen module is applied.

    Args:
        site: what the network was given by the core.
        names: the layers' paths, as `find_linen_sites` gives them.

    With it a network for `esper_functional.plan`, `forward` and `execute` is written:

        def net(params, site, x):
            with linen_sites(site, names):
                return module.apply({"params": params}, x)
    """
    chosen = frozenset(names)

    def intercept(next_call: Any, args: Any, options: Any, context: Any) -> Any:
        name = _path(context.module)
        if context.method_name != "__call__" or name not in chosen:
            return next_call(*args, **options)

        def layer(_: Any, *args: Any, **options: Any) -> Any:
            return next_call(*args, **options)

        # Linen hands a layer its parameters itself.
        return site(name, layer, None, *args, **options)

    with nn.intercept_methods(intercept):
        yield


def find_linen_sites(
    module: nn.Module,
    variables: Any,
    *example: Any,
    target_layers: Target | Sequence[Target] = (nn.Dense,),
    **options: Any,
) -> tuple[str, ...]:
    """The paths of a Linen module's layers that match, in the order in which they run.

    Args:
        variables: the module's variables.
        example: arguments of one call; nothing is run.
        target_layers: types of layers, and paths such as `"blocks_0.*"`.
        options: further arguments of `module.apply`, such as `rngs` or `mutable`.

    Raises:
        SeedIndexError: for a target that no layer matches.
    """
    found: dict[str, Any] = {}

    def intercept(next_call: Any, args: Any, options: Any, context: Any) -> Any:
        name = _path(context.module)
        if context.method_name == "__call__" and name:
            found.setdefault(name, context.module)
        return next_call(*args, **options)

    with nn.intercept_methods(intercept):
        arrays, static = split_arrays(example)
        jax.eval_shape(
            lambda v, x: module.apply(v, *join_arrays(x, static), **options), variables, arrays
        )
    return select_layers(found, target_layers)
