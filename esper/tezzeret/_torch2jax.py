"""A line of torch's operations as a function of jax, by torch2jax and replacements of its own.

torch2jax follows calls of torch's public functions and carries out what it knows in jax. Some of
what it knows is not what torch computes, and much is missing; `REPLACEMENTS` stand in for that
while a line is followed, and are taken out again.
"""

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import jax.numpy as jnp

from esper.errors import InputError, KernelCompilationError
from esper.tezzeret._blueprint import INPUT
from esper.tezzeret._replacements import REPLACEMENTS
from esper.tezzeret._torch_calls import Call, DType, Line, Ref, Value
from esper.tezzeret._torch_operations import OPERATIONS

_DIRECT = ("slice", "to")
"""Operations that are methods of tensors, and no public functions: torch2jax sees none of them."""

_UNUSED = {"inplace", "return_indices"}
"""Arguments that torch's public functions pass on, and no operation here is given."""

_FOLLOWING = threading.RLock()
"""torch2jax changes torch and a table of its own while it follows a function."""


def require_torch2jax() -> None:
    """Check that torch2jax is there.

    Raises:
        KernelCompilationError: where it is not.
    """
    if find_spec("torch2jax") is None:
        raise KernelCompilationError(
            "making an artifact of a torch module needs torch2jax, which is not installed: install"
            " 'esper-morphogenetic[torch2jax]'. Read its licence first: it is GPLv3, except for"
            " personal, non-profit and small-company use"
        )


def check_replacements(replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Check that replacements stand in for something.

    Raises:
        InputError: naming the first that does not.
    """
    known = {public.function for public in OPERATIONS.values()}
    for name in replacements:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"`replacements` names {name!r}, which is no function that a module may use{hint}"
            )


def jax_function(
    line: Line, *, replacements: Mapping[str, Callable[..., Any]] = REPLACEMENTS
) -> Callable[[dict[str, Any], Any], Any]:
    """`apply(params, x)` over a batch, to be traced by jax.

    Args:
        replacements: functions of jax by the public functions of torch that they stand in for.

    Raises:
        KernelCompilationError: when it is traced, for an operation that neither torch2jax nor the
            replacements know.
    """

    def apply(params: dict[str, Any], x: Any) -> Any:
        import torch2jax

        names = list(line.parameters)
        constants = [jnp.asarray(value) for value in line.constants.values()]
        direct = {name: _on_tensors(replacements[name], torch2jax.Torchish) for name in _DIRECT}
        follow: Any = torch2jax.t2j(lambda *tensors: _followed(line, tensors, direct))
        with _FOLLOWING, _replaced(replacements):
            return follow(*(params[name] for name in names), *constants, x)

    return apply


def _followed(line: Line, tensors: tuple[Any, ...], direct: Mapping[str, Any]) -> Any:
    names = [*line.parameters.values(), *line.constants, INPUT]
    values = dict(zip(names, tensors, strict=True))
    for call in line.calls:
        values[call.result] = _called(call, values, direct)
    return values[line.output]


def _called(call: Call, values: dict[str, Any], direct: Mapping[str, Any]) -> Any:
    import torch

    public = OPERATIONS[call.operation]
    held = {key: _resolved(value, values) for key, value in call.arguments.items()}
    given = [held[key] for key in public.arguments if key in held]
    keywords = {key: held[key] for key in public.keywords if key in held}
    name = public.function
    try:
        function = direct[name] if name in direct else attrgetter(name)(torch)
        return function(*given, **keywords)
    except (NotImplementedError, AssertionError, AttributeError, TypeError, ValueError) as error:
        # torch2jax's own shows the arguments, by their addresses.
        reason = (str(error).splitlines() or [""])[0].partition("(*(")[0]
        raise KernelCompilationError(
            f"torch2jax does not follow torch.{name} ({type(error).__name__}:"
            f" {reason[:200] or 'no message'}): write the kernel as a blueprint or as a function of"
            f" jax, or say what it is in jax by replacements={{{name!r}: ...}}"
        ) from error


def _resolved(value: Value, values: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, DType):
        return getattr(torch, value.name)
    if isinstance(value, tuple):
        return [_resolved(item, values) for item in value]
    return value


@contextmanager
def _replaced(replacements: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """torch2jax's table with our functions in it."""
    import torch
    import torch2jax

    table: dict[Any, Any] = torch2jax.HANDLED_FUNCTIONS
    kept = dict(table)
    try:
        for name, function in replacements.items():
            if name in _DIRECT:
                continue
            table[attrgetter(name)(torch)] = _on_tensors(function, torch2jax.Torchish)
        yield
    finally:
        table.clear()
        table.update(kept)


def _on_tensors(function: Callable[..., Any], tensor: Any) -> Callable[..., Any]:
    """A function of arrays as one of what torch2jax passes around."""

    def bare(value: Any) -> Any:
        if isinstance(value, tensor):
            return value.value
        return [bare(item) for item in value] if isinstance(value, list | tuple) else value

    def call(*args: Any, **kwargs: Any) -> Any:
        named = {key: bare(v) for key, v in kwargs.items() if key not in _UNUSED}
        result = function(*map(bare, args), **named)
        return tensor(result)

    return call
