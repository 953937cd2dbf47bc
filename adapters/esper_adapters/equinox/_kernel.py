"""Kernels from Equinox modules."""

from typing import Any

import equinox as eqx
import jax

from esper_adapters._shared_programs import shared_program
from esper_functional import Kernel, Params


def kernel_from_module(module: Any, *, example_rank: int = 1) -> Kernel:
    """A kernel from an Equinox module of one example; its inexact arrays are the parameters.

    Modules of one structure share compiled programs.

    Args:
        module: `module(x)` for one example x.
        example_rank: rank of one example; see `esper_functional.kernel_from_function`.
    """
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(params: Params, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    return Kernel(shared_program("equinox", static, example_rank, apply), params)
