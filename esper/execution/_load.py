"""From an artifact to a kernel that a backend can run.

Programs are kept by their bytes: kernels that differ in parameters alone share
one program, and so one compilation.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from esper.artifacts import Artifact, load_stablehlo, load_torchscript
from esper_functional import Kernel, Program

if TYPE_CHECKING:
    from esper_adapters.pytorch import TorchKernel


@lru_cache(maxsize=256)
def _jax_program(digest: str, stablehlo: bytes) -> Program:
    return Program(f"stablehlo:{digest}", load_stablehlo(stablehlo).call, batches=False)


@lru_cache(maxsize=256)
def _torch_program(torchscript: bytes) -> Any:
    return load_torchscript(torchscript)


def load_jax_kernel(artifact: Artifact) -> Kernel:
    """The kernel of an artifact's StableHLO program, with its parameters at birth.

    Raises:
        ArtifactError: where the program holds what is not allowed.
    """
    import jax.numpy as jnp

    digest = artifact.manifest.digests["program.stablehlo"]
    params = {name: jnp.asarray(p) for name, p in artifact.params.items()}
    return Kernel(_jax_program(digest, artifact.stablehlo), params)


def load_torch_kernel(artifact: Artifact) -> "TorchKernel":
    """The kernel of an artifact's TorchScript program, with its parameters at birth.

    Raises:
        ArtifactError: where the program holds what is not allowed.
    """
    from esper_adapters.pytorch import TorchKernel

    manifest = artifact.manifest
    return TorchKernel(
        kernel_id=artifact.kernel_id,
        program=_torch_program(artifact.torchscript),
        params=artifact.params,
        in_features=manifest.signature.input_shape[-1],
        out_features=manifest.signature.output_shape[-1],
        dtype=manifest.signature.dtype,
        confidence=manifest.confidence,
    )
