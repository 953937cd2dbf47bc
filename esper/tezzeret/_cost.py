"""What a kernel costs, counted: from its blueprint, or where it has none from its program."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp

from esper.artifacts import Artifact, load_stablehlo
from esper.contracts import KernelSignature
from esper.tezzeret._blueprint import read_blueprint
from esper.tezzeret._resolve import resolve


@dataclasses.dataclass(frozen=True)
class ArtifactCost:
    """Counted, and so the same on every machine."""

    parameter_count: int
    flops: int
    """Floating-point operations of one example, forward."""
    values: int
    """Numbers that the operations give for one example, the input among them: what a backward pass
    may keep."""


def artifact_cost(artifact: Artifact) -> ArtifactCost:
    """The cost of an artifact.

    Of a user's own kernel, which has no blueprint, FLOPs are XLA's count for its program at a batch
    of 1, as it compiles it for a CPU, and the values are those of its input and its output alone.
    """
    manifest = artifact.manifest
    count = sum(int(p.size) for p in artifact.params.values())
    signature = manifest.signature.model_dump_json()
    if artifact.blueprint is not None:
        sizes = tuple(sorted(manifest.sizes.items()))
        return ArtifactCost(count, *_of_blueprint(artifact.blueprint, signature, sizes))
    types = tuple(sorted((n, p.shape, p.dtype.name) for n, p in artifact.params.items()))
    return ArtifactCost(count, *_of_program(artifact.stablehlo, signature, types))


# A growing network is counted at every boundary, with the kernels that are on their way.


@lru_cache(maxsize=256)
def _of_blueprint(
    blueprint: bytes, signature: str, sizes: tuple[tuple[str, int], ...]
) -> tuple[int, int]:
    shapes = KernelSignature.model_validate_json(signature)
    graph = resolve(read_blueprint(blueprint, "the artifact's blueprint"), shapes, dict(sizes))
    all_shapes = [shapes.input_shape, *(node.output_shape for node in graph.nodes)]
    return graph.flops, sum(map(_volume, all_shapes))


@lru_cache(maxsize=256)
def _of_program(
    stablehlo: bytes, signature: str, types: tuple[tuple[str, tuple[int, ...], str], ...]
) -> tuple[int, int]:
    shapes = KernelSignature.model_validate_json(signature)
    x = jax.ShapeDtypeStruct((1, *shapes.input_shape), jnp.dtype(shapes.dtype))
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in types}
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(load_stablehlo(stablehlo).call).lower(params, x)
        counted = lowered.compile().cost_analysis() or {}
    flops = max(0, round(counted.get("flops", 0.0)))
    return flops, _volume(shapes.input_shape) + _volume(shapes.output_shape)


def _volume(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size
