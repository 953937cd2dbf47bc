"""Choosing the layers of a model by type and by path."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from esper_functional import SeedIndexError

Target = type | str
"""A type of layers, or a layer's path, in which `*` stands for anything."""


def check_targets(targets: Any) -> tuple[Target, ...]:
    """Several targets, or a lone one, as a tuple.

    Raises:
        SeedIndexError: for what is neither a type nor a path.
    """
    lone = isinstance(targets, str | type)
    many = (targets,) if lone or not isinstance(targets, Iterable) else tuple(targets)
    for target in many:
        if not isinstance(target, str | type):
            raise SeedIndexError(
                "wrap: target_layers takes types of layers, and paths such as 'blocks.*.mlp'; got"
                f" {target!r}"
            )
    return many


def select_layers(layers: Mapping[str, Any], targets: Target | Sequence[Target]) -> tuple[str, ...]:
    """The names of the layers that any target matches, in the model's order.

    Args:
        layers: the model's layers by path.
        targets: types, and paths such as `"encoder.0"` or `"encoder.*"`; or one of them.

    Raises:
        SeedIndexError: for a target that matches nothing, with the nearest names.
    """
    targets = check_targets(targets)
    if not layers:
        raise SeedIndexError(
            "wrap: the model has no layers within it, and itself it cannot be one: put it into a"
            " model that calls it, such as a Sequential"
        )
    if not targets:
        raise SeedIndexError("wrap: target_layers is empty: name types of layers, or paths")
    chosen: set[str] = set()
    for target in targets:
        if isinstance(target, str):
            hits = {name for name in layers if fnmatchcase(name, target)}
        else:
            hits = {name for name, layer in layers.items() if isinstance(layer, target)}
        if not hits:
            raise _nothing(target, layers)
        chosen |= hits
    return tuple(name for name in layers if name in chosen)


def _nothing(target: Target, layers: Mapping[str, Any]) -> SeedIndexError:
    if isinstance(target, str):
        near = difflib.get_close_matches(target, layers, n=3)
        hint = f"the nearest are {near}" if near else f"there are {_few(list(layers))}"
        return SeedIndexError(f"wrap: no layer's path matches {target!r}; {hint}")
    kinds = sorted({type(layer).__name__ for layer in layers.values()})
    near = difflib.get_close_matches(target.__name__, kinds, n=3)
    hint = f"; the nearest are {near}" if near else ""
    return SeedIndexError(
        f"wrap: the model has no layer of type {target.__name__}: it is made of"
        f" {_few(kinds)}{hint}. Choose others by target_layers"
    )


def _few(names: Sequence[str]) -> str:
    return f"{list(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
