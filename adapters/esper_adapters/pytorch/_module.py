"""A module as a function of its parameters and buffers, in any thread."""

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ModuleProgram:
    """`program(*params, x)` by a module, which is copied and never changed.

    torch exchanges a module's parameters in place for the time of a call, which two threads may
    not do to one module: each thread has forms of its own, which share nothing but the class's
    code, and whose tensors are exchanged at every call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self.names = [name for name, _ in module.named_parameters()]
        self.buffer_names = [name for name, _ in module.named_buffers()]
        self._compiled = {mode: copy.deepcopy(self.module).train(mode) for mode in (True, False)}
        self._own = threading.local()

    def __reduce__(self) -> tuple[type["ModuleProgram"], tuple[nn.Module]]:
        return ModuleProgram, (self.module,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleProgram":
        return self

    def __call__(self, *args: Tensor) -> Any:
        """Run it as the module was, with copies of its buffers."""
        *params, x = args
        buffers = [b.detach().clone().to(x.device) for b in self.module.buffers()]
        return self.run(params, buffers, x, self.module.training)

    def run(
        self, params: Sequence[Tensor], buffers: Sequence[Tensor], x: Tensor, training: bool
    ) -> Any:
        """Run it on these parameters and buffers; the latter are changed as the module does.

        Args:
            training: whether it runs in training mode, all of it.
        """
        tensors: Mapping[str, Tensor] = {
            **dict(zip(self.names, params, strict=True)),
            **dict(zip(self.buffer_names, buffers, strict=True)),
        }
        return torch.func.functional_call(self._form(training), dict(tensors), (x,))

    def _form(self, training: bool) -> nn.Module:
        if torch.compiler.is_compiling():
            # What a thread has of its own cannot be traced, and tracing is done by one at a time.
            return self._compiled[training]
        forms: dict[str, nn.Module] = self._own.__dict__
        key = "training" if training else "evaluating"
        if key not in forms:
            # All tensors of it are exchanged: its own need no memory.
            forms[key] = copy.deepcopy(self.module).train(training).to("meta")
        return forms[key]
