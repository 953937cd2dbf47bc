"""What a kernel costs, counted: from its blueprint, or where it has none from its program."""

import dataclasses

import jax
import jax.numpy as jnp

from esper.artifacts import Artifact, load_stablehlo
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
    signature = manifest.signature
    if artifact.blueprint is not None:
        name = f"the blueprint of kernel {artifact.kernel_id[:12]}"
        graph = resolve(read_blueprint(artifact.blueprint, name), signature, manifest.sizes)
        shapes = [signature.input_shape, *(node.output_shape for node in graph.nodes)]
        return ArtifactCost(count, graph.flops, sum(map(_volume, shapes)))
    x = jax.ShapeDtypeStruct((1, *signature.input_shape), jnp.dtype(signature.dtype))
    params = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in artifact.params.items()}
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(load_stablehlo(artifact.stablehlo).call).lower(params, x)
        counted = lowered.compile().cost_analysis() or {}
    values = _volume(signature.input_shape) + _volume(signature.output_shape)
    return ArtifactCost(count, max(0, round(counted.get("flops", 0.0))), values)


def _volume(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size
