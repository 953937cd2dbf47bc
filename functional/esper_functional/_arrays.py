"""One vocabulary of array types: state lives in numpy on the host or in jax."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array
"""What a state function accepts and returns: it stays on the side it came from."""


def namespace(*arrays: Any) -> ModuleType | Any:
    """The array-API namespace that the arrays belong to: jax.numpy if any is jax's."""
    if any(isinstance(array, jax.Array) for array in arrays):
        return jnp
    return arrays[0].__array_namespace__()


Scalar = np.ndarray | np.generic | jax.Array
"""What a reduction returns: numpy's are of a type of their own."""
