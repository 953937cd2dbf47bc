"""`wrap` and `unwrap`: seeds for the layers of a torch model.

Wrapping clones the module structure and shares the tensors; the clone's class
is a subclass of the host's own, so that keys, signature, attributes and hooks
stay as they were.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from esper_adapters.pytorch._family import base_class, seeded_class
from esper_adapters.pytorch._kernel import Resolve
from esper_adapters.pytorch._layer import SeededLayer
from esper_adapters.pytorch._model import MorphableModel, check_wrapped, host_class, morphable_class
from esper_adapters.pytorch._sharded import refuse_sharded
from esper_adapters.pytorch._sites import Target, check_targets, clashes, fused_hosts, select_sites
from esper_adapters.pytorch._table import SeedTable
from esper_functional import KasminaException, SeedIndexError, check_blend


def _clone(host: nn.Module, copy_tensors: bool) -> nn.Module:
    tensors = [] if copy_tensors else [*host.parameters(), *host.buffers()]
    memo: dict[int, Any] = {id(t): t for t in tensors}
    # What a forward pass left behind, such as a weight that hooks compute, cannot be copied.
    for module in host.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone() if copy_tensors else value
    return copy.deepcopy(host, memo)


def wrap(
    host: nn.Module,
    *,
    target_layers: Target | Sequence[Target] = (nn.Linear,),
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
    resolve: Resolve | None = None,
    cache_size_mb: int = 128,
    copy: bool = False,
) -> Any:
    """Give layers of a model seeds. The host object itself is not changed.

    Args:
        target_layers: classes of layers, module paths such as `"blocks.*.mlp"`, and predicates
            of (path, module). What cannot carry seeds is left alone; see
            `MorphableModel.left_alone`.
        seeds_per_layer: how many kernels each can carry, at least 1.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        contain: keep gradients that are not finite of a failed kernel out of its host's and its
            own parameters; False is faster, by the price of two checks a kernel and step.
        resolve: finds kernels by id.
        cache_size_mb: how much memory kernels may take that are kept for being loaded again.
        copy: copy the parameters too, instead of sharing them.

    Returns:
        An instance of a subclass of the host's class and of `MorphableModel`.

    Raises:
        SeedIndexError: for a target that no layer matches.
        BlendError: for an unknown blend.
        KasminaException: for a model that is wrapped already, or sharded by FSDP.
    """
    kind = check_blend(blend)
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    if any(isinstance(m, MorphableModel | SeededLayer) for m in host.modules()):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    refuse_sharded(host, "wrap")
    taken = clashes(host, MorphableModel)
    if taken:
        raise KasminaException(
            f"wrap: {type(host).__name__} has {taken}, which a wrapped model has too and would"
            " hide: wrap a part of it, or rename them"
        )
    names, left = select_sites(host, check_targets(target_layers))
    model: Any = _clone(host, copy)
    table = SeedTable(names, seeds_per_layer, cache_size_mb)
    table.resolve = resolve
    holders = [p for m in model.modules() for p in m.parameters(recurse=False)]
    shared = {i for i, n in Counter(map(id, holders)).items() if n > 1}
    for row, name in enumerate(names):
        layer: Any = model.get_submodule(name)
        layer.__class__ = seeded_class(type(layer))
        layer.plant(table, row, kind, isolate, contain)
        layer._fused = fused_hosts(model, name)
        layer._tied = any(id(p) in shared for p in layer.parameters(recurse=False))
    model.__class__ = morphable_class(type(model))
    model._esper_table = table
    model._esper_names = names
    model._esper_left = left
    return model


_PLANTED = (
    *("_table", "_row", "blend", "isolate", "contain", "telemetry_enabled", "_live", "_running"),
    *("_called", "_fused", "_hook", "_tied", "_returns"),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The trained host of a wrapped model, without seeds and kernels; shares its tensors.

    Raises:
        KasminaException: for a model that is not wrapped, or is sharded by FSDP.
    """
    check_wrapped("unwrap", model)
    refuse_sharded(model, "unwrap")
    host: Any = _clone(model, False)
    layers: dict[str, Any] = host.kasmina_layers
    host.__class__ = host_class(type(host))
    for attribute in ("_esper_table", "_esper_names", "_esper_left"):
        delattr(host, attribute)
    for layer in layers.values():
        layer.show(None)
        layer.lift_fused_path()
        for seed in range(layer.num_seeds):
            if layer.kernel(seed) is not None:
                delattr(layer, f"kernel_{seed}")
        for attribute in _PLANTED:
            layer.__dict__.pop(attribute, None)
        layer.__class__ = base_class(type(layer))
    return host
