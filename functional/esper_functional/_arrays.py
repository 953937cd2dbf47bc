"""One vocabulary of array types: state lives in numpy on the host or in jax."""

from types import ModuleType
from typing import Any

import jax
import numpy as np

Array = np.ndarray | jax.Array
"""What a state function accepts and returns: it stays on the side it came from."""


def namespace(array: Array) -> ModuleType | Any:
    """The array-API namespace (numpy or jax.numpy) that `array` belongs to."""
    return array.__array_namespace__()


Scalar = np.ndarray | np.generic | jax.Array
"""What a reduction returns: numpy's are of a type of their own."""
