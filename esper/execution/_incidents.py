"""What fails in an executor: counted by type and kernel, and handed on to be told."""

from typing import Any

from esper.artifacts import Artifact
from esper.errors import KernelExecutionError
from esper.recovery import (
    ErrorContext,
    ErrorRecoveryManager,
    ErrorTracker,
    ErrorType,
    RecoveryStrategy,
    create_error_context,
)

COMPONENT = "kernel_executor"
"""The name under which errors are recorded."""


class Incidents:
    """Records errors of kernels on one backend."""

    def __init__(self, recovery: ErrorRecoveryManager, backend: str) -> None:
        self._recovery = recovery
        self._backend = backend
        self._errors = ErrorTracker()

    def record(self, error: Exception, artifact: Artifact, **metadata: Any) -> ErrorContext:
        """Count an error of a kernel, and tell of it."""
        return self._record(error, artifact.kernel_id, metadata)

    def misused(self, error: Exception, artifact: Artifact) -> None:
        """Count an error of whoever called a kernel, which is none of the kernel's."""
        self._record(error, None, {"called": artifact.kernel_id})

    def _record(
        self, error: Exception, kernel_id: str | None, metadata: dict[str, Any]
    ) -> ErrorContext:
        context = create_error_context(
            COMPONENT,
            # What was asked for here and is not there, is missing.
            error_type=self._recovery.classify(error) or ErrorType.KERNEL_LOADING,
            exception=error,
            kernel_id=kernel_id,
            metadata={"backend": self._backend, **metadata},
        )
        self._errors.record_error(context)
        return self._recovery.record_error(context)

    def failed(
        self, cause: Exception | None, artifact: Artifact, what: str
    ) -> KernelExecutionError:
        """The error to raise where a kernel failed; it is recorded."""
        reason = "" if cause is None else f": {type(cause).__name__}: {cause}"
        error = KernelExecutionError(
            f"kernel {artifact.kernel_id[:12]} {what}{reason}. Leave the seed dormant, or load"
            " another kernel."
        )
        # Its type is told by its cause.
        error.__cause__ = cause
        self.record(error, artifact)
        return error

    def fell_back(self, context: ErrorContext, recovered: bool, detail: str) -> None:
        """Tell of a second route after an error of the first."""
        self._recovery.record_recovery(
            context,
            RecoveryStrategy.FALLBACK,
            recovered,
            action="fallback",
            attempts=1,
            detail=detail,
        )

    def stats(self) -> dict[str, Any]:
        """Counts, JSON-able."""
        found = self._errors.stats()
        return {
            "count": found["total_errors"],
            "by_type": found["errors_by_type"],
            "by_kernel": self._errors.errors_by_kernel(),
        }
