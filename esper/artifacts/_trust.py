"""What this process trusts: what it compiled itself, and what was verified."""

import threading
import weakref

from esper.artifacts._artifact import Artifact
from esper.artifacts._verdict import Check, Verdict, library_versions, programs_digest
from esper.artifacts._verdicts import VerdictStore
from esper.artifacts._verify import PROBATION_LIMITS, verify
from esper.errors import ArtifactError
from esper.sandbox import Limits

_LOCK = threading.Lock()
_TURNS = weakref.WeakValueDictionary[str, threading.Lock]()
"""By `programs_digest`, as long as somebody verifies or waits."""
_KERNELS: set[str] = set()
_PROGRAMS: set[str] = set()
"""By `programs_digest`. Sets of short texts, which nothing is ever taken from but by `distrust`."""


def trust(artifact: Artifact, verdicts: VerdictStore | None = None) -> None:
    """Trust an artifact that was compiled in this process, and all that share its programs.

    Args:
        verdicts: record it there too, so that later processes trust it; nowhere by default.
    """
    digest = programs_digest(artifact)
    with _LOCK:
        _KERNELS.add(artifact.kernel_id)
        _PROGRAMS.add(digest)
    if verdicts is not None:
        made_here = Check("origin", "passed", "it was compiled on this machine")
        verdicts.put(
            digest, Verdict(artifact.kernel_id, True, (made_here,), versions=library_versions())
        )


def distrust_all() -> None:
    """Forget what this process trusts; what a store remembers stays."""
    with _LOCK:
        _KERNELS.clear()
        _PROGRAMS.clear()


def is_trusted(artifact: Artifact) -> bool:
    """Whether `ensure_trusted` would return at once."""
    if artifact.kernel_id in _KERNELS:
        return True
    if programs_digest(artifact) not in _PROGRAMS:
        return False
    with _LOCK:
        _KERNELS.add(artifact.kernel_id)
    return True


def ensure_trusted(
    artifact: Artifact, verdicts: VerdictStore | None = None, *, limits: Limits = PROBATION_LIMITS
) -> None:
    """Return at once for what is trusted; verify anything else, and trust it from then on.

    Its bytes were checked against its id and its manifest when it was read. What is looked at here
    are its programs, which other kernels may share.

    Args:
        verdicts: what is remembered; the user's own store by default.
        limits: what the child process may use that runs what is not known.

    Raises:
        ArtifactError: for what is refused, with the reason.
        EsperError: where no child process can be started.
    """
    if artifact.kernel_id in _KERNELS or is_trusted(artifact):
        return
    digest = programs_digest(artifact)
    with _LOCK:
        turn = _TURNS.setdefault(digest, threading.Lock())
    # Many ask for kernels of one blueprint at once; one child process serves them all.
    with turn:
        if is_trusted(artifact):
            return
        _verify_and_trust(artifact, verdicts, limits)


def _verify_and_trust(artifact: Artifact, verdicts: VerdictStore | None, limits: Limits) -> None:
    verdict = verify(artifact, verdicts=verdicts, limits=limits)
    if not verdict.accepted:
        raise ArtifactError(
            f"kernel {artifact.kernel_id[:12]} is refused: {verdict.reason}. It was not compiled in"
            " this process; do not use its file, and compile its blueprint anew."
        )
    trust(artifact)
