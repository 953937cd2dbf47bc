"""A blueprint's program as Python that torch runs, compiles and transforms as its own."""

from functools import lru_cache
from typing import Any

from esper.contracts import KernelSignature
from esper.tensors import to_torch
from esper.tezzeret._blueprint import BlueprintIR
from esper.tezzeret._kernel import kernel_from_blueprint
from esper.tezzeret._programs import initial_params, torch_source
from esper.tezzeret._resolve import Graph, resolve


class NativeProgram:
    """`program(*params, x)` by the very source that TorchScript is made of.

    The source is written by this package out of its own table of operations. What a blueprint
    gives to it are names, which are lower-case letters, digits and underscores or it is refused.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.function = _define(source)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self.function(None, *args)

    def __reduce__(self) -> tuple[type["NativeProgram"], tuple[str]]:
        return NativeProgram, (self.source,)


@lru_cache(maxsize=256)
def _define(source: str) -> Any:
    import torch

    # One function an equal source, so that torch.compile knows it again.
    scope: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor}
    exec(compile(source, "<blueprint>", "exec"), scope)
    return scope["forward"]


def native_program(graph: Graph) -> NativeProgram:
    """The program of a resolved graph."""
    return NativeProgram(torch_source(graph))


def torch_kernel_from_blueprint(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: dict[str, int] | None = None,
    init_seed: int = 0,
) -> Any:
    """The kernel that a blueprint describes, for layers of torch; see `kernel_from_blueprint`.

    Args:
        signature: shapes of one example.
        sizes: values for some of the blueprint's named sizes.
        init_seed: seed of the first parameters.

    Raises:
        InputError: for a signature or a seed that is none.
        BlueprintError: for a blueprint that does not fit the signature, or an unknown size.
    """
    from esper_adapters.pytorch import TorchKernel

    graph = resolve(blueprint, signature, sizes)
    return TorchKernel(
        kernel_id="",
        program=native_program(graph),
        params={name: to_torch(p) for name, p in initial_params(graph, init_seed).items()},
        example_rank=len(signature.input_shape),
        input_shape=tuple(signature.input_shape),
        output_shape=tuple(signature.output_shape),
        dtype=signature.dtype,
        confidence=blueprint.confidence,
        route="native",
        twin=lambda: kernel_from_blueprint(blueprint, signature, sizes=sizes, init_seed=init_seed),
    )
