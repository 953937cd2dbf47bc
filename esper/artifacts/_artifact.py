"""A kernel artifact: one file, whose only identity is the SHA-256 of its bytes.

Members: `manifest.json`, `params.safetensors`, `program.stablehlo` and, where there
is one, `blueprint.json` and `program.torchscript`. Nothing is
ever unpickled, and no program runs before it was scanned.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import save as save_safetensors

from esper.artifacts._archive import read_archive, write_archive
from esper.artifacts._tensors import load_tensors
from esper.contracts import KernelSignature, Manifest, TensorSpec
from esper.errors import ArtifactError

MAX_BYTES = 1 << 30
"""Largest content of an artifact that is read."""

_BLUEPRINT = "blueprint.json"
_PARAMS = "params.safetensors"
_STABLEHLO = "program.stablehlo"
_TORCHSCRIPT = "program.torchscript"
_MANIFEST = "manifest.json"
_CONTENT = (_PARAMS, _STABLEHLO)
_OPTIONAL = (_BLUEPRINT, _TORCHSCRIPT)

_MAX_TEXT = 1 << 20
"""Largest manifest or blueprint that is parsed."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact whose bytes agree with its manifest. Its programs are not yet trusted."""

    kernel_id: str
    """SHA-256 of the file."""
    data: bytes
    manifest: Manifest
    params: dict[str, np.ndarray]
    blueprint: bytes | None
    """Canonical JSON; None for a user's own kernel."""
    stablehlo: bytes
    torchscript: bytes | None
    """None for a kernel that torch runs over the bridge to jax."""


def write_artifact(
    *,
    blueprint_name: str,
    recipe: str,
    blueprint: bytes | None,
    signature: KernelSignature,
    sizes: dict[str, int],
    birth: Literal["zero", "identity", "free"],
    confidence: float,
    init_seed: int,
    params: dict[str, np.ndarray],
    stablehlo: bytes,
    torchscript: bytes | None,
    versions: dict[str, str],
    origin: Literal["blueprint", "module", "function"] = "blueprint",
    vjp_order: int = 1,
    ancestor: str | None = None,
) -> Artifact:
    """Put the parts of an artifact together; equal parts give equal bytes.

    Raises:
        ArtifactError: for parts that are no artifact together.
    """
    content = {
        _PARAMS: save_safetensors(params),
        _STABLEHLO: stablehlo,
    }
    if blueprint is not None:
        content[_BLUEPRINT] = blueprint
    if torchscript is not None:
        content[_TORCHSCRIPT] = torchscript
    try:
        manifest = Manifest(
            blueprint=blueprint_name,
            origin=origin,
            vjp_order=vjp_order,
            ancestor=ancestor,
            recipe=recipe,
            signature=signature,
            sizes=sizes,
            birth=birth,
            confidence=confidence,
            init_seed=init_seed,
            parameters=tuple(
                TensorSpec(name=n, shape=tuple(p.shape), dtype=p.dtype.name)
                for n, p in params.items()
            ),
            digests={name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
            versions=versions,
        )
    except ValidationError as error:
        raise ArtifactError(f"these parts are no kernel artifact: {_shown(error)}") from error
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1).encode()
    return read_artifact(write_archive({**content, _MANIFEST: text}))


def rewrite_artifact(artifact: Artifact, **changed: Any) -> Artifact:
    """The artifact with other parts, and a manifest that agrees with them.

    Its parameters after training, say, as a kernel of its own. What was promised of the old parts,
    that it is born zero for one, is not looked at again: change `birth` where it changed.

    Args:
        artifact: what all other parts are taken from.
        changed: parts by their names in `write_artifact`.

    Raises:
        ArtifactError: for parts that are no artifact together.
        TypeError: for a name that is none of them.
    """
    m = artifact.manifest
    parts = {
        "blueprint_name": m.blueprint,
        "recipe": m.recipe,
        "blueprint": artifact.blueprint,
        "signature": m.signature,
        "sizes": m.sizes,
        "birth": m.birth,
        "confidence": m.confidence,
        "init_seed": m.init_seed,
        "params": artifact.params,
        "stablehlo": artifact.stablehlo,
        "torchscript": artifact.torchscript,
        "versions": m.versions,
        "origin": m.origin,
        "vjp_order": m.vjp_order,
        "ancestor": m.ancestor,
    }
    return write_artifact(**(parts | changed))


def _shown(error: Exception) -> str:
    """What it says, without what would steer a terminal: keys of a manifest come as they are."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(error))


def read_artifact(data: bytes, expected_id: str | None = None) -> Artifact:
    """Read an artifact and check that it is what it says; runs nothing.

    Args:
        expected_id: the id under which it was asked for.

    Raises:
        ArtifactError: for other bytes than those of `expected_id`, a member that is missing,
            unexpected or not as the manifest says, or a manifest that is not valid.
    """
    kernel_id = hashlib.sha256(data).hexdigest()
    name = f"kernel {(expected_id or kernel_id)[:12]}"
    if expected_id is not None and kernel_id != expected_id:
        raise ArtifactError(
            f"{name} is damaged: its bytes have the SHA-256 {kernel_id}, expected {expected_id}."
            " Remove its file and compile it again."
        )
    try:
        members = read_archive(data, max_bytes=MAX_BYTES)
        if set(members) - set(_OPTIONAL) != {*_CONTENT, _MANIFEST}:
            raise ValueError(f"it has the members {sorted(members)}")
        for text in (_MANIFEST, _BLUEPRINT):
            if len(members.get(text, b"")) > _MAX_TEXT:
                raise ValueError(f"its {text} is larger than {_MAX_TEXT} bytes")
        manifest = Manifest.model_validate_json(members[_MANIFEST])
        params = load_tensors(members[_PARAMS])
    except (ValueError, ValidationError, SafetensorError, KeyError, TypeError) as error:
        raise ArtifactError(f"{name} is not a kernel artifact: {_shown(error)}") from error
    if (manifest.origin == "blueprint") != (_BLUEPRINT in members):
        raise ArtifactError(
            f"{name} contradicts its manifest: it was made of a {manifest.origin}, and"
            f" {'holds' if _BLUEPRINT in members else 'lacks'} {_BLUEPRINT}"
        )
    for member in sorted(set(members) - {_MANIFEST}):
        found = hashlib.sha256(members[member]).hexdigest()
        if manifest.digests.get(member) != found:
            raise ArtifactError(
                f"{name} contradicts its manifest: {member} has the SHA-256 {found}, the manifest"
                f" says {manifest.digests.get(member)}"
            )
    if set(manifest.digests) != set(members) - {_MANIFEST}:
        raise ArtifactError(
            f"{name} contradicts its manifest: it has the members {sorted(members)}, the manifest"
            f" has digests of {sorted(manifest.digests)}"
        )
    declared = {p.name: (p.shape, p.dtype) for p in manifest.parameters}
    held = {n: (tuple(p.shape), p.dtype.name) for n, p in params.items()}
    if declared != held or len(declared) != len(manifest.parameters):
        raise ArtifactError(
            f"{name} contradicts its manifest: it holds the parameters {held}, the manifest says"
            f" {declared}"
        )
    return Artifact(
        kernel_id=kernel_id,
        data=data,
        manifest=manifest,
        # In the order of the TorchScript arguments, which safetensors does not keep.
        params={p.name: params[p.name] for p in manifest.parameters},
        blueprint=members.get(_BLUEPRINT),
        stablehlo=members[_STABLEHLO],
        torchscript=members.get(_TORCHSCRIPT),
    )
