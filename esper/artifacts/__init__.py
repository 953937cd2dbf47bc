"""Kernel artifacts: their format, their checks, and the programs inside."""

from esper.artifacts._artifact import Artifact, read_artifact, write_artifact
from esper.artifacts._stablehlo import load as load_stablehlo
from esper.artifacts._stablehlo import serialise as serialise_stablehlo
from esper.artifacts._torchscript import load as load_torchscript
from esper.artifacts._torchscript import normalise as normalise_torchscript
from esper.artifacts._torchscript import scan as scan_torchscript

__all__ = [
    "Artifact",
    "load_stablehlo",
    "load_torchscript",
    "normalise_torchscript",
    "read_artifact",
    "scan_torchscript",
    "serialise_stablehlo",
    "write_artifact",
]
