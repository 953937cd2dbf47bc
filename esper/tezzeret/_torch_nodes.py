"""Reading the nodes of an exported graph: what they are, and the shapes of what they give."""

from collections.abc import Sequence
from typing import Any

from esper.errors import KernelCompilationError
from esper.tezzeret._torch_calls import Value
from esper.tezzeret._torch_operations import OPERATIONS


def refusal(name: str | None) -> KernelCompilationError:
    return KernelCompilationError(
        f"it uses torch.{name}, which a module that is to be an artifact may not; there are"
        f" {', '.join(sorted(OPERATIONS))}. Write the kernel with these, as a blueprint, or as a"
        " function of jax"
    )


def operation_of(node: Any) -> str | None:
    """The operation's name in ATen; None where it is none of them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    space, _, name = schema.name.partition("::")
    if space != "aten":
        raise KernelCompilationError(
            f"it uses the operation {schema.name}, which is not torch's own: write it with"
            " operations of torch"
        )
    return name if name != "sym_size" else None


def shape_of(node: Any) -> tuple[Any, ...]:
    value = node.meta["val"] if hasattr(node, "meta") else node
    return tuple(value.shape)


def dtype_name(node: Any) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(str(s) if isinstance(s, int) else 'batch' for s in shape)})"


def values_of(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def open_sizes(node: Any, name: str) -> tuple[int, ...]:
    """The shape of a result, with -1 for the size that comes of the batch's."""
    shape = tuple(size if isinstance(size, int) else -1 for size in shape_of(node))
    if shape.count(-1) > 1:
        raise KernelCompilationError(
            f"torch.{name} gives a tensor whose shape {shown(shape_of(node))} has the batch's size"
            " in it more than once, which cannot be written"
        )
    return shape


def is_certain(node: Any, name: str) -> bool:
    """Whether an operation that may draw random numbers is told not to."""
    if name == "scaled_dot_product_attention":
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return dropout == 0.0
    return name == "dropout" and node.args[2] is False


def is_whole(node: Any, name: str) -> bool:
    """Whether a slice or an expansion takes all there is."""
    if name not in ("slice", "expand"):
        return False
    return str(shape_of(node)) == str(shape_of(node.args[0]))


def dtype_of(node: Any) -> Any:
    return node.meta["val"].dtype


def completed(name: str, arguments: dict[str, Value], shape: tuple[Any, ...]) -> dict[str, Value]:
    """Arguments that a renamed operation, or an empty list, leaves open; `shape` is the input's."""
    if name == "slice":
        axis, end = arguments["dim"], arguments["end"]
        size = shape[axis] if isinstance(axis, int) else None
        # To the end of an axis is written as the greatest number there is, which no scan allows.
        if isinstance(size, int) and isinstance(end, int):
            arguments["end"] = min(end, size)
        return arguments
    if name == "batch_norm":
        last = {key: arguments.pop(key) for key in ("momentum", "eps")}
        return arguments | {"training": False} | last | {"cudnn_enabled": False}
    if name == "pad":
        return {"self": arguments["self"], "pad": arguments["pad"]} | {
            "mode": arguments.get("mode", "constant"),
            "value": arguments.get("value", 0.0),
        }
    if "pool" in name and arguments.get("stride") == ():
        return arguments | {"stride": arguments["kernel_size"]}
    return arguments
