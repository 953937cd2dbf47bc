"""Arrays of numpy as tensors of torch, and back; bfloat16 too, which the two do not share."""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch


def to_torch(array: np.ndarray) -> "torch.Tensor":
    """A tensor with the array's values and dtype, in memory of its own."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def from_torch(tensor: "torch.Tensor") -> np.ndarray:
    """An array with the tensor's values and dtype.

    Of a tensor on the CPU it is a view where there is one, and what is written to one of them is
    seen in the other.
    """
    import torch

    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()
