"""Programs made from modules: one for all modules of one structure."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from esper_functional import Params, Program

_PROGRAMS: dict[Any, Program] = {}


def _identity(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray):
        array = np.asarray(leaf)
        return array.dtype.name, array.shape, array.tobytes()
    return type(leaf), leaf


def shared_program(
    kind: str, static: Any, example_rank: int, apply: Callable[[Params, Any], Any]
) -> Program:
    """The program of a module: the one made before for an equal module, or a new one.

    Args:
        static: the module without its parameters: structure, functions, constant arrays.
        apply: what it computes; used where no equal module came before.

    Raises:
        TypeError: for a module whose static parts are not hashable.
    """
    leaves, structure = jax.tree.flatten(static)
    key = (kind, structure, tuple(_identity(leaf) for leaf in leaves), example_rank)
    if key not in _PROGRAMS:
        name = f"{kind}:{type(static).__name__}:{len(_PROGRAMS)}"
        _PROGRAMS[key] = Program(name, apply, example_rank)
    return _PROGRAMS[key]
