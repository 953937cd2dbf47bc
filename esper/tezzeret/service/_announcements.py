"""What is told on the bus of blueprints and kernels."""

import time

from esper.artifacts import Artifact
from esper.contracts import (
    BlueprintChanged,
    BlueprintRecord,
    BlueprintState,
    Claim,
    KernelChanged,
    KernelState,
    OonaMessage,
    Topic,
    reason_text,
)


def submitted(record: BlueprintRecord, sender: str) -> OonaMessage:
    """A blueprint waits to be compiled."""
    changed = BlueprintChanged(
        blueprint_id=record.blueprint_id,
        name=record.name,
        before=None,
        after=record.state,
        at=time.time(),
    )
    return _of_blueprint(changed, sender)


def blueprint_changed(
    claim: Claim, after: BlueprintState, *, kernel_id: str | None = None, reason: str = ""
) -> OonaMessage:
    """A blueprint that a worker had claimed is in another state."""
    changed = BlueprintChanged(
        blueprint_id=claim.blueprint.blueprint_id,
        name=claim.blueprint.name,
        before=BlueprintState.COMPILING,
        after=after,
        worker=claim.worker,
        attempt=claim.attempt,
        kernel_id=kernel_id,
        reason=reason_text(reason),
        at=time.time(),
    )
    return _of_blueprint(changed, claim.worker)


def kernel_put(artifact: Artifact, worker: str) -> OonaMessage:
    """A kernel can be had."""
    changed = KernelChanged(
        kernel_id=artifact.kernel_id,
        blueprint=artifact.manifest.blueprint,
        signature=str(artifact.manifest.signature),
        before=None,
        after=KernelState.VALIDATED,
        at=time.time(),
    )
    return OonaMessage(
        topic=Topic.KERNEL_CHANGED,
        key=artifact.kernel_id,
        sender_id=worker,
        payload=changed.model_dump(mode="json"),
    )


def _of_blueprint(changed: BlueprintChanged, sender: str) -> OonaMessage:
    return OonaMessage(
        topic=Topic.BLUEPRINT_CHANGED,
        key=changed.blueprint_id,
        sender_id=sender,
        trace_id=changed.blueprint_id,
        payload=changed.model_dump(mode="json"),
    )
