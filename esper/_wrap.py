"""`esper.wrap` and `esper.unwrap`, for whichever framework the model is of."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import InputError

if TYPE_CHECKING:
    from esper.urza import Library


def _is_torch(model: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _is_equinox(model: object) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(model, equinox.Module)


def _open(library: "Library | Path | str | None") -> "Library | None":
    from esper.urza import Library

    return Library(library) if isinstance(library, Path | str) else library


def wrap(
    model: Any,
    *,
    target_layers: Sequence[type] | None = None,
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    library: "Library | Path | str | None" = None,
    copy: bool = False,
) -> Any:
    """Give the linear layers of a model seeds, into which kernels can be grafted.

    The model itself is not changed, and the wrapped one behaves as it does until
    a kernel is loaded. A torch model becomes an instance of a subclass of its own
    class, changed in place by `load_kernel` and its siblings. An Equinox model
    becomes a `SeededModel`, whose methods return new ones.

    Args:
        model: a `torch.nn.Module` or an `equinox.Module`.
        target_layers: types of layers to take; by default linear layers.
        seeds_per_layer: how many kernels each can carry.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        library: the library, or its folder, that kernels are loaded from by id.
        copy: (torch) copy the parameters instead of sharing them.

    Raises:
        InputError: for a model of another framework.
        SeedIndexError: where no layer matches.
        BlendError: for an unknown blend.
    """
    options: dict[str, Any] = {
        "seeds_per_layer": seeds_per_layer,
        "blend": blend,
        "isolate": isolate,
    }
    if target_layers is not None:
        options["target_layers"] = tuple(target_layers)
    store = _open(library)
    if _is_torch(model):
        from esper.execution import load_torch_kernel
        from esper_adapters import pytorch

        if store is not None:
            options["resolve"] = lambda kernel_id: load_torch_kernel(store.get(kernel_id))
        return pytorch.wrap(model, copy=copy, **options)
    from esper_adapters import equinox

    if _is_equinox(model) or isinstance(model, equinox.SeededModel):
        from esper.execution import load_jax_kernel

        if store is not None:

            def resolve(kernel_id: str) -> equinox.Resolved:
                artifact = store.get(kernel_id)
                return equinox.Resolved(load_jax_kernel(artifact), artifact.manifest.confidence)

            options["resolve"] = resolve
        return equinox.wrap(model, **options)
    raise InputError(
        f"esper.wrap takes a torch.nn.Module or an equinox.Module; got {type(model).__name__}"
    )


def unwrap(model: Any) -> Any:
    """The trained host of a wrapped model, without seeds and kernels."""
    if _is_torch(model):
        from esper_adapters import pytorch

        return pytorch.unwrap(model)
    from esper_adapters import equinox

    if isinstance(model, equinox.SeededModel):
        return equinox.unwrap(model)
    raise InputError(f"esper.unwrap takes what esper.wrap returned; got {type(model).__name__}")
