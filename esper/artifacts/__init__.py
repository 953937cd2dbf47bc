"""Kernel artifacts: their format, their checks, and the programs inside."""

from esper.artifacts._artifact import (
    MAX_BYTES,
    Artifact,
    read_artifact,
    rewrite_artifact,
    write_artifact,
)
from esper.artifacts._cost import Cost
from esper.artifacts._scan import scan
from esper.artifacts._stablehlo import load as load_stablehlo
from esper.artifacts._stablehlo import scan_exported as scan_stablehlo
from esper.artifacts._stablehlo import serialise as serialise_stablehlo
from esper.artifacts._torchscript import load as load_torchscript
from esper.artifacts._torchscript import normalise as normalise_torchscript
from esper.artifacts._torchscript import scan as scan_torchscript
from esper.artifacts._trust import distrust_all, ensure_trusted, is_trusted, trust
from esper.artifacts._verdict import Check, Verdict, programs_digest
from esper.artifacts._verdicts import VerdictsInMemoryWarning, VerdictStore, default_verdicts
from esper.artifacts._verify import PROBATION_LIMITS, verify, verify_file

__all__ = [
    "MAX_BYTES",
    "PROBATION_LIMITS",
    "Artifact",
    "Check",
    "Cost",
    "Verdict",
    "VerdictStore",
    "VerdictsInMemoryWarning",
    "default_verdicts",
    "distrust_all",
    "ensure_trusted",
    "is_trusted",
    "load_stablehlo",
    "load_torchscript",
    "normalise_torchscript",
    "programs_digest",
    "read_artifact",
    "rewrite_artifact",
    "scan",
    "scan_stablehlo",
    "scan_torchscript",
    "serialise_stablehlo",
    "trust",
    "verify",
    "verify_file",
    "write_artifact",
]
