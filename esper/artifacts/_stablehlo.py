"""StableHLO programs: made reproducible, and scanned before they run.

Deserialising runs nothing, but a crafted custom call can corrupt the process
when the program runs, so every operation must be on a list.
"""

import contextlib
import dataclasses
from typing import Any

from jax import export
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

from esper.artifacts._allowed import ALLOWED_CUSTOM_CALLS, ALLOWED_OPS
from esper.errors import ArtifactError

MAX_RESULT_BYTES = 1 << 31
"""Largest static result of one operation (a symbolic batch counts as 1)."""

_WIDEST_ELEMENT = 8


def _without_locations(exported: export.Exported) -> export.Exported:
    with mlir.make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        program = stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())
    return dataclasses.replace(exported, mlir_module_serialized=program)


def serialise(exported: export.Exported) -> tuple[bytes, int]:
    """The program and its VJPs, without source locations; and the order of the VJPs.

    The order is 2 where the program's second derivatives can be exported, and 1 elsewhere.
    jax.export records where the exporting code lies; without that the bytes
    depend on the program alone.
    """
    chain = [exported, exported.vjp()]
    # Of windows over a symbolic size, for one, jax has first derivatives alone.
    with contextlib.suppress(NotImplementedError, TypeError, ValueError):
        chain.append(chain[-1].vjp())
    order = len(chain) - 1
    last = _without_locations(chain.pop())
    while chain:
        last = dataclasses.replace(
            _without_locations(chain.pop()), _get_vjp=lambda _, vjp=last: vjp
        )
    return bytes(last.serialize(vjp_order=order)), order


def _refusal(op: Any) -> str | None:
    """Why an operation is not allowed, or None."""
    if op.name not in ALLOWED_OPS:
        return f"uses {op.name}, which is not on the list of allowed operations"
    if op.name == "stablehlo.custom_call":
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target not in ALLOWED_CUSTOM_CALLS:
            return f"calls the custom target {target!r}, which is not allowed"
    for result in op.results:
        if isinstance(result.type, ir.RankedTensorType):
            size = _WIDEST_ELEMENT
            for axis in range(result.type.rank):
                if not result.type.is_dynamic_dim(axis):
                    size *= result.type.get_dim_size(axis)
            if size > MAX_RESULT_BYTES:
                return f"makes a {result.type}, larger than {MAX_RESULT_BYTES} bytes"
    return None


def _scan_module(text: str) -> None:
    refusals: list[str] = []

    def visit(op: Any) -> ir.WalkResult:
        # Raised in here, an error would come out as MLIR's own.
        refusal = _refusal(op)
        if refusal is None:
            return ir.WalkResult.ADVANCE
        refusals.append(refusal)
        return ir.WalkResult.INTERRUPT

    with mlir.make_ir_context():
        ir.Module.parse(text).operation.walk(visit)
    if refusals:
        raise ArtifactError(f"its StableHLO {refusals[0]}")


def load(program: bytes) -> export.Exported:
    """Read a program and refuse one that could do anything but compute.

    Raises:
        ArtifactError: saying what was found.
    """
    try:
        exported = export.deserialize(bytearray(program))
        modules, each = [exported.mlir_module()], exported
        while each.has_vjp():
            each = each.vjp()
            modules.append(each.mlir_module())
    except Exception as error:  # flatbuffers and MLIR raise whatever the bytes lead them to
        raise ArtifactError(
            f"its StableHLO cannot be read ({type(error).__name__}: {error})"
        ) from error
    for text in modules:
        _scan_module(text)
    return exported
