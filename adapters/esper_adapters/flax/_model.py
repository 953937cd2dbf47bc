"""`wrap` for Flax NNX models, and what their training needs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from esper_adapters._functional import Call
from esper_adapters._seeded import Resolve, SeededModel
from esper_adapters._select import Target
from esper_adapters._wrap import seed_model
from esper_adapters.flax._layer import GraftedLayer, show_shadow
from esper_adapters.flax._surgery import SURGERY
from esper_adapters.optax import OptimizerSurgeryError, carry


def wrap(
    host: Any,
    *,
    target_layers: Target | Sequence[Target] = (nnx.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
    resolve: Resolve | None = None,
    example: tuple[Any, ...] | None = None,
    call: Call | None = None,
) -> SeededModel:
    """Give layers of an NNX model seeds. The model itself is not changed: its graph is cloned.

    `SeededModel.module` is a module like any other: train it in place, by `nnx.jit` and
    `nnx.Optimizer`. Every surgery starts from the parameters that it has then, and gives a new
    module; `carry_optimizer` takes the optimiser along.

    Args:
        target_layers: types of layers, and paths such as `"layers.0"` or `"blocks.*.mlp"`.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        contain: contain the gradients of kernels; see `esper_functional.plan`.
        resolve: finds kernels by id.
        example: arguments of one call (arrays or `jax.ShapeDtypeStruct`, batch and all), by
            which every site's shapes are known, so that a kernel that does not fit is refused
            when it is loaded. Without, those of linear layers are known from their weights, and
            others are checked when the network is traced.
        call: `call(module, *args)`, how the model is run where that is not `module(*args)`. By
            it `observe`, `compare_with_original`, `example` and `to_functional` run the model.
            Keep one function: compiled programs are kept by it.

    Raises:
        SeedIndexError: for a target that no layer matches.
        BlendError: for an unknown blend.
    """
    return seed_model(
        host if isinstance(host, SeededModel) else nnx.clone(host),
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
    """The trained host, without seeds and kernels; a module of its own."""
    return nnx.clone(model.with_module(model.module).host)


def _grafted(module: Any) -> list[GraftedLayer]:
    return [m for _, m in nnx.iter_modules(module) if isinstance(m, GraftedLayer)]


def _stopped(leaf: Any) -> Any:
    inexact = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
    return jax.lax.stop_gradient(leaf) if inexact else leaf


def shadows(module: Any) -> tuple[Any, ...]:
    """The network with each incubating kernel at alpha 1, one at a time.

    Add the loss of each to that of `module`, inside the function that is differentiated:
    gradients reach that kernel's parameters in it and nothing else. See
    `esper_functional.shadow_forward`. Their own state (running statistics) is discarded.
    """
    layers = _grafted(module)
    count = len(layers[0].esper_blending["shadows"]) if layers else 0
    shown: list[Any] = []
    for nth in range(count):
        graph, state = nnx.split(module)
        twin = nnx.merge(graph, jax.tree.map(_stopped, state), copy=True)
        for layer, copied in zip(layers, _grafted(twin), strict=True):
            own = layer.esper_anatomy.shadowed[nth]
            show_shadow(copied, nth)
            if own is not None:
                seed = layer.esper_anatomy.seeds[own]
                for name, variable in layer.esper_kernels[seed].items():
                    copied.esper_kernels[seed][name][...] = variable[...]
        shown.append(twin)
    return tuple(shown)


def carry_optimizer(
    optimizer: nnx.Optimizer[Any], old_module: Any, new_module: Any
) -> nnx.Optimizer[Any]:
    """The optimiser of a module, fitted to what a surgery made of it.

    Every incumbent moment is kept bit by bit, new parameters start as the optimiser would
    start them, and those of fossils are gone from it; see `esper_adapters.optax.carry`.

    Args:
        optimizer: of `old_module`; it is not changed.

    Raises:
        OptimizerSurgeryError: for a subclass of `nnx.Optimizer`, or what `carry` cannot handle.
    """
    if type(optimizer) is not nnx.Optimizer:
        raise OptimizerSurgeryError(
            f"carry_optimizer takes an nnx.Optimizer; got {type(optimizer).__name__}, which may"
            " hold more than it does: carry its state by esper_adapters.optax.carry"
        )

    def params(module: Any) -> Any:
        return nnx.as_pure(nnx.state(module, optimizer.wrt))

    state = carry(
        optimizer.tx, nnx.as_pure(optimizer.opt_state), params(old_module), params(new_module)
    )
    carried = nnx.Optimizer(new_module, optimizer.tx, wrt=optimizer.wrt)
    nnx.update(carried.opt_state, nnx.state(state))
    carried.step[...] = optimizer.step[...]
    return carried
