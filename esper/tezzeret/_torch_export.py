"""From a module of torch to a straight line of operations, by `torch.export`."""

import math
import warnings
from typing import Any

import numpy as np

from esper.contracts import KernelSignature
from esper.errors import KernelCompilationError
from esper.tensors import from_torch
from esper.tezzeret._blueprint import INPUT
from esper.tezzeret._torch_calls import Call, DType, Line, Ref, Value
from esper.tezzeret._torch_nodes import (
    completed,
    dtype_name,
    dtype_of,
    is_certain,
    is_whole,
    open_sizes,
    operation_of,
    refusal,
    shape_of,
    shown,
    values_of,
)
from esper.tezzeret._torch_operations import OPERATIONS

MOST_CONSTANTS = 1 << 14
"""Numbers among the constants of a module, together: they are written into its program."""
MOST_CALLS = 1024

_SAME = {"alias", "clone", "contiguous", "lift_fresh_copy", "positive"}
"""Operations that give what they take."""
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
    "reshape_as",
}  # fmt: skip
_RENAMED = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "constant_pad_nd": "pad",
    "_to_copy": "to",
}
_IGNORED = {
    "cudnn_enable", "cudnn_enabled", "memory_format", "non_blocking", "copy", "layout", "device",
    "pin_memory",
}  # fmt: skip
"""Arguments that say how or where something is computed, and not what."""


def export_line(module: Any, signature: KernelSignature) -> Line:
    """The line of operations of a module in evaluation, with the batch's size left open.

    Args:
        module: on the CPU; a copy of the user's, for exporting may touch it.

    Raises:
        KernelCompilationError: where it cannot be exported, or does what a kernel may not.
    """
    import torch

    dtype = getattr(torch, signature.dtype)
    # Not 0 and not 1, which torch takes for sizes that will always be so.
    example = torch.zeros(3, *signature.input_shape, dtype=dtype)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # torch's own, about its internals.
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(
                module, (example,), dynamic_shapes=({0: batch},), strict=False
            )
            exported = exported.run_decompositions({})
        except Exception as error:  # whatever a user's own code raises
            raise KernelCompilationError(
                f"torch.export cannot trace it over a batch of any size ({_first(error)}): what is"
                " computed may not depend on values, and on the batch's size only as in"
                " x.reshape(len(x), ...). Write it without such branches, or as a blueprint"
            ) from error
    return _Reader(exported, module, signature).line()


def _first(error: Exception) -> str:
    """Its kind and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A heading is followed by what it is the heading of.
    reasons = [line for line in lines[1:] if line.startswith("- ")][:1]
    return f"{type(error).__name__}: {' '.join([*lines[:1], *reasons]) or 'no message'}"


class _Reader:
    """Reads an exported program node by node."""

    def __init__(self, exported: Any, module: Any, signature: KernelSignature) -> None:
        self.exported = exported
        self.signature = signature
        names = {id(p): name for name, p in module.named_parameters()}
        self.parameters = {name: f"p_{i}" for i, name in enumerate(names.values())}
        # Tied parameters are one, called by its first name.
        self.canonical = {
            name: names[id(p)] for name, p in module.named_parameters(remove_duplicate=False)
        }
        self.known: dict[Any, Any] = {}
        """What each node is: a Ref, a tensor where it is constant, or a list of nodes' outputs."""
        self.constants: dict[str, np.ndarray] = {}
        self.calls: list[Call] = []

    def line(self) -> Line:
        found = self.exported.graph_signature
        if found.buffers_to_mutate or found.user_inputs_to_mutate:
            changed = [*found.buffers_to_mutate.values(), *found.user_inputs_to_mutate.values()]
            raise KernelCompilationError(
                f"it changes {', '.join(map(repr, changed))} in place: a kernel is a function of"
                " its parameters and its input, and changes neither"
            )
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = self._given(node.name)
            elif node.op == "output":
                return self._line(node)
            elif node.op == "call_function":
                self._read(node)
            else:
                raise KernelCompilationError(
                    f"its graph holds a {node.op} of {node.target!r}, which cannot be written"
                )
        raise KernelCompilationError("its graph has no output")

    def _given(self, name: str) -> Any:
        found = self.exported.graph_signature
        if name in found.inputs_to_parameters:
            return Ref(self.parameters[self.canonical[found.inputs_to_parameters[name]]])
        if name in found.inputs_to_buffers:
            target = found.inputs_to_buffers[name]
            held = self.exported.state_dict
            return held[target] if target in held else self.exported.constants[target]
        if name in found.inputs_to_lifted_tensor_constants:
            return self.exported.constants[found.inputs_to_lifted_tensor_constants[name]]
        return Ref(INPUT)

    def _line(self, output: Any) -> Line:
        result = output.args[0]
        if len(result) != 1 or not self.exported.call_spec.out_spec.is_leaf():
            raise KernelCompilationError("its forward gives several outputs: a kernel gives one")
        value = self.known.get(result[0])
        shape, dtype = shape_of(result[0]), dtype_name(result[0])
        wanted = self.signature.output_shape
        if not isinstance(value, Ref) or len(shape) < 1 or isinstance(shape[0], int):
            raise KernelCompilationError(
                f"its output has shape {shown(shape)}, without the batch's axis at the front:"
                f" expected {shown(('batch', *wanted))}"
            )
        if tuple(shape[1:]) != wanted or dtype != self.signature.dtype:
            raise KernelCompilationError(
                f"its output is {dtype} of shape {shown(shape[1:])} for each example, the"
                f" signature says {self.signature.dtype} of {shown(wanted)}"
            )
        if len(self.calls) > MOST_CALLS:
            raise KernelCompilationError(
                f"it makes {len(self.calls)} operations, more than the {MOST_CALLS} that a kernel"
                " may make: graft a smaller module"
            )
        return Line(self.parameters, self.constants, tuple(self.calls), value.name)

    def _read(self, node: Any) -> None:
        import torch

        sources = [self.known[n] for n in node.all_input_nodes if n in self.known]
        name = operation_of(node)
        if name is None:
            if node.target.__name__ == "getitem":
                self.known[node] = self._item(node)
            elif isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
                raise KernelCompilationError(
                    f"it holds control flow ({node.target}): a kernel is a straight line of"
                    " operations"
                )
            # Otherwise it computes with the batch's size, which is read off the results' shapes.
            return
        if torch.Tag.nondeterministic_seeded in node.target.tags and not is_certain(node, name):
            raise KernelCompilationError(
                f"it draws random numbers ({name}): a kernel is a function of its parameters and"
                " its input. Layers of dropout enter as in evaluation; a call of F.dropout needs"
                " training=self.training"
            )
        # Lists and sizes.
        if not hasattr(node.meta.get("val"), "dtype"):
            self.known[node] = list(values_of(node.meta.get("val")))
            return
        if "empty" in name:
            raise KernelCompilationError(
                f"it reads memory that nothing was written to (torch.{name}): use torch.zeros"
            )
        fixed = len(sources) == len(node.all_input_nodes)
        if fixed and not any(isinstance(s, Ref | list) for s in sources):
            self.known[node] = self._folded(node)
            return
        self.known[node] = self._operation(node, _RENAMED.get(name, name))

    def _folded(self, node: Any) -> Any:
        """What is computed from constants alone is one."""
        import torch

        def value(n: Any) -> Any:
            return self.known[n]

        with torch.no_grad():
            return node.target(
                *torch.fx.map_arg(node.args, value), **torch.fx.map_arg(node.kwargs, value)
            )

    def _operation(self, node: Any, name: str) -> Ref:
        first = node.args[0]
        if name in _SAME or (name == "dropout" and node.args[2] is False) or is_whole(node, name):
            return self._ref(first)
        if name in _RESHAPES:
            # An empty list of sizes is written as a call that the scan refuses.
            shape = open_sizes(node, name)
            made = self._call("reshape", {"self": self._ref(first), "shape": shape or (1,)})
            return made if shape else self._call("select", {"self": made, "dim": 0, "index": 0})
        if name not in OPERATIONS:
            raise refusal(name)
        if name == "expand":
            return self._expanded(node)
        if name == "to":
            dtype = self._argument(dtype_of(node), "torch.to")
            return self._call("to", {"self": self._ref(first), "dtype": dtype})
        shape = shape_of(first) if name == "slice" else ()
        return self._call(name, completed(name, self._arguments(node, name), shape))

    def _arguments(self, node: Any, name: str) -> dict[str, Value]:
        """By name, in the schema's order, with its defaults."""
        public, where = OPERATIONS[name], f"torch.{name}"
        arguments: dict[str, Value] = {}
        for place, argument in enumerate(node.target._schema.arguments):
            key, default = argument.name, argument.default_value
            given = node.kwargs.get(key, default)
            if place < len(node.args) and not argument.kwarg_only:
                given = node.args[place]
            if key in public.arguments or (key in public.keywords and given != default):
                arguments[key] = self._argument(given, where)
            elif key not in (*public.keywords, *_IGNORED) and given != default:
                raise KernelCompilationError(
                    f"it calls {where} with {key}={given!r}, which a module that is to be an"
                    " artifact may not: leave it out, or write the kernel as a function of jax"
                )
        return arguments

    def _expanded(self, node: Any) -> Ref:
        before, after = shape_of(node.args[0]), shape_of(node)
        aligned = (1,) * (len(after) - len(before)) + before
        for old, new in zip(aligned, after, strict=True):
            if not isinstance(new, int) and isinstance(old, int):
                raise KernelCompilationError(
                    "torch.expand repeats a tensor over the batch, which cannot be written: add or"
                    " multiply it instead, which broadcasts"
                )
        size = tuple(size if isinstance(size, int) else -1 for size in after)
        return self._call("expand", {"self": self._ref(node.args[0]), "size": size})

    def _call(self, name: str, arguments: dict[str, Value]) -> Ref:
        result = f"v_{len(self.calls)}"
        positional = sum(key not in OPERATIONS[name].keywords for key in arguments)
        self.calls.append(Call(result, name, arguments, positional))
        return Ref(result)

    def _item(self, node: Any) -> Any:
        """One tensor of the list that an operation gave."""
        source, index = node.args
        name = operation_of(source)
        if name == "_native_batch_norm_legit_no_training" and index == 0:
            return self._operation(source, "batch_norm")
        if name in ("unbind", "split", "split_with_sizes", "chunk"):
            shapes = [shape_of(v) for v in source.meta["val"]]
            tensor = self._ref(source.args[0])
            axes = len(shape_of(source.args[0]))
            at = 1 if name == "unbind" else 2
            axis = source.args[at] if len(source.args) > at else source.kwargs.get("dim", 0)
            axis %= axes
            if name == "unbind":
                return self._call("select", {"self": tensor, "dim": axis, "index": index})
            sizes = [shape[axis] for shape in shapes]
            if all(isinstance(size, int) for size in sizes):
                start = sum(sizes[:index])
                return self._call(
                    "slice",
                    {
                        "self": tensor,
                        "dim": axis,
                        "start": start,
                        "end": start + sizes[index],
                        "step": 1,
                    },
                )
            raise KernelCompilationError(
                f"it takes the batch apart by torch.{name}, which cannot be written"
            )
        raise refusal(name)

    def _ref(self, node: Any) -> Ref:
        value = self.known[node]
        if isinstance(value, Ref):
            return value
        array = from_torch(value)
        if array.dtype.name not in (self.signature.dtype, "bool"):
            raise KernelCompilationError(
                f"it computes with a constant of {array.dtype.name}: expected"
                f" {self.signature.dtype}, as the signature says, or bool"
            )
        if array.dtype != np.bool_:
            numbers = array.astype(np.float32)
            if np.isnan(numbers).any() or np.isposinf(numbers).any():
                raise KernelCompilationError("one of its constants is not finite")
        for name, held in self.constants.items():
            if held is array or (
                held.dtype == array.dtype
                and held.shape == array.shape
                and held.tobytes() == array.tobytes()
            ):
                return Ref(name)
        name = f"c_{len(self.constants)}"
        self.constants[name] = array
        total = sum(c.size for c in self.constants.values())
        if total > MOST_CONSTANTS:
            raise KernelCompilationError(
                f"its buffers and other constants hold {total:,} numbers, more than the"
                f" {MOST_CONSTANTS:,} that are written into a program: make them parameters"
            )
        return Ref(name)

    def _argument(self, value: Any, where: str) -> Value:
        import torch

        if isinstance(value, torch.fx.Node):
            if value not in self.known:
                raise KernelCompilationError(
                    f"it gives the batch's size to {where}, which cannot be written"
                )
            return self._ref(value)
        if isinstance(value, list | tuple):
            return tuple(self._argument(v, where) for v in value)
        if isinstance(value, torch.dtype):
            name = str(value).removeprefix("torch.")
            if name not in ("float32", "bfloat16"):
                raise KernelCompilationError(
                    f"it computes in {name} ({where}): expected float32 or bfloat16"
                )
            return DType(name)
        if isinstance(value, float) and not math.isfinite(value):
            if value == -math.inf and where in ("torch.masked_fill", "torch.where"):
                return value
            raise KernelCompilationError(f"it gives {value} to {where}, which cannot be written")
        if value is None or isinstance(value, int | float | bool | str):
            return value
        raise KernelCompilationError(
            f"it gives {value!r} to {where}, which cannot be written into a program"
        )
