"""From a blueprint to an artifact."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from esper.artifacts import (
    Artifact,
    load_stablehlo,
    load_torchscript,
    normalise_torchscript,
    serialise_stablehlo,
    trust,
    write_artifact,
)
from esper.contracts import KernelSignature
from esper.errors import KernelCompilationError
from esper.tezzeret._blueprint import BlueprintIR, read_blueprint
from esper.tezzeret._contract import check_birth
from esper.tezzeret._parity import check_parity
from esper.tezzeret._programs import (
    check_seed,
    initial_params,
    jax_program,
    torch_program,
    torchscript_archive,
)
from esper.tezzeret._resolve import Graph, resolve

PLATFORMS = ("cpu", "cuda")


def library_versions(*, torch: bool = True, also: Sequence[str] = ()) -> dict[str, str]:
    """Of the libraries that an artifact's bytes depend on.

    Args:
        torch: whether they depend on torch.
        also: further ones.

    Raises:
        KernelCompilationError: where one of them is not installed.
    """
    found = {}
    for package in ("jax", "jaxlib", "numpy", *(("torch",) if torch else ()), *also):
        try:
            found[package] = _version(package)
        except PackageNotFoundError as error:
            raise KernelCompilationError(
                f"compiling a kernel needs {package}, which is not installed; install"
                " 'esper-morphogenetic[torch]'"
            ) from error
    return found


# Read from a package's metadata, which takes longer than a kernel's first parameters do.
_version = lru_cache(version)


def kernel_recipe(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: Mapping[str, int] | None = None,
    init_seed: int = 0,
    ancestor: str | None = None,
) -> str:
    """SHA-256 of all that an artifact is compiled from; see `compile_blueprint`."""
    content: dict[str, Any] = {
        "blueprint": blueprint.digest(),
        "signature": str(signature),
        "sizes": {**blueprint.sizes, **(sizes or {})},
        "init_seed": init_seed,
        "versions": library_versions(),
    }
    if ancestor is not None:
        content["ancestor"] = ancestor
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Both programs of a graph, which agree."""

    graph: Graph
    stablehlo: bytes
    torchscript: bytes
    vjp_order: int
    run: Callable[..., Any]
    """The StableHLO that was written, to be called."""


@lru_cache(maxsize=64)
def _programs(
    canonical: bytes, signature_json: str, sizes: tuple[tuple[str, int], ...]
) -> _Programs:
    """Kernels that differ in their first parameters alone share their programs."""
    blueprint = read_blueprint(canonical, "the blueprint")
    signature = KernelSignature.model_validate_json(signature_json)
    graph = resolve(blueprint, signature, dict(sizes))
    stablehlo, torchscript, vjp_order = write_programs(graph)
    # The gates run what was written, not what it was written from.
    run = load_stablehlo(stablehlo).call
    check_parity(graph, run, load_torchscript(torchscript))
    return _Programs(graph, stablehlo, torchscript, vjp_order, run)


def write_programs(graph: Graph) -> tuple[bytes, bytes, int]:
    """StableHLO and TorchScript as an artifact holds them, and the order of the VJPs in it."""
    signature = graph.signature
    (batch,) = export.symbolic_shape("b")
    dtype = jnp.dtype(signature.dtype)
    exported = export.export(jax.jit(jax_program(graph)), platforms=PLATFORMS)(
        {p.name: jax.ShapeDtypeStruct(p.shape, dtype) for p in graph.parameters},
        jax.ShapeDtypeStruct((batch, *signature.input_shape), dtype),
    )
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch and is what it can load without Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        torchscript = normalise_torchscript(torchscript_archive(torch_program(graph)))
    stablehlo, vjp_order = serialise_stablehlo(exported)
    return stablehlo, torchscript, vjp_order


def compile_blueprint(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: Mapping[str, int] | None = None,
    init_seed: int = 0,
    ancestor: str | None = None,
) -> Artifact:
    """Compile a blueprint for a signature.

    The same blueprint, signature, sizes, seed and library versions give the same
    bytes on any machine, and nothing in them tells where they were made.

    Args:
        sizes: values for some of the blueprint's named sizes.
        init_seed: seed of the first parameters.
        ancestor: the id of the artifact that this one replaces; see `recompile`.

    Raises:
        InputError: for a signature or a seed that is none.
        BlueprintError: for a blueprint that does not fit the signature, or a size that is none.
        KernelCompilationError: where the two programs disagree, or a claim is false.
    """
    versions = library_versions()
    check_seed(init_seed)
    resolve(blueprint, signature, sizes)
    where = f"blueprint {blueprint.name!r} for {signature}"
    given = {**blueprint.sizes, **(sizes or {})}
    try:
        made = _programs(
            blueprint.canonical_json(), signature.model_dump_json(), tuple(sorted(given.items()))
        )
        params = initial_params(made.graph, init_seed)
        check_birth(made.graph, made.run, params, blueprint.birth)
    except KernelCompilationError as error:
        raise KernelCompilationError(f"{where} was refused: {error}") from error
    artifact = write_artifact(
        blueprint_name=blueprint.name,
        recipe=kernel_recipe(
            blueprint, signature, sizes=sizes, init_seed=init_seed, ancestor=ancestor
        ),
        blueprint=blueprint.canonical_json(),
        signature=signature,
        sizes=given,
        birth=blueprint.birth,
        confidence=blueprint.confidence,
        init_seed=init_seed,
        params=params,
        stablehlo=made.stablehlo,
        torchscript=made.torchscript,
        versions=versions,
        vjp_order=made.vjp_order,
        ancestor=ancestor,
    )
    trust(artifact)
    return artifact
