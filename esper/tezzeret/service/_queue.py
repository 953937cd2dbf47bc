"""What a worker asks of a library, whether it is in this process or behind HTTP."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from esper.artifacts import Artifact
from esper.contracts import BlueprintQuery, BlueprintRecord, Claim, KernelState, Page


class BlueprintQueue(Protocol):
    """Blueprints that are to be compiled, and where their kernels go.

    A claim is for a worker alone, until it is completed, failed or given back, or its lease runs
    out; whoever comes with it after another worker has claimed the same gets a LeaseLostError.
    """

    def claim(self, worker: str, *, most: int = 1, lease_seconds: float = 60.0) -> list[Claim]:
        """Take blueprints to compile; none where none wait."""
        ...

    def renew(self, claim: Claim) -> Claim:
        """The claim with its whole lease before it again."""
        ...

    def complete(self, claim: Claim, kernel_id: str) -> object:
        """The blueprint became that kernel, which the library holds."""
        ...

    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> BlueprintRecord:
        """The blueprint became no kernel: it is invalid.

        With `retry` it waits to be tried again, unless it was tried too often.
        """
        ...

    def give_back(self, claim: Claim) -> object:
        """The blueprint waits again, as if it had not been claimed."""
        ...

    def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """What is known of a blueprint."""
        ...

    def blueprints(self, query: BlueprintQuery) -> Page[BlueprintRecord]:
        """The blueprints for which a query holds."""
        ...

    def put(
        self, artifact: Artifact, *, tags: Iterable[str] = (), state: KernelState | None = None
    ) -> str:
        """Keep a kernel, and give its id; the same one again changes nothing."""
        ...

    def record_measurement(self, measurement: Mapping[str, Any]) -> None:
        """Keep what a kernel cost."""
        ...
