"""Shadow forwards: what a model would give with an incubating kernel at alpha 1."""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from esper_adapters.pytorch._grafted import GraftedKernel

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer


def run_shadow(
    model: Any, layer: "SeededLayer", seed: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """One kernel's shadow of a forward pass: gradients reach that kernel's parameters alone."""
    kernel = layer.running[seed]
    own = {id(p) for p in kernel.parameters()}
    tensors = {
        name: p if id(p) in own else p.detach()
        # Of tied ones the first, which stands for all.
        for name, p in model.named_parameters()
    }
    for path, module in model.named_modules():
        # What is counted of kernels is counted here too.
        if not isinstance(module, GraftedKernel):
            for name, buffer in module.named_buffers(recurse=False):
                tensors[f"{path}.{name}" if path else name] = buffer.clone()
    stopped = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, options))
    state, at = layer.seeds, (layer.row, seed)
    alpha, incubating = np.array(state.alpha), np.array(state.incubating)
    alpha[at], incubating[at] = 1.0, False
    shown = layer.live_at(state.replace(alpha=alpha, incubating=incubating))
    devices = {p.device for p in kernel.parameters() if p.device.type == "cuda"}
    layer.show(shown)
    _counting.kernel = kernel
    try:
        with torch.random.fork_rng(list(devices)):
            return torch.func.functional_call(model, tensors, *stopped)
    finally:
        _counting.kernel = None
        layer.show_state()


_counting = threading.local()
"""The kernel that a shadow of this thread is of."""


def is_counted(kernel: GraftedKernel) -> bool:
    """Whether calls of a kernel are steps of it: in a shadow, those of its own kernel alone."""
    if torch.compiler.is_compiling():
        return True
    own = getattr(_counting, "kernel", None)
    return own is None or own is kernel
