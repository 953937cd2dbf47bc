"""What the tensors of a layer, or of a result, say of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def words(tensor: Tensor) -> str:
    """Such as `float32[8, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _own_tensors(layer: nn.Module) -> list[Tensor]:
    """The tensors of a layer that are not its kernels'."""
    inner = [m for name, m in layer.named_children() if not name.startswith("kernel_")]
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return tensors + [t for module in inner for t in (*module.parameters(), *module.buffers())]


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer lies; torch's default device where it has no tensor."""
    tensors = _own_tensors(layer)
    return tensors[0].device if tensors else torch.get_default_device()


def dtype_of(layer: nn.Module) -> str | None:
    """The name of the floating-point dtype of a layer's tensors; None where there are several."""
    kinds = {t.dtype for t in _own_tensors(layer) if t.is_floating_point()}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def floats_of(result: Any) -> list[Tensor]:
    """The floating-point tensors of what a model returns, those of dataclasses and caches too."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            found.extend([part] if part.is_floating_point() else [])
        elif isinstance(part, Mapping):
            visit(list(part.values()))
        elif isinstance(part, tuple | list):
            for inner in part:
                visit(inner)
        elif hasattr(part, "__dict__") and id(part) not in seen:
            seen.add(id(part))
            visit(list(vars(part).values()))

    visit(result)
    return found
