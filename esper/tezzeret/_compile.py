"""From a blueprint to an artifact."""

import hashlib
import json
import warnings
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from jax import export

from esper.artifacts import (
    Artifact,
    load_stablehlo,
    load_torchscript,
    normalise_torchscript,
    serialise_stablehlo,
    write_artifact,
)
from esper.contracts import KernelSignature
from esper.errors import BlueprintError, KernelCompilationError
from esper.tezzeret._blueprint import BlueprintIR, resolve
from esper.tezzeret._contract import check_birth
from esper.tezzeret._parity import check_parity
from esper.tezzeret._programs import (
    initial_params,
    jax_program,
    torch_program,
    torchscript_archive,
)

PLATFORMS = ("cpu", "cuda")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "jaxlib", "numpy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError as error:
            raise KernelCompilationError(
                f"compiling a kernel needs {package}, which is not installed; install"
                " 'esper-morphogenetic[torch]'"
            ) from error
    return found


def kernel_recipe(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: dict[str, int] | None = None,
    init_seed: int = 0,
) -> str:
    """SHA-256 of all that an artifact is compiled from; see `compile_blueprint`."""
    content = {
        "blueprint": blueprint.digest(),
        "signature": str(signature),
        "sizes": {**blueprint.sizes, **(sizes or {})},
        "init_seed": init_seed,
        "versions": _versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def compile_blueprint(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: dict[str, int] | None = None,
    init_seed: int = 0,
) -> Artifact:
    """Compile a blueprint for a signature.

    The same blueprint, signature, sizes, seed and library versions give the same
    bytes on any machine, and nothing in them tells where they were made.

    Args:
        sizes: values for some of the blueprint's named sizes.
        init_seed: seed of the first parameters.

    Raises:
        BlueprintError: for a blueprint that does not fit the signature.
        KernelCompilationError: where the two programs disagree, or a claim is false.
    """
    if len(signature.input_shape) != 1 or len(signature.output_shape) != 1:
        raise BlueprintError(
            f"blueprint {blueprint.name!r}: a signature is one vector in and one out, got"
            f" {signature}"
        )
    versions = _versions()
    graph = resolve(blueprint, signature, sizes)
    params = initial_params(graph, init_seed)
    program = jax_program(graph)
    (batch,) = export.symbolic_shape("b")
    dtype = jnp.dtype(signature.dtype)
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()},
        jax.ShapeDtypeStruct((batch, *signature.input_shape), dtype),
    )
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch and is what it can load without Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        torchscript = normalise_torchscript(torchscript_archive(torch_program(graph)))
    stablehlo = serialise_stablehlo(exported)
    # The gates run what was written, not what it was written from.
    ours, theirs = load_stablehlo(stablehlo).call, load_torchscript(torchscript)
    where = f"blueprint {blueprint.name!r} for {signature}"
    try:
        check_birth(graph, ours, params, blueprint.birth)
        check_parity(graph, ours, theirs)
    except KernelCompilationError as error:
        raise KernelCompilationError(f"{where} was refused: {error}") from error
    return write_artifact(
        blueprint_name=blueprint.name,
        recipe=kernel_recipe(blueprint, signature, sizes=sizes, init_seed=init_seed),
        blueprint=blueprint.canonical_json(),
        signature=signature,
        sizes={**blueprint.sizes, **(sizes or {})},
        birth=blueprint.birth,
        confidence=blueprint.confidence,
        init_seed=init_seed,
        params=params,
        stablehlo=stablehlo,
        torchscript=torchscript,
        versions=versions,
    )
