"""What a library can do, embedded or behind a service."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from esper.contracts import (
    CURRENT_KERNELS,
    BlueprintQuery,
    BlueprintRecord,
    BlueprintRequest,
    BlueprintState,
    Claim,
    GarbageReport,
    KernelOutcome,
    KernelQuery,
    KernelRecord,
    KernelSignature,
    KernelState,
    KernelUsage,
    Page,
    RetentionPolicy,
)

if TYPE_CHECKING:
    from esper.artifacts import Artifact


@runtime_checkable
class KernelLibrary(Protocol):
    """Kernels, blueprints that wait to be compiled, and what became of kernels in runs.

    Every method may be called from several threads, and a library may be open in several processes
    and on several machines at once. Whatever is asked twice, because an answer was lost, is done
    once.

    Every method may raise LibraryError where the library cannot be used, and InputError for
    arguments that are not valid; only what is beyond that is listed.
    """

    # Kernels.

    def put(
        self, artifact: "Artifact", *, tags: Iterable[str] = (), state: KernelState | None = None
    ) -> str:
        """Keep an artifact; nobody finds it before it is whole.

        Putting it again changes nothing but that the tags are added, and mends a file that is
        damaged; one in TESTING becomes VALIDATED where this process trusts it, unless it is put as
        TESTING again.

        Args:
            state: by default VALIDATED where this process trusts it, else TESTING. Of a kernel that
                is there already the state is left as it is.

        Returns:
            Its id.
        """
        ...

    def get(self, kernel_id: str) -> "Artifact":
        """The artifact of that id, its bytes verified.

        Raises:
            KernelNotFoundError: where the library has none.
            ArtifactError: where its file is damaged.
        """
        ...

    def read_bytes(self, kernel_id: str) -> bytes:
        """The file of that id as it is, which may be damaged.

        Raises:
            KernelNotFoundError: where the library has none.
            ArtifactError: where it is larger than any artifact.
        """
        ...

    def iter_bytes(self, kernel_id: str, start: int = 0) -> Iterator[bytes]:
        """The file of that id from some byte on, in pieces; it may be damaged.

        Raises:
            KernelNotFoundError: where the library has none, when this is called.
            InputError: where `start` lies beyond its end.
        """
        ...

    def record(self, kernel_id: str) -> KernelRecord:
        """What is known of a kernel.

        Raises:
            KernelNotFoundError: where the library has none.
        """
        ...

    def full_id(self, beginning: str) -> str:
        """The id of the one kernel whose id begins so.

        Raises:
            InputError: where there are several.
            KernelNotFoundError: where there is none.
        """
        ...

    def find(
        self,
        signature: KernelSignature | None = None,
        *,
        blueprint: str | None = None,
        recipe: str | None = None,
        states: Iterable[KernelState] = CURRENT_KERNELS,
    ) -> list[KernelRecord]:
        """All kernels that fit, ordered by blueprint, seed and id.

        Args:
            states: those that are in another state are left out.
        """
        ...

    def search(self, query: KernelQuery) -> Page[KernelRecord]:
        """A page of the kernels for which a query holds.

        What is put or removed between two pages is found or not; what is there all the time is
        found once.

        Raises:
            InputError: for a cursor of another query, or one that is none.
        """
        ...

    def set_state(
        self,
        kernel_id: str,
        state: KernelState,
        *,
        expected: KernelState | None = None,
        reason: str = "",
    ) -> KernelRecord:
        """Move a kernel to another state; one that has it already is left as it is.

        Args:
            expected: the state that it is in, where it is to be moved from no other.

        Raises:
            KernelNotFoundError: where the library has none.
            IllegalTransitionError: where that state may not follow.
            ConflictError: where it is in another state than expected.
        """
        ...

    def tag(
        self, kernel_id: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()
    ) -> KernelRecord:
        """Give a kernel tags, and take some from it.

        Raises:
            KernelNotFoundError: where the library has none.
        """
        ...

    def remove(self, kernel_id: str) -> None:
        """Remove a kernel whoever uses it, and what was measured of it. None there is no error.

        What runs told of it stays, and so do their references: it may be compiled again.
        """
        ...

    # What is known of kernels beside them.

    def record_measurement(self, measurement: Mapping[str, Any]) -> None:
        """Keep what a kernel cost on some device; an older one of equal kernel and device goes.

        Args:
            measurement: `esper.execution.KernelMeasurement.to_dict()`.
        """
        ...

    def measurements(self, kernel_id: str) -> list[dict[str, Any]]:
        """What was measured of a kernel, by backend, device and batch."""
        ...

    def record_outcomes(self, outcomes: Sequence[KernelOutcome]) -> None:
        """Keep what kernels did in runs: all or none of it.

        Of one run, kernel, layer, seed and step there is one outcome; recorded again, it replaces
        the other. The kernels need not be in the library.
        """
        ...

    def outcomes(self, kernel_id: str) -> list[KernelOutcome]:
        """What a kernel did in runs, by run, layer, seed and step; at most the last 1,000."""
        ...

    def usage(self, kernel_id: str) -> KernelUsage:
        """What a kernel did in all runs that have told of it; the interval is Student's t."""
        ...

    # Runs that refer to kernels, and the removal of those that nothing refers to.

    def refer(self, run_id: str, kernel_ids: Iterable[str]) -> None:
        """A run needs these kernels: they are not collected until it is released.

        Raises:
            KernelNotFoundError: where one of them is not there; then none is referred to.
        """
        ...

    def release_run(self, run_id: str) -> None:
        """A run needs its kernels no longer. One that refers to none is no error."""
        ...

    def references(self, kernel_id: str) -> list[str]:
        """The runs that refer to a kernel, in order."""
        ...

    def collect_garbage(self, policy: RetentionPolicy) -> GarbageReport:
        """Remove what a policy says, and files that nothing names.

        Never goes what a run refers to, what a blueprint that waits or is being compiled was
        compiled to before, or what is younger than the policy's grace time.
        """
        ...

    # Blueprints that wait to be compiled.

    def submit(self, request: BlueprintRequest) -> BlueprintRecord:
        """Ask for a blueprint to be compiled.

        One that is there already is not asked for twice: it gets the tags, and the priority where
        that is higher. It waits again where it is VALIDATED and its kernel is gone.
        """
        ...

    def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """What is known of a blueprint.

        Raises:
            BlueprintNotFoundError: where the library has none.
        """
        ...

    def blueprints(self, query: BlueprintQuery) -> Page[BlueprintRecord]:
        """A page of the blueprints for which a query holds, oldest first.

        It ends before its limit where it would hold more than 8 MiB of their documents.
        """
        ...

    def set_blueprint_state(
        self,
        blueprint_id: str,
        state: BlueprintState,
        *,
        expected: BlueprintState | None = None,
        reason: str = "",
    ) -> BlueprintRecord:
        """Let a blueprint wait again, or give it up; one that is so already is left as it is.

        Only `claim` makes it COMPILING, and only `complete` VALIDATED. What was claimed is lost to
        its worker.

        Raises:
            BlueprintNotFoundError: where the library has none.
            IllegalTransitionError: where that state may not follow.
            ConflictError: where it is in another state than expected.
        """
        ...

    def claim(self, worker: str, *, most: int = 1, lease_seconds: float = 60.0) -> list[Claim]:
        """Take blueprints to compile: the highest priorities first, of these the oldest.

        Nobody else gets them before the lease has run out. One whose lease has run out goes to
        whoever asks next; after a number of such attempts it is INVALID.

        Returns:
            At most `most`, and at most 8 MiB of their documents unless one alone is larger; none
            where nothing waits.
        """
        ...

    def renew(self, claim: Claim) -> Claim:
        """Have the lease of a claim begin anew.

        Raises:
            LeaseLostError: where the blueprint is somebody else's by now, or waits no longer.
        """
        ...

    def complete(self, claim: Claim, kernel_id: str) -> BlueprintRecord:
        """A blueprint was compiled to a kernel, which was put before.

        That another worker has completed it with the same kernel is no error.

        Raises:
            LeaseLostError: where the blueprint is somebody else's by now, or waits no longer.
            KernelNotFoundError: where the library has no such kernel.
        """
        ...

    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> BlueprintRecord:
        """A blueprint could not be compiled: it is INVALID.

        Args:
            retry: let it wait again, as long as it has not been tried too often.

        Raises:
            LeaseLostError: where the blueprint is somebody else's by now, or waits no longer.
        """
        ...

    def give_back(self, claim: Claim) -> BlueprintRecord:
        """Let a blueprint wait again, as if it had not been claimed.

        Raises:
            LeaseLostError: where the blueprint is somebody else's by now, or waits no longer.
        """
        ...

    def close(self) -> None:
        """Let go of it; nothing is asked of it afterwards."""
        ...
