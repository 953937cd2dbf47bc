"""What was found of an artifact, and the name under which it is kept."""

import dataclasses
import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from esper.artifacts import _allowed
from esper.artifacts._artifact import Artifact

CHECKS_VERSION = 2
"""Raised whenever the checks change: what passed earlier ones is checked anew."""

Result = Literal["passed", "refused", "noted", "skipped"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Result
    """`noted`: found, and no reason to refuse. `skipped`: could not be, and `detail` says why."""
    detail: str = ""
    milliseconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an artifact may be used, and why."""

    kernel_id: str
    accepted: bool
    checks: tuple[Check, ...]
    protections: tuple[str, ...] = ()
    """What held the child that ran it; empty where none did."""
    missing: tuple[str, ...] = ()
    """What would have held it, but is not to be had here."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the libraries that ran it."""
    remembered: bool = False
    """Whether its programs were run on an earlier occasion, and not on this."""

    @property
    def reason(self) -> str:
        """Why it was refused, in one line; empty where it was not."""
        refused = [c for c in self.checks if c.outcome == "refused"]
        return "" if not refused else f"{refused[0].name}: {refused[0].detail}"

    def to_json(self) -> str:
        """As text, from which `from_json` makes it again."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """What `to_json` wrote.

        Raises:
            ValueError: for anything else.
        """
        try:
            told = json.loads(text)
            checks = tuple(Check(**check) for check in told.pop("checks"))
            lists = {name: tuple(told.pop(name)) for name in ("protections", "missing")}
            return cls(checks=checks, **lists, **told)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no verdict: {error}") from error


@cache
def library_versions() -> dict[str, str]:
    """Of what parses and runs programs; torch only where it is installed."""
    found = {}
    for package in ("jax", "jaxlib", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _checked_by() -> dict[str, object]:
    return {
        "checks": CHECKS_VERSION,
        "versions": library_versions(),
        # A list that grew or shrank makes other checks.
        "allowed": [
            sorted(names)
            for names in (
                _allowed.ALLOWED_CUSTOM_CALLS, _allowed.ALLOWED_OPS, _allowed.ALLOWED_CALLS,
            )
        ],
    }  # fmt: skip


def programs_digest(artifact: Artifact) -> str:
    """SHA-256 of all that probation depends on.

    That is the programs, the blueprint, the signature, sizes and shapes of parameters, the order of
    the VJPs that it promises, and the checks and libraries. The values of parameters are not in it:
    kernels that differ in those alone share programs and verdict.
    """
    manifest = artifact.manifest
    digests = {n: d for n, d in manifest.digests.items() if n != "params.safetensors"}
    content = {
        "digests": digests,
        "signature": str(manifest.signature),
        "sizes": manifest.sizes,
        "vjp_order": manifest.vjp_order,
        "parameters": [(p.name, p.shape, p.dtype) for p in manifest.parameters],
        "by": _checked_by(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
