"""`wrap` for Equinox models, and what their training needs."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from esper_adapters._functional import Call
from esper_adapters._seeded import Resolve, SeededModel
from esper_adapters._select import Target
from esper_adapters._wrap import seed_model
from esper_adapters.equinox._layer import GraftedLayer, shadow_layer
from esper_adapters.equinox._surgery import SURGERY


def _is_grafted(node: Any) -> bool:
    return isinstance(node, GraftedLayer)


def wrap(
    host: Any,
    *,
    target_layers: Target | Sequence[Target] = (eqx.nn.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
    resolve: Resolve | None = None,
    example: tuple[Any, ...] | None = None,
    call: Call | None = None,
) -> SeededModel:
    """Give layers of an Equinox model seeds. Nothing is copied, and leaves stay shared.

    Args:
        target_layers: types of layers, and paths such as `"layers.0"` or `"blocks.*.mlp"`.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        contain: contain the gradients of kernels; see `esper_functional.plan`.
        resolve: finds kernels by id.
        example: arguments of one call (arrays or `jax.ShapeDtypeStruct`, without a batch), by
            which every site's shapes are known, so that a kernel that does not fit is refused
            when it is loaded. Without, those of linear layers are known from their weights, and
            others are checked when the network is traced.
        call: `call(module, *args)`, how the model is run on a batch where that is not
            `jax.vmap(module)(*args)`: with keys, with a state, under an axis name. By it
            `observe`, `compare_with_original`, `example` and `to_functional` run the model,
            and all of them are then given what it takes. Keep one function: compiled programs
            are kept by it.

    Raises:
        SeedIndexError: for a target that no layer matches.
        BlendError: for an unknown blend.
    """
    return seed_model(
        host,
        SURGERY,
        target_layers=target_layers,
        seeds_per_layer=seeds_per_layer,
        blend=blend,
        isolate=isolate,
        contain=contain,
        resolve=resolve,
        example=example,
        call=call,
    )


def unwrap(model: SeededModel) -> Any:
    """The trained host, without seeds and kernels."""
    return model.host


def trainable(module: Any) -> Any:
    """A filter for `eqx.partition`: True for what an optimiser may change.

    False for blend weights, failure counts, and the parameters of fossils, which
    plain `eqx.is_inexact_array` would hand to weight decay.
    """

    def of_node(node: Any) -> Any:
        if not _is_grafted(node):
            return eqx.is_inexact_array(node)
        nothing = jax.tree.map(lambda _: False, node)
        frozen = {
            seed: run.frozen
            for seed, run in zip(node.esper_anatomy.seeds, node.esper_anatomy.runs, strict=True)
        }
        own = {
            seed: jax.tree.map(
                lambda leaf, keep=not frozen[seed]: keep and eqx.is_inexact_array(leaf), params
            )
            for seed, params in node.esper_kernels.items()
        }
        # The host of a grafted layer may hold grafted layers itself.
        host = trainable(node.esper_host)
        return eqx.tree_at(lambda n: (n.esper_host, n.esper_kernels), nothing, (host, own))

    return jax.tree.map(of_node, module, is_leaf=_is_grafted)


def shadows(module: Any) -> tuple[Any, ...]:
    """The network with each incubating kernel at alpha 1, one at a time.

    Add the loss of each to that of `module`, inside the function that is differentiated:
    gradients reach that kernel's parameters in it and nothing else. See
    `esper_functional.shadow_forward`.
    """
    grafted = [n for n in jax.tree.leaves(module, is_leaf=_is_grafted) if _is_grafted(n)]
    count = len(grafted[0].esper_shadows) if grafted else 0

    def shown(nth: int) -> Any:
        def of_node(node: Any) -> Any:
            if not _is_grafted(node):
                return jax.lax.stop_gradient(node) if eqx.is_inexact_array(node) else node
            own = node.esper_anatomy.shadowed[nth]
            kept = None if own is None else node.esper_anatomy.seeds[own]
            shadow = shadow_layer(node, nth)
            stopped = jax.tree.map(of_node, shadow.esper_host, is_leaf=_is_grafted)
            kernels = {
                seed: params if seed == kept else jax.lax.stop_gradient(params)
                for seed, params in shadow.esper_kernels.items()
            }
            return eqx.tree_at(
                lambda n: (n.esper_host, n.esper_kernels), shadow, (stopped, kernels)
            )

        return jax.tree.map(of_node, module, is_leaf=_is_grafted)

    return tuple(shown(nth) for nth in range(count))
