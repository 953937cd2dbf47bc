"""One operation on many tensors, in one call: what torch's own optimisers are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch  # torch's stubs do not say that it has them


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes."""
    if targets:
        _torch._foreach_copy_(list(targets), list(sources))


def scale_all(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors by one number, in place."""
    if tensors:
        _torch._foreach_mul_(list(tensors), factor)
