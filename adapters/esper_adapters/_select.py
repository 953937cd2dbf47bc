"""Choosing the layers of a model by type and by path."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from esper_functional import SeedIndexError

Target = type | str
"""A type of layers, or a layer's path, in which `*` stands for anything."""


def select_layers(layers: Mapping[str, Any], targets: Sequence[Target]) -> tuple[str, ...]:
    """The names of the layers that any target matches, in the model's order.

    Args:
        layers: the model's layers by path.
        targets: types, and paths such as `"encoder.0"` or `"encoder.*"`.

    Raises:
        SeedIndexError: for a target that matches nothing, with the nearest names.
    """
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
        f"wrap: the model has no layer of type {target.__name__}: it is made of {_few(kinds)}{hint}"
    )


def _few(names: Sequence[str]) -> str:
    return f"{list(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
