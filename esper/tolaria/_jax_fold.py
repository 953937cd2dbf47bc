"""A kernel that becomes a part of its host, in the parameters and in what is judged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esper.tolaria._jax_programs import Group
from esper_adapters.equinox import SeededModel
from esper_functional import Event, Kernel


def with_average(model: SeededModel, slot: int, group: Group | None) -> SeededModel:
    """With the average of a kernel in its place: what becomes a fossil is what was judged.

    Args:
        group: the kernel's; None for one that does not train.
    """
    if group is None or group.average is None:
        return model
    kernel = Kernel(model.kernels[slot].program, group.average)
    return dataclasses.replace(model, kernels={**model.kernels, slot: kernel})


def fold_kernel(
    event: Event,
    model: SeededModel,
    combine: Callable[..., Any],
    host: Group,
    rest: Any,
    group: Group | None,
) -> tuple[SeededModel, Group]:
    """Add a kernel to its layer's weights, which go on with the moments that they have.

    Args:
        model: with the kernels as they have trained; its own host is not looked at.
        combine: `combine(params)` is a host, or `combine(params, rest)` where there is a rest.
        group: the kernel's; None for one that does not train.

    Raises:
        FoldError: for a kernel that is not affine, or a blend that forbids it.
    """

    def folded(model: SeededModel, params: Any) -> tuple[SeededModel, Any]:
        own = combine(params) if rest is None else combine(params, rest)
        after = dataclasses.replace(model, host=own).apply_event(event)
        found = after.surgery.functional(after.host, after.sites, after.call).params
        # By leaves: a module's own functions may make its structure another to jax.
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True)
        same = [jnp.asarray(new, p.dtype) for new, p in leaves]
        return after, jax.tree.unflatten(jax.tree.structure(params), same)

    after, params = folded(model, host.params)
    average = host.average
    if average is not None:
        # The kernel that was judged goes into the weights that were.
        slot = int(model.seeds.slot[event.layer, event.seed])
        average = folded(with_average(model, slot, group), average)[1]
    return after, Group(params, host.moments, average)
