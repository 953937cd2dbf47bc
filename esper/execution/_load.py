"""From an artifact to a kernel that a backend can run.

Programs are kept by their bytes: kernels that differ in parameters alone share
one program, and so one compilation.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from esper.artifacts import Artifact, ensure_trusted, load_stablehlo
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError
from esper.execution._script import ScriptProgram
from esper.tensors import to_torch
from esper.tezzeret import jax_program, native_program, read_blueprint, resolve
from esper_functional import Kernel, Program

if TYPE_CHECKING:
    from esper_adapters.pytorch import TorchKernel


Trust = Callable[[Artifact], None]
"""Raises ArtifactError for an artifact that is not to be run."""


@lru_cache(maxsize=256)
def _jax_program(
    digest: str,
    stablehlo: bytes,
    blueprint: bytes | None,
    signature: str,
    sizes: tuple[tuple[str, int], ...],
) -> Program:
    # A deserialised program cannot be mapped; its blueprint's function can, and the
    # compiler has refused the artifact unless they agree.
    shapes = KernelSignature.model_validate_json(signature)
    graph = None
    if blueprint is not None:
        ir = read_blueprint(blueprint, "the artifact's blueprint")
        graph = resolve(ir, shapes, dict(sizes))
    return Program(
        f"stablehlo:{digest}",
        load_stablehlo(stablehlo).call,
        example_rank=len(shapes.input_shape),
        batches=False,
        twin=None if graph is None else jax_program(graph),
        independent=graph is None or not graph.mixes_batch,
    )


@lru_cache(maxsize=256)
def _torch_program(torchscript: bytes) -> Any:
    return ScriptProgram(torchscript)


def load_jax_kernel(artifact: Artifact, *, trust: Trust | None = ensure_trusted) -> Kernel:
    """The kernel of an artifact's StableHLO program, with its parameters at birth.

    Args:
        trust: raises ArtifactError for an artifact that is not to be run. By default, what was
            not compiled in this process is verified first, in a child process; see
            `esper.artifacts.ensure_trusted`. None where that was done.

    Raises:
        ArtifactError: where it is refused, or the program holds what is not allowed.
    """
    import jax.numpy as jnp

    if trust is not None:
        trust(artifact)

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


Route = Literal["torchscript", "native", "bridge"]
"""How torch runs a kernel: the artifact's TorchScript; its blueprint's operations as torch's own,
which `torch.compile` and `torch.func` see through; or its StableHLO, by jax."""


@lru_cache(maxsize=256)
def _native_program(blueprint: bytes, signature: str, sizes: tuple[tuple[str, int], ...]) -> Any:
    ir = read_blueprint(blueprint, "the artifact's blueprint")
    return native_program(resolve(ir, KernelSignature.model_validate_json(signature), dict(sizes)))


def load_torch_kernel(
    artifact: Artifact, *, route: Route | None = None, trust: Trust | None = ensure_trusted
) -> "TorchKernel":
    """The kernel of an artifact for layers of torch, with its parameters at birth.

    Args:
        route: how it is to run; by default as TorchScript where the artifact holds any, and over
            the bridge where it does not.
        trust: see `load_jax_kernel`.

    Raises:
        ArtifactError: where it is refused, the program holds what is not allowed, or there is
            none for the route.
        InputError: for an unknown route.
    """
    from esper_adapters.pytorch import TorchKernel, kernel_from_jax

    manifest = artifact.manifest
    if route not in (None, *get_args(Route)):
        raise InputError(f"unknown route {route!r}: expected one of {', '.join(get_args(Route))}")
    if trust is not None:
        trust(artifact)
    chosen = route or ("bridge" if artifact.torchscript is None else "torchscript")
    signature = manifest.signature
    shapes = {
        "input_shape": tuple(signature.input_shape),
        "output_shape": tuple(signature.output_shape),
        "dtype": signature.dtype,
        "confidence": manifest.confidence,
    }
    if chosen == "bridge":
        kernel = load_jax_kernel(artifact, trust=None)
        return kernel_from_jax(kernel, kernel_id=artifact.kernel_id, **shapes)
    if chosen == "native":
        if artifact.blueprint is None:
            raise ArtifactError(
                f"kernel {artifact.kernel_id[:12]} was made of a {manifest.origin} and holds no"
                " blueprint: load it by the route 'torchscript' or 'bridge'"
            )
        program = _native_program(
            artifact.blueprint, signature.model_dump_json(), tuple(sorted(manifest.sizes.items()))
        )
    elif artifact.torchscript is None:
        raise ArtifactError(
            f"kernel {artifact.kernel_id[:12]} holds no TorchScript: load it by the route"
            " 'bridge', or 'native'"
        )
    else:
        program = _torch_program(artifact.torchscript)
    return TorchKernel(
        kernel_id=artifact.kernel_id,
        program=program,
        params=_torch_params(artifact),
        example_rank=len(signature.input_shape),
        route=chosen,
        twin=lambda: load_jax_kernel(artifact, trust=None),
        **shapes,
    )


def _torch_params(artifact: Artifact) -> dict[str, Any]:
    """What torch can take: it knows no bfloat16 of numpy."""
    return {
        name: to_torch(p) if p.dtype.name == "bfloat16" else p
        for name, p in artifact.params.items()
    }
