"""Kernels from Flax NNX modules."""

from typing import Any

import jax
from flax import nnx

from esper_adapters._shared_programs import shared_program
from esper_functional import Kernel, KernelMismatchError, Params


def kernel_from_module(module: Any, *, example_rank: int = 1) -> Kernel:
    """A kernel from an NNX module over a batch; its `nnx.Param`s are the parameters.

    Modules of one structure share compiled programs.

    Args:
        module: `module(x)` for `[batch, *example]`. A kernel is a pure function: what keeps
            state of its own, as batch norm and dropout do, is refused.
        example_rank: rank of one example; see `esper_functional.kernel_from_function`.

    Raises:
        KernelMismatchError: for a module with other state than parameters.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        names = [
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            for path, _ in jax.tree_util.tree_leaves_with_path(rest)
        ]
        raise KernelMismatchError(
            f"a kernel is a pure function of its parameters, and {type(module).__name__} keeps"
            f" state beside them: {names}; leave out layers that do, such as BatchNorm or Dropout"
        )
    pure = nnx.to_pure_dict(params)

    def apply(own: Params, x: Any) -> Any:
        merged = nnx.merge(graph, params, copy=True)
        nnx.update(merged, own)
        return merged(x)

    return Kernel(shared_program("nnx", graph, example_rank, apply), pure)
