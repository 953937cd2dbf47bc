"""Real artifacts, compiled once in a process, with parameters drawn anew."""

import dataclasses
from functools import cache

import jax.numpy as jnp
import numpy as np
import torch

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tezzeret import compile_blueprint, load_blueprint
from esper_adapters.pytorch import TorchKernel
from esper_functional import Kernel

BLUEPRINTS = ("bottleneck", "gated", "low_rank", "residual_mlp")


@cache
def artifact(blueprint: str = "bottleneck", inputs: int = 3, outputs: int = 5) -> Artifact:
    signature = KernelSignature(input_shape=(inputs,), output_shape=(outputs,))
    sizes = {"rank": 2} if blueprint == "low_rank" else {"width": 4}
    return compile_blueprint(load_blueprint(blueprint), signature, sizes=sizes)


def random_params(source: Artifact, seed: int) -> dict[str, np.ndarray]:
    """Parameters away from birth, where many kernels are zero."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(scale=p.shape[-1] ** -0.5, size=p.shape).astype(np.float32)
        for name, p in source.params.items()
    }


def jax_kernel(seed: int = 0, source: Artifact | None = None) -> Kernel:
    source = source or artifact()
    params = {name: jnp.asarray(p) for name, p in random_params(source, seed).items()}
    return Kernel(load_jax_kernel(source).program, params)


def torch_kernel(seed: int = 0, source: Artifact | None = None) -> TorchKernel:
    """The same kernel as `jax_kernel` of these arguments."""
    source = source or artifact()
    return dataclasses.replace(load_torch_kernel(source), params=random_params(source, seed))


def nan_kernel() -> TorchKernel:
    kernel = torch_kernel()
    nan = {name: np.full_like(p, np.nan) for name, p in kernel.params.items()}
    return dataclasses.replace(kernel, params=nan)


def root_kernel() -> TorchKernel:
    """3 -> 5; NaN for each example with a negative sum, and only for those."""

    def program(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x.sum(-1, keepdim=True)) * scale

    scale = np.linspace(0.5, 2.0, 5, dtype=np.float32)
    return TorchKernel("0" * 64, program, {"scale": scale}, 1, (3,), (5,), "float32")


def run_torch(kernel: TorchKernel, x: torch.Tensor) -> torch.Tensor:
    """The kernel's output by itself, with its parameters at birth."""
    return kernel.program(*(torch.tensor(p) for p in kernel.params.values()), x)
