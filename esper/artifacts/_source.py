"""The source in a TorchScript archive: straight-line code that calls allowed functions of torch.

It is read by Python's own parser, of whose grammar TorchScript is a part, and has to be of one
form: a class with one method, whose statements each give a name to an expression. Numbers are
bounded, because a padding or a window of a few characters can ask for terabytes.
"""

import ast
import math
from typing import Any

from esper.artifacts._allowed import ALLOWED_CALLS
from esper.errors import ArtifactError

CLASS = "EsperKernel"
MAX_SOURCE = 1 << 18
MAX_INT = 1 << 20
"""Largest size, stride, padding or axis, as that of a signature."""
MAX_PRODUCT = 1 << 28
"""Of the numbers in one list, which may be the sizes of a tensor or a window."""

_MAX_DEPTH = 16
_MAX_TEXT = 64
_MAX_LIST = 1024
_EMPTY = ("__parameters__", "__buffers__")

_NODES = (
    ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return,
    ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.List, ast.UnaryOp, ast.USub,
    ast.Load, ast.Store,
)  # fmt: skip


def scan_source(source: bytes) -> int:
    """Refuse source of any other form; runs nothing.

    Returns:
        How many tensors its method takes.

    Raises:
        ArtifactError: saying what was found.
    """
    if len(source) > MAX_SOURCE:
        raise ArtifactError(f"its TorchScript is larger than {MAX_SOURCE} bytes")
    try:
        tree = ast.parse(source.decode("ascii"))
        for node in ast.walk(tree):
            if not isinstance(node, _NODES):
                raise _odd(f"contains {type(node).__name__.lower()}")
        return _module(tree)
    # What is nested too deep is either of the last two, by its depth.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ArtifactError(f"its TorchScript cannot be parsed: {reason}") from error


def _odd(what: str) -> ArtifactError:
    return ArtifactError(f"its TorchScript {what}, which kernels may not use")


def _module(tree: ast.Module) -> int:
    (first, *more) = [*tree.body, None]
    if not isinstance(first, ast.ClassDef) or more != [None]:
        raise ArtifactError("its TorchScript must be one class with one method")
    bases = [ast.unparse(base) for base in first.bases]
    if first.name != CLASS or bases != ["Module"] or first.keywords or first.decorator_list:
        raise _odd(f"defines the class {first.name!r} of {bases}")
    arguments = None
    for statement in first.body:
        if isinstance(statement, ast.FunctionDef):
            if statement.name != "forward" or statement.decorator_list:
                raise ArtifactError(
                    f"its TorchScript defines {statement.name!r}; the only method allowed is"
                    " 'forward'"
                )
            if arguments is not None:
                raise ArtifactError("its TorchScript must be one class with one method")
            arguments = _method(statement)
        elif not _is_empty_list(statement):
            raise _odd(f"has {ast.unparse(statement)[:80]!r} in its class")
    if arguments is None:
        raise ArtifactError("its TorchScript must be one class with one method")
    return arguments


def _is_empty_list(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id in _EMPTY
        and isinstance(statement.value, ast.List)
        and not statement.value.elts
    )


def _method(method: ast.FunctionDef) -> int:
    given = method.args
    if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
        raise _odd("has arguments that are not plain")
    types = [ast.unparse(a.annotation) if a.annotation else "" for a in given.args]
    expected = [f"__torch__.{CLASS}", *["Tensor"] * (len(types) - 1)]
    returned = ast.unparse(method.returns) if method.returns else ""
    if types != expected or len(types) < 2 or returned != "Tensor":
        raise _odd(f"takes {types[:20]} and gives {returned!r}")
    *statements, last = method.body
    known = {a.arg for a in given.args[1:]}
    for statement in statements:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _odd(f"has {ast.unparse(statement)[:80]!r} in its method")
        (target,) = statement.targets
        if not isinstance(target, ast.Name):
            raise _odd(f"assigns to {ast.unparse(target)[:80]!r}")
        _expression(statement.value, known, 0)
        known.add(target.id)
    if not isinstance(last, ast.Return) or last.value is None:
        raise _odd("has a method that returns nothing")
    _expression(last.value, known, 0)
    return len(given.args) - 1


def _expression(node: ast.expr, known: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ArtifactError(f"its TorchScript is nested more than {_MAX_DEPTH} deep")
    match node:
        case ast.Name():
            if node.id not in known:
                raise _odd(f"uses the name {node.id!r}")
        case ast.Constant() | ast.UnaryOp():
            _number(node)
        case ast.List():
            if len(node.elts) > _MAX_LIST:
                raise _odd(f"has a list of {len(node.elts)}")
            numbers = [_number(e) if _is_plain(e) else None for e in node.elts]
            if math.prod(abs(n) for n in numbers if isinstance(n, int) and n) > MAX_PRODUCT:
                raise ArtifactError(
                    f"its TorchScript has the sizes {ast.unparse(node)[:80]}, whose product is more"
                    f" than {MAX_PRODUCT}"
                )
            for element in node.elts:
                _expression(element, known, depth + 1)
        case ast.Call():
            _call(node, known, depth)
        case _:
            raise _odd(f"has the expression {ast.unparse(node)[:80]!r}")


def _is_plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.UnaryOp)


def _number(node: ast.expr) -> Any:
    """The value of a constant, perhaps with a minus; it need not be a number."""
    if isinstance(node, ast.UnaryOp):
        value = _number(node.operand) if isinstance(node.operand, ast.Constant) else None
        if isinstance(node.op, ast.USub) and isinstance(value, int | float):
            return -value
        raise _odd(f"has the expression {ast.unparse(node)[:80]!r}")
    value = node.value if isinstance(node, ast.Constant) else ...
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise _odd(f"has a text of {len(value)} characters")
    elif type(value) is int:
        if value > MAX_INT:
            shown = str(value) if value < 1 << 64 else f"of {value.bit_length()} bits"
            raise ArtifactError(
                f"its TorchScript has the number {shown}, at most {MAX_INT} is allowed"
            )
    elif not (value is None or isinstance(value, bool | float)):
        raise _odd(f"has a constant of type {type(value).__name__}")
    return value


def _call(node: ast.Call, known: set[str], depth: int) -> None:
    f = node.func
    if not (
        isinstance(f, ast.Attribute)
        and isinstance(f.value, ast.Name)
        and f.value.id == "torch"
        and f.attr in ALLOWED_CALLS
    ):
        raise ArtifactError(
            f"its TorchScript calls {ast.unparse(f)[:80]}, which is not on the list of allowed"
            " functions"
        )
    _arguments(node, f.attr)
    for argument in node.args:
        _expression(argument, known, depth + 1)
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _odd("unpacks arguments")
        if keyword.arg == "out":
            # It would be written into: a parameter, or what the host goes on to use.
            raise _odd("gives the keyword 'out'")
        _expression(keyword.value, known, depth + 1)


def _arguments(node: ast.Call, name: str) -> None:
    """Refuse arguments by which an allowed function does more than compute."""
    match name:
        case "batch_norm":
            statistics = _literals(node, "running_mean", 3) + _literals(node, "running_var", 4)
            training = _literals(node, "training", 5)
            kept = bool(training) and all(value is False for value in training)
            if not kept and any(value is not None for value in statistics):
                # A view of the input may be given as statistics.
                raise _odd("has a batch_norm that writes into its statistics")
        case "scaled_dot_product_attention":
            if any(value != 0 for value in _literals(node, "dropout_p", 4)):
                raise _odd("has a scaled_dot_product_attention with dropout")
        case "where":
            if len(node.args) + len(node.keywords) != 3:
                # Of a condition alone, it gives as many indices as values happen to be true.
                raise _odd("has a where without two values to choose from")
        case _:
            pass


def _literals(node: ast.Call, name: str, place: int) -> list[Any]:
    """An argument's value, in a list that is empty where it is left out; `...` where computed."""
    given = [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg == name)]
    return [value.value if isinstance(value, ast.Constant) else ... for value in given]
