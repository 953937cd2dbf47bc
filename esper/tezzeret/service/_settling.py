"""What becomes of a claim: its kernel is delivered, it is failed, tried again, or given back."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from esper.artifacts import Artifact
from esper.contracts import BlueprintState, Claim, KernelState, reason_text
from esper.errors import (
    AccessDeniedError,
    ArtifactError,
    BlueprintNotFoundError,
    ConflictError,
    EsperError,
    IllegalTransitionError,
    InputError,
    LeaseLostError,
)
from esper.tezzeret._jobs import CompileOutcome
from esper.tezzeret.service._announcements import blueprint_changed, kernel_put
from esper.tezzeret.service._leases import Leases
from esper.tezzeret.service._outbox import Outbox
from esper.tezzeret.service._patience import Patience
from esper.tezzeret.service._queue import BlueprintQueue
from esper.tezzeret.service._statistics import Counts

_TAKEN_AWAY = (LeaseLostError, IllegalTransitionError, BlueprintNotFoundError)
"""Another worker has it, somebody has changed its state, or it is gone."""

_REFUSED = (ArtifactError, ConflictError, InputError)
"""The library does not take the kernel, and would not take it from another worker."""

_log = logging.getLogger("esper.tezzeret.worker")


@dataclasses.dataclass(frozen=True)
class Settling:
    """Ends claims, and tells of it.

    A library that is away is waited for. What it says about a claim that is lost is no error: the
    blueprint is somebody else's work by then, or done.
    """

    queue: BlueprintQueue
    leases: Leases
    outbox: Outbox
    counts: Counts
    patience: Patience
    patience_seconds: float

    def settle(self, claim: Claim, outcome: CompileOutcome) -> None:
        """End a claim by what its compilation came to."""
        if not outcome.cancelled:
            self.counts.compiled_in(outcome.seconds)
        if outcome.artifact is not None:
            self._deliver(claim, outcome.artifact, outcome.measurements)
        elif outcome.cancelled:
            self.give_back(claim)
        else:
            error = outcome.error or EsperError(f"{outcome.job}: compiled to nothing")
            # What nobody foresaw may be the machine's: a full disk, a process that was killed.
            retry = outcome.died or type(error) is EsperError
            self.fail(claim, str(error), retry=retry)

    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> None:
        """It is invalid; with `retry` it may wait again, and has used up an attempt."""
        reason, after = reason_text(reason), BlueprintState.INVALID

        def failed(current: Claim) -> None:
            nonlocal after
            after = self.queue.fail(current, reason, retry=retry).state

        if self._end(claim, "failing", failed):
            invalid = after is BlueprintState.INVALID
            self._tell("failed" if invalid else "retried", claim, after, reason=reason)

    def give_back(self, claim: Claim) -> None:
        """It waits again, as if it had not been claimed."""
        if self._end(claim, "giving back", self.queue.give_back):
            self._tell("given_back", claim, BlueprintState.UNVALIDATED)

    def _deliver(
        self, claim: Claim, artifact: Artifact, measurements: Sequence[Mapping[str, Any]]
    ) -> None:
        kernel_id, tags = artifact.kernel_id, claim.blueprint.tags
        if self.leases.current(claim) is None:
            # Whoever has it now puts the same kernel.
            self._lost(claim)
            return
        try:
            self.patience(
                "putting a kernel",
                lambda: self.queue.put(artifact, tags=tags, state=KernelState.VALIDATED),
                self.patience_seconds,
            )
        except AccessDeniedError:
            raise
        except _REFUSED as error:
            self.fail(claim, f"the library does not take the kernel: {error}")
            return
        except EsperError as error:
            self._left(claim, "putting a kernel", error)
            return
        for measurement in measurements:
            # Which costs no kernel.
            with suppress(EsperError):
                self.queue.record_measurement(measurement)
        if self._end(
            claim,
            "completing",
            lambda now: self.queue.complete(now, kernel_id),
        ):
            self.outbox.put(kernel_put(artifact, claim.worker))
            self._tell("compiled", claim, BlueprintState.VALIDATED, kernel_id=kernel_id)

    def _end(self, claim: Claim, what: str, action: Callable[[Claim], object]) -> bool:
        """Make the call that ends a claim; whether this worker has ended it."""

        def call() -> None:
            current = self.leases.settle(claim)
            if current is None:
                raise LeaseLostError(f"the claim to {claim.blueprint.name} was lost")
            action(current)

        try:
            self.patience(what, call, self.patience_seconds)
        except AccessDeniedError:
            raise
        except _TAKEN_AWAY:
            self._lost(claim)
            return False
        except EsperError as error:
            self._left(claim, what, error)
            return False
        finally:
            self.leases.drop(claim)
        return True

    def _lost(self, claim: Claim) -> None:
        self.leases.drop(claim)
        self.counts.add("lost")
        _log.info("a claim was lost; whoever has it now does it", extra=about(claim))

    def _left(self, claim: Claim, what: str, error: Exception) -> None:
        """Its lease runs out, and another worker does it."""
        self.leases.drop(claim)
        self.counts.add("left")
        _log.warning(
            "a claim is left to its lease",
            extra={**about(claim), "call": what, "error": str(error)},
        )

    def _tell(
        self,
        outcome: str,
        claim: Claim,
        after: BlueprintState,
        *,
        kernel_id: str | None = None,
        reason: str = "",
    ) -> None:
        self.counts.add(outcome)
        self.outbox.put(blueprint_changed(claim, after, kernel_id=kernel_id, reason=reason))
        level = logging.WARNING if outcome in ("failed", "retried") else logging.INFO
        more = {"kernel_id": kernel_id} if kernel_id else {}
        more |= {"reason": reason} if reason else {}
        _log.log(
            level, "a blueprint was %s", outcome.replace("_", " "), extra={**about(claim), **more}
        )


def about(claim: Claim) -> dict[str, Any]:
    """What a line of the log says of a claim."""
    return {
        "worker": claim.worker,
        "blueprint": claim.blueprint.name,
        "blueprint_id": claim.blueprint.blueprint_id,
        "attempt": claim.attempt,
    }
