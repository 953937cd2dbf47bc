"""What an executor needs of a framework: load, place, run, wait, and look."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.execution._load import load_jax_kernel, load_torch_kernel
from esper.recovery._types import described
from esper_functional import KernelMismatchError

Params = Mapping[str, Any]
"""Arrays by name, in the order of the program's arguments."""

Run = Callable[[Params, Any], Any]
"""`run(params, x)`: one program, which kernels that differ in parameters share."""


class Backend(Protocol):
    """One framework on one device."""

    name: str
    device: str

    def routes(self, artifact: Artifact) -> tuple[str, ...]:
        """How it can run this artifact, the best first."""
        ...

    def load(self, artifact: Artifact, route: str) -> Any:
        """The kernel of an artifact, which has `program` and `params`."""
        ...

    def with_program(self, kernel: Any, program: Any) -> Any:
        """The kernel with an equal program that is at hand."""
        ...

    def runner(self, kernel: Any) -> Run:
        """What runs its program."""
        ...

    def place(self, params: Any) -> Params:
        """Parameters on the device, in the order of the program's arguments."""
        ...

    def enter(self, x: Any, name: str = "the input") -> Any:
        """An array on the device; raises KernelMismatchError for what is none of its own."""
        ...

    def wait(self, y: Any) -> bool:
        """Wait for a result; whether there is one, and not one to come when it is traced."""
        ...

    def not_finite(self, y: Any) -> int:
        """How many numbers of a result are not finite."""
        ...

    def random(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An input to measure with."""
        ...

    def gradients(self, run: Run) -> Run:
        """The gradients of the sum of the output, with respect to parameters and input."""
        ...


class TorchBackend:
    """Kernels in torch: TorchScript where the artifact holds any, and jax over the bridge.

    Args:
        device: by default CUDA's where there is one.
        synchronize: wait for CUDA before a latency is read.
    """

    name = "torch"

    def __init__(self, device: Any, synchronize: bool) -> None:
        try:
            import torch
        except ImportError as error:
            raise InputError(
                "the backend 'torch' needs torch, which cannot be imported: install"
                " 'esper-morphogenetic[torch]', or use the backend 'jax'"
            ) from error
        found = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        try:
            self._device = torch.device(found)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{device!r} is no device of torch: {error}") from error
        try:
            # A device may have a name and not be there: each kernel would be blamed for it.
            torch.empty(0, device=self._device)
        except Exception as error:
            raise InputError(
                f"torch cannot use the device {str(self._device)!r} here:"
                f" {described(error)}. Give one that is there, such as 'cpu'"
            ) from error
        self._torch = torch
        self._synchronize = synchronize and self._device.type == "cuda"
        self.device = str(self._device)

    def routes(self, artifact: Artifact) -> tuple[str, ...]:
        """See `Backend.routes`."""
        return ("bridge",) if artifact.torchscript is None else ("torchscript", "bridge")

    def load(self, artifact: Artifact, route: Any) -> Any:
        """See `Backend.load`."""
        return load_torch_kernel(artifact, route=route, trust=None)

    def with_program(self, kernel: Any, program: Any) -> Any:
        """See `Backend.with_program`."""
        # A program of the bridge is otherwise made, and compiled, for each kernel.
        return dataclasses.replace(kernel, program=program)

    def runner(self, kernel: Any) -> Run:
        """See `Backend.runner`."""
        program = kernel.program
        return lambda params, x: program(*params.values(), x)

    def place(self, params: Any) -> Params:
        """See `Backend.place`."""
        torch = self._torch
        return {
            # Copies: what is trained in place is not the artifact's.
            name: (p.detach().clone() if isinstance(p, torch.Tensor) else torch.tensor(p)).to(
                self._device
            )
            for name, p in params.items()
        }

    def enter(self, x: Any, name: str = "the input") -> Any:
        """See `Backend.enter`."""
        if not isinstance(x, self._torch.Tensor):
            raise KernelMismatchError(
                f"a kernel on torch takes a tensor as {name}, got a {type(x).__name__}: convert"
                " it, or use the backend 'jax'"
            )
        return x if x.device == self._device else x.to(self._device)

    def wait(self, y: Any) -> bool:
        """See `Backend.wait`."""
        if self._synchronize:
            self._torch.cuda.synchronize(self._device)
        return True

    def not_finite(self, y: Any) -> int:
        """See `Backend.not_finite`."""
        return int((~self._torch.isfinite(y)).sum())

    def random(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `Backend.random`."""
        torch = self._torch
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*shape, generator=generator, dtype=getattr(torch, dtype))
        return x.to(self._device)

    def gradients(self, run: Run) -> Run:
        """See `Backend.gradients`."""
        torch = self._torch

        def both(params: Params, x: Any) -> Any:
            leaves = [*params.values(), x]
            wanted = [leaf.detach().requires_grad_() for leaf in leaves]
            named = dict(zip(params, wanted, strict=False))
            with torch.enable_grad():
                # An input may have no part in the output.
                return torch.autograd.grad(run(named, wanted[-1]).sum(), wanted, allow_unused=True)

        return both


class JaxBackend:
    """Kernels in jax: StableHLO, compiled for each shape of the input.

    Args:
        device: one of jax, or the name of a platform; by default what jax takes.
    """

    name = "jax"

    def __init__(self, device: Any) -> None:
        import jax
        import numpy as np
        from jax.core import Tracer

        self._jax = jax
        self._arrays = (jax.Array, np.ndarray)
        self._tracer = Tracer
        if isinstance(device, str):
            try:
                device = jax.devices(device)[0]
            except RuntimeError as error:
                raise InputError(f"{device!r} is no platform of jax here: {error}") from error
        elif not (device is None or isinstance(device, jax.Device)):
            raise InputError(
                f"{device!r} is no device of jax: expected one of jax.devices(), or a platform's"
                " name"
            )
        self._device = device
        self.device = str(device or jax.devices()[0])

    def routes(self, artifact: Artifact) -> tuple[str, ...]:
        """See `Backend.routes`."""
        return ("stablehlo",)

    def load(self, artifact: Artifact, route: str) -> Any:
        """See `Backend.load`."""
        return load_jax_kernel(artifact, trust=None)

    def with_program(self, kernel: Any, program: Any) -> Any:
        """See `Backend.with_program`."""
        return dataclasses.replace(kernel, program=program)

    def runner(self, kernel: Any) -> Run:
        """See `Backend.runner`."""
        apply, rank = kernel.program.apply, kernel.program.example_rank

        def run(params: Params, x: Any) -> Any:
            lead, example = x.shape[: x.ndim - rank], x.shape[x.ndim - rank :]
            y = apply(params, x.reshape((-1, *example)))
            return y.reshape((*lead, *y.shape[1:]))

        return self._jax.jit(run)

    def place(self, params: Any) -> Params:
        """See `Backend.place`."""
        return params if self._device is None else self._jax.device_put(params, self._device)

    def enter(self, x: Any, name: str = "the input") -> Any:
        """See `Backend.enter`."""
        if not isinstance(x, self._arrays):
            raise KernelMismatchError(
                f"a kernel on jax takes an array of jax or numpy as {name}, got a"
                f" {type(x).__name__}: convert it with jax.numpy.asarray, or use the backend"
                " 'torch'"
            )
        if self._device is None or isinstance(x, self._tracer) or x.device == self._device:
            return x
        return self._jax.device_put(x, self._device)

    def wait(self, y: Any) -> bool:
        """See `Backend.wait`."""
        if isinstance(y, self._tracer):
            return False
        y.block_until_ready()
        return True

    def not_finite(self, y: Any) -> int:
        """See `Backend.not_finite`."""
        return int((~self._jax.numpy.isfinite(y)).sum())

    def random(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `Backend.random`."""
        key = self._jax.random.key(0)
        return self.enter(self._jax.random.normal(key, shape, self._jax.numpy.dtype(dtype)))

    def gradients(self, run: Run) -> Run:
        """See `Backend.gradients`."""
        return self._jax.jit(self._jax.grad(lambda params, x: run(params, x).sum(), argnums=(0, 1)))


BACKENDS = ("torch", "jax")
"""Frameworks that run kernels."""


def backend_of(name: str, device: Any, synchronize: bool) -> Backend:
    """The backend of a name.

    Raises:
        InputError: for an unknown one, or a device that is none of it or not there.
    """
    if name == "torch":
        return TorchBackend(device, synchronize)
    if name == "jax":
        return JaxBackend(device)
    raise InputError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
