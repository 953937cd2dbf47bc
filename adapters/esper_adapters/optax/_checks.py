"""What must hold before a state is carried, and what to say where it does not."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from esper_adapters._naming import HOST_FIELD
from esper_adapters.optax._errors import OptimizerSurgeryError
from esper_adapters.optax._freeze import FrozenNode
from esper_adapters.optax._paths import (
    CanonicalPath,
    Leaf,
    Leaves,
    by_path,
    canonical,
    listed,
    state_classes,
)

_AFRESH = "or start afresh with optimizer.init(new_params)"
_PER_PARAMETER = f"use transformations that keep one state per parameter, {_AFRESH}"


def parameters(params: Any, what: str) -> Leaves:
    leaves = by_path(params, what)
    for leaf in leaves.values():
        if not isinstance(leaf.value, jax.Array | np.ndarray | np.generic | float | int | complex):
            raise OptimizerSurgeryError(
                f"carry: {what} must hold arrays, got {type(leaf.value).__name__} at {leaf.name};"
                " pass what the optimiser's init was given, such as"
                " eqx.filter(module, eqx.is_inexact_array)"
            )
    return leaves


def check_incumbents(old: Leaves, new: Leaves) -> None:
    places: dict[int, list[CanonicalPath]] = {}
    for path, leaf in old.items():
        if isinstance(leaf.value, jax.Array | np.ndarray):
            places.setdefault(id(leaf.value), []).append(path)
    for path in old.keys() & new.keys():
        was, now = old[path], new[path]
        if was.aval != now.aval:
            raise OptimizerSurgeryError(
                f"carry: the parameter {now.name} was {_show(was)} and is {_show(now)}; a parameter"
                f" keeps its shape and dtype. Give the new one a path of its own, {_AFRESH}"
            )
        moved_from = places.get(id(now.value), [path])
        if path not in moved_from:
            raise OptimizerSurgeryError(
                f"carry: the array at {now.name} was at {old[moved_from[0]].name}: it would meet"
                " another parameter's state. Items of a sequence are known by their index; leave"
                " None in the place of what you prune, or keep parameters in a dict"
            )


def check_state(opt_state: Any, expected: Any) -> Leaves:
    """The leaves of `opt_state`, which must have the structure of `expected`."""
    state, shapes = by_path(opt_state, "opt_state"), by_path(expected, "optimizer.init(old_params)")
    missing, extra = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    advice = (
        "pass the params that opt_state was made for as old_params, and what made it as"
        " old_optimizer if it was not optimizer"
    )
    if missing or extra:
        raise OptimizerSurgeryError(
            "carry: opt_state is not of the structure of init(old_params): expected and not found:"
            f" {listed(shapes, missing) or 'nothing'}; found and not expected:"
            f" {_with_classes(opt_state, state, extra) or 'nothing'}; {advice}"
        )
    for path, leaf in state.items():
        if leaf.aval[0] != shapes[path].aval[0]:
            raise OptimizerSurgeryError(
                f"carry: opt_state{leaf.name} in {state_classes(opt_state, leaf.path)} is"
                f" {_show(leaf)}; expected {_show(shapes[path])} by init(old_params); {advice}"
            )
    structures = jax.tree.structure(opt_state), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        raise OptimizerSurgeryError(
            "carry: opt_state has the leaves of init(old_params) in nodes of other types or with"
            f" other static fields: expected {structures[1]}, found {structures[0]}; {advice}"
        )
    return state


def check_local(owner: Any, leaves: Leaves, others: Leaves) -> None:
    """No leaf may change its shape with the parameters around it."""
    for path, leaf in leaves.items():
        other = others.get(path, leaf)
        if other.aval != leaf.aval:
            raise OptimizerSurgeryError(
                f"carry: opt_state{leaf.name} in {state_classes(owner, leaf.path)} is"
                f" {_show(leaf)}, and {_show(other)} where parameters come or go: it depends on"
                f" several of them together, as under optax.flatten; {_PER_PARAMETER}"
            )


def check_kept(
    owner: Any, leaves: Leaves, paths: Collection[CanonicalPath], frozen: Any, verb: str
) -> None:
    """An incumbent's state may come and go by `freeze` alone."""
    slipped = {
        path for path in paths if not any(path[:end] in frozen for end in range(len(path) + 1))
    }
    if slipped:
        raise OptimizerSurgeryError(
            f"carry: optimizer.init(new_params) {verb} what incumbents have in the state:"
            f" {_with_classes(owner, leaves, slipped)}. A mask or label function decides otherwise"
            f" for them than before: a grafted layer's parameters have {HOST_FIELD!r} in their"
            f" paths. To freeze parameters use esper_adapters.optax.freeze; {_PER_PARAMETER}"
        )


def frozen_nodes(state: Any) -> set[CanonicalPath]:
    """Where `freeze` keeps no state."""
    nodes = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, FrozenNode)
    )
    return {canonical(path) for path, node in nodes if isinstance(node, FrozenNode)}


def _with_classes(owner: Any, leaves: Leaves, paths: Collection[CanonicalPath]) -> str:
    if not paths:
        return ""
    first = next(leaf for path, leaf in leaves.items() if path in paths)
    return f"{listed(leaves, paths)} (in {state_classes(owner, first.path)})"


def _show(leaf: Leaf) -> str:
    shape, dtype = leaf.aval
    return f"{dtype}{list(shape)}"
