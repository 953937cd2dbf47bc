"""An optimiser state of its own for each group of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from esper_adapters.optax._errors import OptimizerSurgeryError


class PerGroupState(NamedTuple):
    """The state of `per_group`."""

    groups: dict[str, Any]
    """Each group's state, by its name."""


def per_group(
    optimizer: optax.GradientTransformation, group_of: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` for each group by itself, each with counts and schedules of its own.

    Like `optax.partition` with one optimiser for all, but the groups are those that have
    parameters, so they come and go: after `carry` a new group starts as `optimizer` starts, at
    count 0, and goes on as if it were alone. What is meant to be over all parameters
    (`clip_by_global_norm`) is chained before `per_group`; `freeze` goes inside, so that the
    group of a frozen parameter stays.

    A group's moments hold an empty node for each subtree of another group: let `group_of`
    name whole subtrees where it can.

    Args:
        group_of: from the params to a tree of strings that is a prefix of theirs. It
            runs whenever `update` is traced and must not look at values.

    Raises:
        OptimizerSurgeryError: from `init` and `update`, where `group_of` gives anything else; from
            `update`, where the state has other groups than the params.
    """

    def groups(params: Any) -> dict[str, optax.GradientTransformationExtraArgs]:
        labels = group_of(params)
        return {name: _one_group(optimizer, labels, name) for name in _names(labels, params)}

    def init(params: Any) -> PerGroupState:
        return PerGroupState({name: group.init(params) for name, group in groups(params).items()})

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PerGroupState]:
        present = groups(updates if params is None else params)
        if present.keys() != state.groups.keys():
            raise OptimizerSurgeryError(
                f"per_group: the params have the groups {sorted(present)}, the state has"
                f" {sorted(state.groups)}; fit it to them with esper_adapters.optax.carry"
            )
        states: dict[str, Any] = {}
        for name, group in present.items():
            # Each leaves the other groups' updates as they are.
            updates, states[name] = group.update(updates, state.groups[name], params, **extra_args)
        return updates, PerGroupState(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _one_group(
    optimizer: optax.GradientTransformation, labels: Any, name: str
) -> optax.GradientTransformationExtraArgs:
    mask = jax.tree.map(lambda label: label == name, labels)
    return optax.masked(optimizer, lambda _: mask, mask_compatible_extra_args=True)


def _names(labels: Any, params: Any) -> list[str]:
    """The groups that have a parameter, sorted."""
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        if not isinstance(label, str):
            raise OptimizerSurgeryError(
                f"per_group: `group_of` must give a tree of strings, got {label!r} at"
                f" {jax.tree_util.keystr(path) or '.'}"
            )
    try:
        return sorted(set(jax.tree.leaves(jax.tree.broadcast(labels, params))))
    except ValueError as error:
        raise OptimizerSurgeryError(
            "per_group: `group_of` must give a tree of strings that is a prefix of the params, got"
            f" {jax.tree.structure(labels)} for params of {jax.tree.structure(params)}; build it"
            " from the params that it is given, as by jax.tree.map"
        ) from error
