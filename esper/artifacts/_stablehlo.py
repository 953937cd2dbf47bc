"""StableHLO programs: made reproducible, and scanned before they run.

Deserialising runs nothing, but a crafted custom call can corrupt the process
when the program runs, so every operation must be on a list.
"""

import contextlib
import dataclasses
import threading

from jax import export
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, stablehlo
from jaxlib.mlir.passmanager import PassManager

from esper.artifacts._cost import Cost, cost_of
from esper.errors import ArtifactError

MAX_BYTES = 256 << 20
MAX_VJP_ORDER = 4
_BYTES_OF_A_CONTEXT = 4 << 20
"""Of programs that are parsed in one context of MLIR."""


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


def _deserialise(program: bytes) -> list[export.Exported]:
    """The program, its VJP, the VJP's own, and so on."""
    if len(program) > MAX_BYTES:
        raise ArtifactError(f"its StableHLO is larger than {MAX_BYTES} bytes")
    try:
        found = [export.deserialize(bytearray(program))]
        while found[-1].has_vjp():
            if len(found) > MAX_VJP_ORDER:
                raise ArtifactError(f"its StableHLO has VJPs of an order above {MAX_VJP_ORDER}")
            found.append(found[-1].vjp())
    except ArtifactError:
        raise
    except Exception as error:  # flatbuffers raises whatever the bytes lead it to
        raise _unreadable(error) from error
    return found


def _unreadable(error: Exception) -> ArtifactError:
    return ArtifactError(f"its StableHLO cannot be read ({type(error).__name__}: {error})")


def _check_claims(exported: export.Exported) -> None:
    """Refuse what jax would take a program's word for."""
    for name, found, expected in (
        ("devices", exported.nr_devices, 1),
        ("ordered effects", tuple(exported.ordered_effects), ()),
        ("unordered effects", tuple(exported.unordered_effects), ()),
        ("disabled safety checks", tuple(exported.disabled_safety_checks), ()),
    ):
        if found != expected:
            raise ArtifactError(f"its StableHLO declares {name}: {found!r}, expected {expected!r}")


class _Parser:
    """Parses modules in a context that knows these dialects and no others.

    To make a context takes a third of the time of a scan, so one is kept for some programs; not for
    all, because it never lets go of a constant.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0

    def cost(self, found: list[export.Exported]) -> Cost:
        """Of all of them together."""
        # The context is for one thread at a time.
        with self._lock:
            size = sum(len(exported.mlir_module_serialized) for exported in found)
            self._left -= size
            if self._left <= 0:
                self._renew()
            with self._context:
                return self._add_up(found)

    def _renew(self) -> None:
        self._context = ir.Context()
        self._context.enable_multithreading(False)
        stablehlo.register_dialect(self._context)
        chlo.register_dialect(self._context)
        self._left = _BYTES_OF_A_CONTEXT

    def _add_up(self, found: list[export.Exported]) -> Cost:
        total = Cost()
        for exported in found:
            _check_claims(exported)
            try:
                module = stablehlo.deserialize_portable_artifact(
                    self._context, exported.mlir_module_serialized
                )
            except Exception as error:  # MLIR raises whatever the bytes lead it to
                raise _unreadable(error) from error
            total += cost_of(module)
            total.check()
        return total


_PARSER = _Parser()


def scan_exported(program: bytes) -> tuple[export.Exported, Cost]:
    """Read a program, and refuse it, for a VJP in it too, where it could do more than compute.

    Runs nothing, but parses in native code: of what comes from elsewhere, first in a child
    process, which is what `esper.artifacts.verify` does.

    Raises:
        ArtifactError: saying what was found.
    """
    found = _deserialise(program)
    return found[0], _PARSER.cost(found)


def load(program: bytes) -> export.Exported:
    """The program, once it was scanned; see `scan_exported`.

    Raises:
        ArtifactError: saying what was found.
    """
    return scan_exported(program)[0]
