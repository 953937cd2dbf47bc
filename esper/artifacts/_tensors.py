"""Tensors of a safetensors file as arrays of numpy, bfloat16 too."""

from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def load_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors by name; safetensors' own function for numpy reads no bfloat16.

    Raises:
        SafetensorError: for other bytes.
        ValueError: for a dtype that kernels may not have.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in deserialize(data):
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise ValueError(
                f"parameter {name!r} has the dtype {tensor['dtype']}: expected one of"
                f" {', '.join(_DTYPES)}"
            )
        tensors[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return tensors
