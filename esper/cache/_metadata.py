"""What an artifact or a record of the library tells of a kernel."""

from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import ValidationError

from esper.artifacts import Artifact
from esper.contracts import KernelMetadata, KernelSignature
from esper.errors import BlueprintError, InputError
from esper.tezzeret import read_blueprint, resolve

if TYPE_CHECKING:
    from esper.urza import KernelRecord

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@lru_cache(maxsize=256)
def _flops(
    blueprint: bytes | None, signature: str, sizes: tuple[tuple[str, int], ...]
) -> int | None:
    if blueprint is None:  # a user's own kernel; the library counts those by their program
        return None
    try:
        ir = read_blueprint(blueprint, "the artifact's blueprint")
        return resolve(ir, KernelSignature.model_validate_json(signature), dict(sizes)).flops
    except (BlueprintError, UnicodeDecodeError):
        # Whoever loads the kernel is told; what it costs is only not known here.
        return None


@lru_cache(maxsize=256)
def _platforms(digest: str, program: bytes) -> tuple[str, ...]:
    from jax import export

    try:
        return tuple(export.deserialize(bytearray(program)).platforms)
    except Exception:  # flatbuffers raises whatever the bytes lead it to
        # It runs nowhere, and whoever loads it is told why.
        return ()


def describe_artifact(artifact: Artifact) -> KernelMetadata:
    """The metadata of an artifact; runs nothing of it."""
    manifest = artifact.manifest
    signature = manifest.signature
    return KernelMetadata(
        kernel_id=artifact.kernel_id,
        blueprint=manifest.blueprint,
        birth=manifest.birth,
        confidence=manifest.confidence,
        input_shape=signature.input_shape,
        output_shape=signature.output_shape,
        dtype=signature.dtype,
        parameter_count=sum(int(p.size) for p in artifact.params.values()),
        parameter_bytes=sum(int(p.nbytes) for p in artifact.params.values()),
        flops=_flops(
            artifact.blueprint,
            signature.model_dump_json(),
            tuple(sorted(manifest.sizes.items())),
        ),
        size_bytes=len(artifact.data),
        platforms=_platforms(manifest.digests["program.stablehlo"], artifact.stablehlo),
        has_torchscript=artifact.torchscript is not None,
    )


def describe_record(record: "KernelRecord") -> KernelMetadata:
    """The metadata of a record; where its programs run is not known before it is loaded.

    Raises:
        InputError: for one that cannot be read.
    """
    sides, _, dtype = record.signature.partition(" ")
    try:
        taken, given = (tuple(map(int, side.split("x"))) for side in sides.split("->"))
        return KernelMetadata.model_validate(
            {
                "kernel_id": record.kernel_id,
                "blueprint": record.blueprint,
                "birth": record.birth,
                "confidence": record.confidence,
                "input_shape": taken,
                "output_shape": given,
                "dtype": dtype,
                "parameter_count": record.parameter_count,
                "parameter_bytes": record.parameter_count * _ELEMENT_BYTES.get(dtype, 4),
                "flops": record.flops,
                "size_bytes": record.size_bytes,
            }
        )
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{first['loc'][0]} is {first['input']!r}: {first['msg']}"
        raise InputError(
            f"the record of kernel {record.kernel_id[:12]} cannot be used: {reason}. Its signature"
            f" is {record.signature!r}, expected one such as '2->8 float32'"
        ) from error


def artifact_bytes(artifact: Artifact) -> int:
    """What an artifact costs in memory: all bytes that it holds, its file and what was read of it.

    The objects of Python around them, a few hundred bytes each, are not counted.
    """
    parts = (artifact.data, artifact.blueprint, artifact.stablehlo, artifact.torchscript)
    held = sum(len(part) for part in parts if part is not None)
    return held + sum(int(p.nbytes) for p in artifact.params.values())
