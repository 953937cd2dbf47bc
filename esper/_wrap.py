"""`esper.wrap` and `esper.unwrap`, for whichever framework the model is of."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import InputError

if TYPE_CHECKING:
    from esper.artifacts import Artifact
    from esper.cache import KernelCache
    from esper.execution import Route
    from esper.urza import Library

    Fetch = Callable[[str], Artifact]


def _is_torch(model: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _jax_face(model: object) -> Any:
    """The face of the framework that a JAX model is of, or None."""
    equinox, nnx = sys.modules.get("equinox"), sys.modules.get("flax.nnx")
    if equinox is not None and isinstance(model, equinox.Module):
        from esper_adapters import equinox as face

        return face
    if nnx is not None and isinstance(model, nnx.Module):
        from esper_adapters import flax as face

        return face
    return None


def _seeded_face(model: Any) -> Any:
    """The face that wrapped a JAX model, or None."""
    seeded = sys.modules.get("esper_adapters._seeded")
    if seeded is None or not isinstance(model, seeded.SeededModel):
        return None
    if model.surgery.framework == "flax":
        from esper_adapters import flax as face
    else:
        from esper_adapters import equinox as face
    return face


def _opened(library: "Library | KernelCache | Path | str | None") -> "Fetch | None":
    """What gives an artifact by its id, and raises LookupError where there is none."""
    if library is None:
        return None
    from esper.cache import KernelCache
    from esper.errors import KernelNotFoundError
    from esper.urza import Library

    if not isinstance(library, KernelCache):
        store = Library(library) if isinstance(library, Path | str) else library
        return store.get
    cache = library

    def fetch(kernel_id: str) -> "Artifact":
        artifact = cache.load_kernel_sync(kernel_id)
        if artifact is None:
            raise KernelNotFoundError(
                f"neither the cache nor its library holds a kernel {kernel_id[:12]}: compile or"
                " copy it there first"
            )
        return artifact

    return fetch


def wrap(
    model: Any,
    *,
    target_layers: Any = None,
    seeds_per_layer: int = 4,
    blend: str = "convex",
    isolate: bool = False,
    contain: bool = True,
    library: "Library | KernelCache | Path | str | None" = None,
    route: "Route | None" = None,
    cache_size_mb: int | None = None,
    copy: bool = False,
    example: tuple[Any, ...] | None = None,
    call: Callable[..., Any] | None = None,
) -> Any:
    """Give the layers of a model seeds, into which kernels can be grafted.

    The model itself is not changed, and the wrapped one behaves as it does until
    a kernel is loaded. A torch model becomes an instance of a subclass of its own
    class, changed in place by `load_kernel` and its siblings. An Equinox or Flax NNX
    model becomes a `SeededModel`, whose methods return new ones.

    Args:
        model: a `torch.nn.Module`, an `equinox.Module` or a `flax.nnx.Module`.
        target_layers: types of layers to take, paths such as `"blocks.*.mlp"`, and (torch)
            predicates of (path, module); or one of them. By default linear layers.
        seeds_per_layer: how many kernels each can carry.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layers' inputs.
        contain: keep gradients of a failed kernel out of its host's; False allows forward-mode
            and second derivatives (jax), is faster (torch), and leaves a failed kernel's gradients
            uncontained.
        library: the library, its folder, or a cache before it, that kernels are loaded from by id.
        route: (torch) how kernels of the library run; see `esper.execution.load_torch_kernel`.
            "native" is what `torch.compile` and `torch.func` see through.
        cache_size_mb: (torch) how much memory kernels may take that were loaded, and are kept for
            being loaded again; 128 by default.
        copy: (torch) copy the parameters instead of sharing them.
        example: (jax) arguments of one call, by which shapes are known and kernels that do not
            fit are refused when they are loaded.
        call: (jax) `call(module, *args)`, how the model is run where it takes more than a batch,
            such as keys, a state, or an axis name; see a face's `wrap`.

    Raises:
        InputError: for a model of another framework, or an option of one.
        SeedIndexError: for a target that no layer matches.
        BlendError: for an unknown blend.
    """
    options: dict[str, Any] = {
        "seeds_per_layer": seeds_per_layer,
        "blend": blend,
        "isolate": isolate,
    }
    if target_layers is not None:
        options["target_layers"] = target_layers
    fetch = _opened(library)
    if _is_torch(model):
        from esper.execution import load_torch_kernel
        from esper_adapters import pytorch

        if example is not None:
            raise InputError("esper.wrap: `example` is for jax models; a torch layer knows its own")
        if call is not None:
            raise InputError("esper.wrap: `call` is for jax models")
        if fetch is not None:
            options["resolve"] = lambda kernel_id: load_torch_kernel(fetch(kernel_id), route=route)
        if cache_size_mb is not None:
            options["cache_size_mb"] = cache_size_mb
        return pytorch.wrap(model, contain=contain, copy=copy, **options)
    face = _jax_face(model) or _seeded_face(model)
    if face is None:
        raise InputError(
            "esper.wrap takes a torch.nn.Module, an equinox.Module or a flax.nnx.Module; got"
            f" {type(model).__name__}. Linen modules and plain functions become networks with"
            " sites: see esper_adapters.flax.linen_sites and esper_functional"
        )
    if route is not None or cache_size_mb is not None:
        raise InputError(
            "esper.wrap: `route` and `cache_size_mb` are for torch models; jax runs StableHLO, and"
            " a library's kernels are kept by it"
        )
    if copy:
        raise InputError("esper.wrap: `copy` is for torch models; arrays of jax never change")
    if fetch is not None:
        from esper.execution import load_jax_kernel

        def resolve(kernel_id: str) -> Any:
            artifact = fetch(kernel_id)
            return face.Resolved(load_jax_kernel(artifact), artifact.manifest.confidence)

        options["resolve"] = resolve
    return face.wrap(model, example=example, contain=contain, call=call, **options)


def unwrap(model: Any) -> Any:
    """The trained host of a wrapped model, without seeds and kernels."""
    if _is_torch(model):
        from esper_adapters import pytorch

        return pytorch.unwrap(model)
    face = _seeded_face(model)
    if face is None:
        raise InputError(f"esper.unwrap takes what esper.wrap returned; got {type(model).__name__}")
    return face.unwrap(model)


def export_plain(model: Any) -> Any:
    """The trained network, kernels and all, as a model that needs no Esper to run.

    Affine kernels are folded into their hosts' weights; other grafted layers become plain
    functions or modules that carry their parameters. See the face's own `export_plain`.

    Raises:
        InputError, KasminaException: for a model that is not wrapped.
    """
    if _is_torch(model):
        from esper_adapters import pytorch

        return pytorch.export_plain(model)
    face = _seeded_face(model)
    if face is None:
        raise InputError(
            f"esper.export_plain takes what esper.wrap returned; got {type(model).__name__}"
        )
    return face.export_plain(model)
