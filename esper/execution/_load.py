"""From an artifact to a kernel that a backend can run.

Programs are kept by their bytes: kernels that differ in parameters alone share
one program, and so one compilation.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from esper.artifacts import Artifact, load_stablehlo, load_torchscript
from esper.contracts import KernelSignature
from esper.tezzeret import jax_program, parse_blueprint, resolve
from esper_functional import Kernel, Program

if TYPE_CHECKING:
    from esper_adapters.pytorch import TorchKernel


@lru_cache(maxsize=256)
def _jax_program(
    digest: str,
    stablehlo: bytes,
    blueprint: bytes,
    signature: str,
    sizes: tuple[tuple[str, int], ...],
) -> Program:
    # A deserialised program cannot be mapped; its blueprint's function can, and the
    # compiler has refused the artifact unless they agree.
    ir = parse_blueprint(blueprint.decode(), "the artifact's blueprint")
    twin = jax_program(resolve(ir, KernelSignature.model_validate_json(signature), dict(sizes)))
    return Program(f"stablehlo:{digest}", load_stablehlo(stablehlo).call, batches=False, twin=twin)


@lru_cache(maxsize=256)
def _torch_program(torchscript: bytes) -> Any:
    return load_torchscript(torchscript)


def load_jax_kernel(artifact: Artifact) -> Kernel:
    """The kernel of an artifact's StableHLO program, with its parameters at birth.

    Raises:
        ArtifactError: where the program holds what is not allowed.
    """
    import jax.numpy as jnp

    manifest = artifact.manifest
    program = _jax_program(
        manifest.digests["program.stablehlo"],
        artifact.stablehlo,
        artifact.blueprint,
        manifest.signature.model_dump_json(),
        tuple(sorted(manifest.sizes.items())),
    )
    params = {name: jnp.asarray(p) for name, p in artifact.params.items()}
    return Kernel(program, params)


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
        example_rank=len(manifest.signature.input_shape),
        input_shape=tuple(manifest.signature.input_shape),
        output_shape=tuple(manifest.signature.output_shape),
        dtype=manifest.signature.dtype,
        confidence=manifest.confidence,
        route="torchscript",
    )
