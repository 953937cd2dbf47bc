"""A wrapped torch model as the core's data, and back.

Arrays go over by DLPack and are copied: an array of jax never changes, and torch's tensors do, also
while jax, which runs ahead, is still reading.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from esper_adapters.pytorch._bridge import named_leaves, to_jax, to_torch
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._layer import SeededLayer
from esper_adapters.pytorch._model import MorphableModel, check_wrapped
from esper_adapters.pytorch._sharded import refuse_sharded
from esper_functional import Blend, KasminaException, Kernel, SeedState


class TorchFunctional(NamedTuple):
    """What a wrapped torch model is, as the core takes it; the network is the user's to write."""

    params: dict[str, Any]
    """The host's parameters, nested by module path: `params["encoder"]["0"]["weight"]`. A tied
    one is there once, by the first of its paths."""
    buffers: dict[str, Any]
    """The host's buffers, likewise."""
    state: SeedState
    """`[layers, seeds]`, in numpy."""
    kernels: dict[int, Kernel]
    """By slot, with the parameters they have been trained to."""
    sites: tuple[str, ...]
    blend: Blend
    isolate: bool


def to_functional(model: Any, *, resolve: Callable[[str], Kernel] | None = None) -> TorchFunctional:
    """The parameters, seeds and kernels of a wrapped model, as arrays of jax of their own memory.

    Args:
        resolve: finds the core's kernel of an id, for kernels that do not know theirs: those of
            an artifact do, until they are pickled.

    Raises:
        KasminaException: for a model that is not wrapped, a kernel that is a function or module of
            torch alone, and a dtype that jax does not have.
    """
    check_wrapped("to_functional", model)
    refuse_sharded(model, "to_functional")
    layers = list(model.kasmina_layers.values())
    kernels: dict[int, Kernel] = {}
    for layer, seed, grafted in _grafted(layers):
        twin = _twin(layer, seed, grafted, resolve)
        kernels[int(layer.seeds.slot[layer.row, seed])] = twin
    params, buffers = _hosts(model)
    found = TorchFunctional(
        _nested({name: _copied(p) for name, p in params.items()}),
        _nested({name: _copied(b) for name, b in buffers.items()}),
        model.seeds,
        kernels,
        tuple(model.seed_table.names),
        layers[0].blend,
        layers[0].isolate,
    )
    # The copies are made before torch may change what was copied.
    jax.block_until_ready((found.params, found.buffers, found.kernels))
    return found


def from_functional(model: Any, functional: TorchFunctional) -> None:
    """Bring parameters, buffers, seeds and kernels' parameters back into the model, in place.

    For a model whose seeds hold the same kernels, or more: what jax has grafted, torch is to graft
    as well.

    Raises:
        KasminaException: for other parameters, seeds or kernels; nothing is changed.
    """
    check_wrapped("from_functional", model)
    refuse_sharded(model, "from_functional")
    layers = list(model.kasmina_layers.values())
    params, buffers = _hosts(model)
    pairs = [
        *_matched("parameter", params, functional.params),
        *_matched("buffer", buffers, functional.buffers),
    ]
    state = jax.tree.map(np.asarray, functional.state)
    if state.shape != model.seeds.shape:
        raise KasminaException(
            f"from_functional: the model has seeds {model.seeds.shape}, and the state"
            f" {state.shape}: take it back into the model that it came from"
        )
    for layer in layers:
        for seed in np.flatnonzero(state.slot[layer.row] >= 0).tolist():
            held, slot = layer.kernel(seed), int(state.slot[layer.row, seed])
            same = np.array_equal(state.kernel_id[layer.row, seed], _id_of(layer, seed))
            if held is None or slot not in functional.kernels or not same:
                raise KasminaException(
                    f"from_functional: seed {seed} of layer {layer.layer_name!r} holds another"
                    " kernel there than here: graft it here first, by load_kernel"
                )
            own = dict(zip(held.param_names, held.ordered_parameters(), strict=True))
            theirs = named_leaves(functional.kernels[slot].params)
            pairs += _matched(f"kernel {seed} of {layer.layer_name!r}, parameter", own, theirs)
    with torch.no_grad():
        for tensor, array in pairs:
            tensor.copy_(to_torch(array))
    table = model.seed_table
    with table.lock:
        table.state = state
        for layer in layers:
            for seed in range(layer.num_seeds):
                held = layer.kernel(seed)
                if held is not None:
                    held.set_errors(int(state.error_count[layer.row, seed]))
            layer.refresh()


def _grafted(layers: list[SeededLayer]) -> Iterator[tuple[SeededLayer, int, GraftedKernel]]:
    for layer in layers:
        for seed in range(layer.num_seeds):
            held = layer.kernel(seed)
            if held is not None and layer.seeds.slot[layer.row, seed] >= 0:
                yield layer, seed, held


def _id_of(layer: SeededLayer, seed: int) -> Any:
    return np.asarray(layer.seeds.kernel_id)[layer.row, seed]


def _twin(
    layer: SeededLayer,
    seed: int,
    grafted: GraftedKernel,
    resolve: Callable[[str], Kernel] | None,
) -> Kernel:
    if grafted.twin is not None:
        twin = grafted.twin()
    elif resolve is not None and grafted.kernel_id:
        twin = resolve(grafted.kernel_id)
    else:
        raise KasminaException(
            f"to_functional: the kernel in seed {seed} of layer {layer.layer_name!r} is a function"
            " or module of torch, which has no program of jax: load an artifact, or give `resolve`,"
            " a function from ids to kernels of the core"
        )
    own = zip(grafted.param_names, grafted.ordered_parameters(), strict=True)
    by_name = {name: _copied(p) for name, p in own}
    leaves = [by_name[name] for name in named_leaves(twin.params)]
    return Kernel(twin.program, jax.tree.unflatten(jax.tree.structure(twin.params), leaves))


def _hosts(model: MorphableModel) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The host's parameters and buffers, by path."""
    own = [m for m in model.modules() if isinstance(m, GraftedKernel)]
    theirs = {id(t) for m in own for t in (*m.parameters(), *m.buffers())}
    params = {n: p for n, p in model.named_parameters() if id(p) not in theirs}
    buffers = {n: b for n, b in model.named_buffers() if id(b) not in theirs}
    return params, buffers


def _copied(tensor: Tensor) -> jax.Array:
    if tensor.dtype == torch.int64 and tensor.dim() == 0:
        # Counts of batches, which torch keeps in 64 bits.
        tensor = tensor.to(torch.int32)
    return jnp.array(to_jax(tensor), copy=True)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found


def _matched(
    kind: str, tensors: Mapping[str, Tensor], tree: Mapping[str, Any]
) -> list[tuple[Tensor, Any]]:
    arrays = _flat(tree)
    odd = sorted(set(tensors) ^ set(arrays))
    if odd:
        raise KasminaException(f"from_functional: {kind}s {odd} are in one of the two alone")
    for name, tensor in tensors.items():
        if tuple(arrays[name].shape) != tuple(tensor.shape):
            raise KasminaException(
                f"from_functional: {kind} {name!r} is {list(tensor.shape)} here, and"
                f" {list(arrays[name].shape)} in what it is to become"
            )
    return [(tensor, arrays[name]) for name, tensor in tensors.items()]
