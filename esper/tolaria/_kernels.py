"""The kernels a run may choose from: in the library already, or compiled for it now."""

from collections.abc import Callable

from esper.contracts import KernelSignature
from esper.errors import Interrupted
from esper.tezzeret import compile_blueprint, kernel_recipe, load_blueprint
from esper.urza import Library


def obtain_kernels(
    library: Library,
    blueprint_name: str,
    signature: KernelSignature,
    *,
    sizes: dict[str, int],
    variants: int,
    tell: Callable[[str], None],
    stop: Callable[[], bool],
) -> list[str]:
    """The ids of `variants` kernels, with initialisation seeds from 0 on.

    Args:
        sizes: values for the blueprint's named sizes.
        tell: is told what is being compiled.
        stop: is asked before each compilation whether to stop.

    Raises:
        BlueprintError: for a blueprint that does not fit.
        KernelCompilationError, LibraryError.
        Interrupted: when asked to stop; what was compiled is kept.
    """
    blueprint = load_blueprint(blueprint_name)
    found: list[str] = []
    told = False
    for init_seed in range(variants):
        recipe = kernel_recipe(blueprint, signature, sizes=sizes, init_seed=init_seed)
        known = library.find(recipe=recipe)
        if known:
            found.append(known[0].kernel_id)
            continue
        if stop():
            raise Interrupted("stopped while compiling kernels; no run was begun")
        if not told:
            tell(f"compiling {variants - init_seed} kernels of {blueprint_name} for {signature}")
            told = True
        artifact = compile_blueprint(blueprint, signature, sizes=sizes, init_seed=init_seed)
        found.append(library.put(artifact))
    return found
