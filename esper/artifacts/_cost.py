"""What a StableHLO module holds and could cost, read off its operations before it runs.

Every operation must be on a list. Bytes and floating-point operations are estimated from the
shapes that are written in it, a symbolic batch counting as 1; a function counts as often as it is
called. Shapes that are computed from data are not seen here: those the sandbox bounds.
"""

import dataclasses
import math
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from esper.artifacts._allowed import ALLOWED_CUSTOM_CALLS, ALLOWED_OPS
from esper.errors import ArtifactError

MAX_RESULT_BYTES = 1 << 31
"""Largest static result of one operation."""
MAX_TOTAL_BYTES = 1 << 36
"""All results together."""
MAX_FLOPS = 1 << 43
MAX_OPS = 50_000
"""Operations with calls inlined, of a program and its VJPs together."""

_MAX_DEPTH = 200
_DYNAMIC = ir.ShapedType.get_dynamic_size()
_SPECIAL = {
    "builtin.module", "func.func", "func.call", "stablehlo.dot_general", "stablehlo.convolution",
    "stablehlo.dynamic_conv", "stablehlo.reduce", "stablehlo.reduce_window", "stablehlo.scatter",
    "stablehlo.select_and_scatter",
}  # fmt: skip
"""All others make each element of their results once; only these repeat what they hold."""

_ADVANCE = ir.WalkResult.ADVANCE
_DIALECT_ATTRIBUTES = {
    "jax.uses_shape_polymorphism", "jax.global_constant", "jax.result_info", "jax.arg_info",
    "mhlo.num_partitions", "mhlo.num_replicas",
}  # fmt: skip
"""Attributes of foreign dialects. Others could alias buffers or say where values are to lie."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """An estimate for one example, never too small for shapes that are static."""

    ops: int = 0
    flops: int = 0
    bytes: int = 0
    """Of all results together, had none of them been freed."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.ops + other.ops, self.flops + other.flops, self.bytes + other.bytes)

    def check(self) -> None:
        """Refuse more than is allowed.

        Raises:
            ArtifactError: saying how much there is of what.
        """
        for name, found, most in (
            ("operations", self.ops, MAX_OPS),
            ("floating-point operations for one example", self.flops, MAX_FLOPS),
            ("bytes of results for one example", self.bytes, MAX_TOTAL_BYTES),
        ):
            if found > most:
                raise ArtifactError(
                    f"its StableHLO takes {found:.4g} {name}, at most {most:.4g} are allowed"
                )


def _refuse(what: str) -> ArtifactError:
    return ArtifactError(f"its StableHLO {what}")


@dataclasses.dataclass
class _Function:
    """What was added up of one function."""

    ops: int = 0
    flops: int = 0
    bytes: int = 0
    calls: list[str] = dataclasses.field(default_factory=list)


class _Reader:
    """Adds up one module."""

    def __init__(self, module: Any) -> None:
        self._functions: dict[str, _Function] = {}
        self._current = _Function()
        self._sizes: dict[Any, tuple[int, int]] = {}
        self._costs: dict[str, Cost | None] = {}
        self._seen = 0
        self._refusal: ArtifactError | None = None
        self._root = module.operation
        module.operation.walk(self._visit, ir.WalkOrder.PRE_ORDER)
        if self._refusal:
            raise self._refusal

    def _visit(self, operation: Any) -> ir.WalkResult:
        # Raised in here, an error would come out as MLIR's own.
        try:
            name = operation.name
            self._check(operation, name)
            self._seen += 1
            if self._seen > MAX_OPS:
                raise _refuse(f"has more than {MAX_OPS} operations")
            if name in _SPECIAL:
                return self._add_special(operation, name)
            own = self._current
            own.ops += 1
            for kind in operation.results.types:
                elements, taken = self._sizes.get(kind) or self._size(kind)
                own.flops += elements
                own.bytes += taken
            if name == "stablehlo.case" or not len(operation.regions):
                return _ADVANCE
            raise _refuse(f"has operations within {name}, whose cost is not known")
        except ArtifactError as refusal:
            self._refusal = refusal
        except Exception as error:  # what is malformed leads MLIR's bindings to anything
            self._refusal = _refuse(f"cannot be read ({type(error).__name__}: {error})")
        return ir.WalkResult.INTERRUPT

    def _add_special(self, operation: Any, name: str) -> ir.WalkResult:
        if name == "builtin.module":
            # Of a module within, a function could pass for the one of that name outside.
            if operation.operation != self._root:
                raise _refuse("has a module within its module")
            return _ADVANCE
        if name == "func.func":
            self._add_function(operation, ir.StringAttr(operation.attributes["sym_name"]).value)
            return _ADVANCE
        own = self._current
        sizes = [self._size(kind) for kind in operation.results.types]
        own.ops += 1
        own.bytes += sum(taken for _, taken in sizes)
        if name == "func.call":
            own.calls.append(ir.FlatSymbolRefAttr(operation.attributes["callee"]).value)
            return _ADVANCE
        work = _work(operation, name, sum(elements for elements, _ in sizes))
        if not len(operation.regions):
            own.flops += work
            return _ADVANCE
        self._repeat(operation, work)
        return ir.WalkResult.SKIP

    def _add_function(self, operation: Any, name: str) -> None:
        if operation.operation.parent.operation != self._root:
            raise _refuse(f"has a function {name!r} within another operation")
        if name in self._functions:
            raise _refuse(f"has two functions {name!r}")
        self._current = self._functions[name] = _Function()

    def _repeat(self, operation: Any, times: int) -> None:
        """Add what an operation holds, which is done so many times."""
        own = self._current
        before = own.flops
        calls = len(own.calls)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    inner.operation.walk(self._visit, ir.WalkOrder.PRE_ORDER)
                    if self._refusal:
                        raise self._refusal
        if len(own.calls) > calls:
            raise _refuse(f"calls a function within {operation.name}")
        own.flops = before + (own.flops - before) * times

    def total(self) -> Cost:
        """Of `main`. A function that nothing calls is checked, and costs nothing."""
        return self._total("main")

    def _total(self, name: str, depth: int = 0) -> Cost:
        if name not in self._functions:
            raise _refuse(f"calls {name!r}, which it does not hold")
        if name in self._costs:
            known = self._costs[name]
            if known is None:
                raise _refuse(f"has a function {name!r} that calls itself")
            return known
        if depth > _MAX_DEPTH:
            raise _refuse(f"has calls more than {_MAX_DEPTH} deep")
        self._costs[name] = None
        own = self._functions[name]
        cost = Cost(own.ops, own.flops, own.bytes)
        for callee in own.calls:
            cost += self._total(callee, depth + 1)
            cost.check()
        self._costs[name] = cost
        return cost

    def _check(self, operation: Any, name: str) -> None:
        if name not in ALLOWED_OPS:
            raise _refuse(f"uses {name}, which is not on the list of allowed operations")
        attributes = operation.attributes
        for key in attributes:
            if "." in key:
                self._check_attribute(key)
        if name == "stablehlo.custom_call":
            target = ir.StringAttr(attributes["call_target_name"]).value
            if target not in ALLOWED_CUSTOM_CALLS:
                raise _refuse(f"calls the custom target {target!r}, which is not allowed")
        elif name == "func.func":
            for key in ("arg_attrs", "res_attrs"):
                if key in attributes:
                    for own in ir.ArrayAttr(attributes[key]):
                        for each in ir.DictAttr(own):
                            self._check_attribute(each.name)

    @staticmethod
    def _check_attribute(key: str) -> None:
        if "." in key and key not in _DIALECT_ATTRIBUTES:
            raise _refuse(f"has the attribute {key!r}, which is not allowed")

    def _size(self, result: Any) -> tuple[int, int]:
        """Elements and bytes of a result."""
        try:
            return self._sizes[result]
        except KeyError:
            found = self._sizes[result] = self._measure(result)
            return found

    def _measure(self, result: Any) -> tuple[int, int]:
        if not isinstance(result, ir.RankedTensorType):
            raise _refuse(f"makes a {result}, and not a tensor")
        shape = result.shape
        if shape.count(_DYNAMIC) > 1:
            raise _refuse(f"makes a {result}: one axis alone, the batch's, may be of unknown size")
        elements = math.prod(axis for axis in shape if axis != _DYNAMIC)
        element = result.element_type
        if not isinstance(element, ir.IntegerType | ir.FloatType):
            raise _refuse(f"makes elements of type {element}, which is not allowed")
        size = elements * max(1, element.width // 8)
        if size > MAX_RESULT_BYTES:
            raise _refuse(f"makes a {result}, larger than {MAX_RESULT_BYTES} bytes")
        return elements, size


def _elements(value: Any) -> int:
    shape = value.type.shape if isinstance(value.type, ir.RankedTensorType) else []
    return math.prod(axis for axis in shape if axis != _DYNAMIC)


def _work(operation: Any, name: str, made: int) -> int:
    """Floating-point operations of one, without what its regions hold."""
    if name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
        shape = operation.operands[0].type.shape
        summed = [shape[axis] for axis in numbers.lhs_contracting_dimensions]
        return 2 * made * math.prod(axis for axis in summed if axis != _DYNAMIC)
    if name in ("stablehlo.convolution", "stablehlo.dynamic_conv"):
        numbers = stablehlo.ConvDimensionNumbers(operation.attributes["dimension_numbers"])
        features = operation.operands[1].type.shape[numbers.kernel_output_feature_dimension]
        return 2 * made * max(1, _elements(operation.operands[1]) // max(1, features))
    # Reductions read all of their input, and windows each of their elements.
    window = 1
    if "window_dimensions" in operation.attributes:
        window = math.prod(ir.DenseI64ArrayAttr(operation.attributes["window_dimensions"]))
    return window * max(made, *(_elements(operand) for operand in operation.operands), 1)


def cost_of(module: Any) -> Cost:
    """Scan a module, and estimate its cost.

    Raises:
        ArtifactError: saying what was found that is not allowed.
    """
    cost = _Reader(module).total()
    cost.check()
    return cost
