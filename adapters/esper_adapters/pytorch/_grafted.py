"""A kernel in its place: parameters that are registered, and what is counted of it."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper_adapters.pytorch._containment import Verdict, in_transform, run_contained
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._module import ModuleProgram
from esper_functional import FAILURES_TO_RECOVERY

GONE = "_esper_gone"
"""Set on the parameters of a kernel that was taken out of its layer, for optimisers."""


def _attribute_names(names: list[str]) -> tuple[str, ...]:
    """Names that a module can register: no dots, all different, and none that it has itself."""
    plain = [name.replace(".", "_") for name in names]
    plain = [f"{name}_" if name in _TAKEN or hasattr(nn.Module, name) else name for name in plain]
    if len(set(plain)) == len(plain):
        return tuple(plain)
    return tuple(f"{name}_{i}" for i, name in enumerate(plain))


class GraftedKernel(nn.Module):
    """The parameters of one kernel, registered where they train and are saved.

    What is counted lies on the device, in buffers that no state_dict holds: the seeds' state has
    it when failures are absorbed.
    """

    errors: Tensor
    """i32: consecutive failures."""
    working: Tensor
    """bool: fewer than three."""

    def __init__(
        self, kernel: TorchKernel, device: torch.device, errors: int = 0, contain: bool = True
    ) -> None:
        super().__init__()
        self.kernel_id = kernel.kernel_id
        self.route = kernel.route
        self.example_rank = kernel.example_rank
        self.frozen = False
        self.contain = contain
        self.twin = kernel.twin
        # Not a child module: a loaded program has no parameters of its own, and
        # registering it would put it in the way of `.to()` and `state_dict`.
        self._program = (kernel.program,)
        self.param_names = tuple(kernel.params)
        """The parameters' names in the kernel's own world, in the order of arguments."""
        held = self.module
        buffers = {} if held is None else dict(held.named_buffers())
        fixed = (
            set()
            if held is None
            else {n for n, p in held.named_parameters() if not p.requires_grad}
        )
        names = _attribute_names([*kernel.params, *buffers])
        self._names = names[: len(kernel.params)]
        self._buffer_names = names[len(kernel.params) :]
        self._trains: tuple[bool, ...] = ()
        for name, (own_name, value) in zip(self._names, kernel.params.items(), strict=True):
            own = torch.as_tensor(value).detach().clone().to(device)
            trains = (own.is_floating_point() or own.is_complex()) and own_name not in fixed
            self._trains += (trains,)
            self.register_parameter(name, nn.Parameter(own, requires_grad=trains))
        for name, value in zip(self._buffer_names, buffers.values(), strict=True):
            self.register_buffer(name, value.detach().clone().to(device))
        counted = torch.zeros((), dtype=torch.int32, device=device)
        self.register_buffer("errors", counted, persistent=False)
        self.register_buffer("working", counted == 0, persistent=False)
        self.set_errors(errors)

    def __getstate__(self) -> dict[str, Any]:
        # What finds the twin is of this process.
        return {**self.__dict__, "twin": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraftedKernel":
        twin = GraftedKernel.__new__(GraftedKernel)
        memo[id(self)] = twin
        # A program changes nothing, and may be shared.
        shared = {"_program": self._program, "twin": self.twin}
        own = {name: value for name, value in self.__dict__.items() if name not in shared}
        twin.__dict__.update(copy.deepcopy(own, memo), **shared)
        return twin

    @property
    def program(self) -> Any:
        """`program(*params, x)`, over a batch."""
        return self._program[0]

    @property
    def module(self) -> nn.Module | None:
        """The module that the program was made from, with the parameters it had then."""
        program = self._program[0]
        return program.module if isinstance(program, ModuleProgram) else None

    @property
    def structure(self) -> str:
        """What the kernel is made of, in words: its program's name, its parameters' shapes."""
        program = self._program[0]
        name = getattr(program, "__qualname__", type(program).__qualname__)
        name = name if self.module is None else repr(self.module)
        own = zip(self.param_names, self.parameters(), strict=True)
        return f"{name} of {[(n, str(p.dtype), tuple(p.shape)) for n, p in own]}"

    def leave(self) -> None:
        """Mark the parameters as no longer a part of any model."""
        for p in self.parameters():
            setattr(p, GONE, True)

    def ordered_parameters(self) -> list[Tensor]:
        """The parameters in the order of the program's arguments."""
        # Under `torch.func.functional_call` they are plain tensors, in the same places.
        return [*self._parameters.values()]  # pyright: ignore[reportReturnType]

    def freeze(self, frozen: bool) -> None:
        """Let the parameters train, or not."""
        self.frozen = frozen
        for p, trains in zip(self.parameters(), self._trains, strict=True):
            p.requires_grad_(trains and not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Verdict]:
        """The output, `[*batch, *out]`, and which examples are finite."""
        params = self.ordered_parameters()
        if self.frozen:
            params = [p.detach() for p in params]
        program = self._program[0]
        if isinstance(program, ModuleProgram):
            program = partial(self._run_module, program, self._own_buffers())
        return run_contained(program, params, x, self.example_rank, self.contain)

    def _own_buffers(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._buffer_names]  # pyright: ignore[reportReturnType]

    def _run_module(self, program: ModuleProgram, buffers: list[Tensor], *args: Tensor) -> Any:
        return program.run(args[:-1], buffers, args[-1], self.training and not self.frozen)

    def probe(self, x: Tensor) -> Tensor:
        """The output, while buffers and random numbers stay as they are, and nothing is counted."""
        params, program = self.ordered_parameters(), self._program[0]
        if isinstance(program, ModuleProgram):
            program = partial(self._run_module, program, [b.clone() for b in self._own_buffers()])
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            return program(*params, x)

    def set_errors(self, count: int) -> None:
        """Set the consecutive failures."""
        place = next(self.parameters(), self.errors).device
        if self.errors.device != place:
            # Parameters that were assigned lie elsewhere than those that there were.
            self.errors = torch.zeros((), dtype=torch.int32, device=place)
            self.working = torch.ones((), dtype=torch.bool, device=place)
        self.errors.fill_(count)
        self.working.fill_(count < FAILURES_TO_RECOVERY)

    def judge(self, finite: Verdict, counted: bool) -> Verdict:
        """Which examples are blended, after a call; counts it as a step where asked to.

        No forward pass waits for a device: what is looked at here lies on a CPU, where alone a
        verdict is None.
        """
        if finite is None and not self.errors.item():
            return None
        # A copy: counting changes the flag in place, and the select's gradient needs it.
        ok = self.working.clone() if finite is None else finite & self.working
        if counted and not _is_repeated():
            errors = self.errors * 0 if finite is None else (self.errors + 1) * ~finite.all()
            self.errors.copy_(torch.where(self.working, errors, self.errors))
            self.working.copy_(self.errors < FAILURES_TO_RECOVERY)
        return ok


_TAKEN = {
    *vars(GraftedKernel),
    *("contain", "errors", "example_rank", "frozen", "kernel_id", "param_names", "route"),
    *("training", "twin", "working"),
}
"""Names that a parameter cannot have as an attribute."""


def _is_repeated() -> bool:
    """Whether a call is no step of its own.

    A backward pass computes calls again where activations were checkpointed; and what torch.func
    transforms may leave nothing by the side.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 or in_transform()
