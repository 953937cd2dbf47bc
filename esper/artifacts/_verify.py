"""From bytes of unknown origin to a verdict.

In this order, so that nothing of an untrusted file is parsed in native code in this process before
a child process survived it: the file against its manifest, the TorchScript's source (pure Python,
here); both programs parsed, scanned and run (in the child); StableHLO parsed and scanned (here).
"""

import dataclasses
import hashlib
import json
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from esper.artifacts._archive import longest
from esper.artifacts._artifact import MAX_BYTES, Artifact, read_artifact
from esper.artifacts._scan import scan_program, scan_sources
from esper.artifacts._verdict import Check, Result, Verdict, library_versions, programs_digest
from esper.artifacts._verdicts import VerdictStore, default_verdicts
from esper.errors import ArtifactError
from esper.sandbox import Limits, Outcome, Protections, run

PROBATION_LIMITS = Limits(
    wall_seconds=60.0, cpu_seconds=60, memory_bytes=4 << 30, output_bytes=1 << 20
)

_NONE = Protections()
_PROBATION = "esper.artifacts._probation:probate"
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_MAX_TEXT = 2000
_EXPECTED = {"scan", "cost", "stablehlo", "finite", "torchscript", "blueprint"}
"""Without these, what comes from the child is no report of an accepted kernel."""


def verify(
    artifact: Artifact | bytes,
    *,
    verdicts: VerdictStore | None = None,
    probation: bool = True,
    limits: Limits = PROBATION_LIMITS,
) -> Verdict:
    """Find out whether an artifact may be used; see this module for the order of checks.

    Kernels that differ in parameters alone share programs: of those whose programs were run on an
    earlier occasion, with these versions of jax and torch, the file alone is checked.

    Args:
        artifact: what was read, or the bytes of a file.
        verdicts: what is remembered; the user's own store by default.
        probation: run the programs in a child process. Without it they are scanned, in this
            process: for files whose origin is known. Nothing is remembered of that.
        limits: what the child may use.

    Returns:
        The verdict; a refusal is one too, and raises nothing.

    Raises:
        EsperError: where no child process can be started.
    """
    checks: list[Check] = []
    data = artifact.data if isinstance(artifact, Artifact) else artifact
    name = hashlib.sha256(data).hexdigest()
    try:
        found: Artifact = _checked(checks, "file", lambda: read_artifact(data))
        _checked(checks, "torchscript source", lambda: scan_sources(found))
        if not probation:
            _checked(checks, "stablehlo scan", lambda: scan_program(found))
            return _verdict(name, checks)
    except ArtifactError:
        return _verdict(name, checks)
    store = verdicts if verdicts is not None else default_verdicts()
    digest = programs_digest(found)
    earlier = store.get(digest)
    if earlier is not None:
        checks += _later(earlier.checks)
        return dataclasses.replace(earlier, kernel_id=name, checks=tuple(checks), remembered=True)
    outcome = run(_PROBATION, found.data, limits=limits)
    reported = _report(outcome)
    verdict = _verdict(name, [*checks, *reported], outcome.protections)
    if verdict.accepted:
        # The child's word for it is that of a process which ran the program.
        try:
            _checked(checks, "stablehlo scan", lambda: scan_program(found))
        except ArtifactError:
            return _verdict(name, checks, outcome.protections)
        verdict = _verdict(name, [*checks, *reported], outcome.protections)
    # What ran into a limit, or never began, may fare better on another day.
    if outcome.status == "finished" or outcome.signal in _CRASHES:
        store.put(digest, verdict)
    return verdict


def verify_file(
    path: Path | str,
    *,
    verdicts: VerdictStore | None = None,
    probation: bool = True,
    limits: Limits = PROBATION_LIMITS,
) -> Verdict:
    """`verify` the content of a file.

    Raises:
        ArtifactError: where it cannot be read.
        EsperError: where no child process can be started.
    """
    place = Path(path).expanduser()
    try:
        # A pipe's end may never come, and of a sparse file all but the length may be missing.
        found = place.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a file")
        if found.st_size > longest(MAX_BYTES):
            raise OSError(f"it has {found.st_size} bytes, at most {longest(MAX_BYTES)} are read")
        data = place.read_bytes()
    except OSError as error:
        raise ArtifactError(f"the kernel file {path} cannot be read: {error}") from error
    return verify(data, verdicts=verdicts, probation=probation, limits=limits)


def _checked(checks: list[Check], name: str, check: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    outcome: Result = "passed"
    detail = ""
    try:
        return check()
    except ArtifactError as error:
        outcome, detail = "refused", _text(error)
        raise
    finally:
        taken = 1e3 * (time.perf_counter() - started)
        checks.append(Check(name, outcome, detail, taken))


def _later(checks: tuple[Check, ...]) -> list[Check]:
    """Those that were not made anew on this occasion, and are not on one kernel's parameters."""
    anew = ("file", "torchscript source", "finite", "agreement with its own parameters")
    return [check for check in checks if check.name not in anew]


def _verdict(name: str, checks: list[Check], held: Protections = _NONE) -> Verdict:
    return Verdict(
        kernel_id=name,
        accepted=all(check.outcome != "refused" for check in checks),
        checks=tuple(checks),
        protections=held.in_force,
        missing=held.missing,
        versions=dict(library_versions()),
    )


def _text(told: Any) -> str:
    """A text of a stranger, without what would steer the terminal that shows it."""
    return "".join(c if c.isprintable() else " " for c in str(told)[:_MAX_TEXT])


def _report(outcome: Outcome) -> list[Check]:
    """What the child found, read as what comes from a stranger."""
    taken = 1e3 * outcome.seconds
    if outcome.status != "finished" or outcome.result is None:
        printed = outcome.output.strip().splitlines()
        last = f"; it printed last: {printed[-1][:300]}" if printed else ""
        return [Check("probation", "refused", _text(f"the child process {outcome}{last}"), taken)]
    try:
        told = [
            Check(_text(c["name"]), c["outcome"], _text(c["detail"]), float(c["milliseconds"]))
            for c in json.loads(outcome.result)
        ]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        return [Check("probation", "refused", f"its report cannot be read ({error})", taken)]
    odd = [check.outcome for check in told if check.outcome not in get_args(Result)]
    refused = any(check.outcome == "refused" for check in told)
    lacking = _EXPECTED - {check.name for check in told}
    if odd or (lacking and not refused):
        what = f"has the outcomes {odd}" if odd else f"lacks {sorted(lacking)}"
        return [Check("probation", "refused", f"its report {what}", taken)]
    return [*told, Check("probation", "passed", "", taken)]
