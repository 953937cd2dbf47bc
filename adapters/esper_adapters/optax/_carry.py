"""Fitting an optimiser's state to a parameter tree that grew, shrank or froze."""

from collections.abc import Set
from typing import Any, Protocol, runtime_checkable

import jax

from esper_adapters.optax._checks import (
    check_incumbents,
    check_kept,
    check_local,
    check_state,
    frozen_nodes,
    parameters,
)
from esper_adapters.optax._entangled import refuse_entangled
from esper_adapters.optax._errors import OptimizerSurgeryError
from esper_adapters.optax._paths import CanonicalPath, Leaves, by_path, without


@runtime_checkable
class HasInit(Protocol):
    """An optax transformation, or `optax.MultiSteps`: what makes states."""

    def init(self, params: Any, /) -> Any:
        """The state for these params."""
        ...


def carry(
    optimizer: HasInit,
    opt_state: Any,
    old_params: Any,
    new_params: Any,
    *,
    old_optimizer: HasInit | None = None,
) -> Any:
    """The optimiser's state for `new_params`, incumbents' parts bitwise as they were.

    A parameter is an **incumbent** if it has the same canonical path (its path
    without steps named `HOST_FIELD`), shape and dtype in both trees. Then

    - each leaf of the state that belongs to an incumbent is the very array of `opt_state`;
    - what belongs to a new parameter is what `optimizer.init` makes of it;
    - what belonged to a parameter that is gone, or that `freeze` holds now, is dropped,
      and starts anew if the parameter comes back;
    - the rest (counts, schedules, hyperparameters, keys, loss scales) goes on.

    **What can be carried** is a transformation whose state for part of the parameters
    is part of its state for all of them. That is asked of `init` itself, called abstractly with
    `optax.MaskedNode` in the place of the rest; whatever does otherwise is refused.

    **What is shared stays shared.** A new parameter lives under the running count: its
    schedule goes on, and Adam's bias correction, being over, does not correct its first
    moments, so that its first steps are up to (1 − b1)/√(1 − b2) ≈ 3.2 times the learning rate.
    (Those of ADOPT are up to count^¼, and of ACProp, which divides by the moment of the step
    before, unbounded.) `per_group` gives it a count of its own. Terms over all parameters count
    newcomers from the next update on: the norm of `clip_by_global_norm`, the estimates of
    Prodigy, D-Adaptation, DoG, Mechanic and MoMo, the draws of `add_noise`, where a key
    is split by the number of parameters. LAMB's and LARS's trust ratios are per parameter.

    **What cannot be seen.** Items of a sequence are known by their index: pruning from the middle
    renames the rest (refused where arrays are still those of `old_params`); put None there, or
    use a dict. A parameter replaced by another of the same path, shape and dtype is an incumbent:
    prune it in one call and grow it in the next. A mask without a state of its own (weight decay's)
    leaves no trace here: see that it knows a grafted layer's parameters under `HOST_FIELD`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from esper_adapters.optax import carry
        >>> optimizer = optax.adam(1e-3)
        >>> old = {"layer": {"w": jnp.ones((2, 3))}}
        >>> state = optimizer.init(old)
        >>> _, state = optimizer.update(old, state)  # any gradients
        >>> host, kernels = old["layer"], {0: {"a": jnp.ones((2, 2))}}
        >>> new = {"layer": {"esper_host": host, "esper_kernels": kernels}}
        >>> grown = carry(optimizer, state, old, new)
        >>> grown[0].mu["layer"]["esper_host"]["w"] is state[0].mu["layer"]["w"]
        True
        >>> float(grown[0].mu["layer"]["esper_kernels"][0]["a"].sum()), int(grown[0].count)
        (0.0, 1)

    Args:
        optimizer: what will go on with the state.
        opt_state: a state of it, with the structure of `init(old_params)`. Its arrays
            are shared with the result: donate one of the two at most.
        old_params: the tree that the optimiser has seen so far: arrays, with None for what
            `eqx.filter` took out.
        new_params: the tree that it will see.
        old_optimizer: what made `opt_state`, where it is another function of
            the params, as when `freeze` is given another `trainable`.

    Raises:
        OptimizerSurgeryError: where the state does not fit `old_params`; where an incumbent
            has another shape or dtype, or has moved; where a mask or label takes an
            incumbent's state away; and where a transformation cannot be carried.
    """
    before = optimizer if old_optimizer is None else old_optimizer
    old, new = parameters(old_params, "old_params"), parameters(new_params, "new_params")
    check_incumbents(old, new)
    gone, added = old.keys() - new.keys(), new.keys() - old.keys()

    expected = _abstract_init(before, old_params, "old_params")
    state = check_state(opt_state, expected)
    fresh = _init(optimizer, new_params)
    made = by_path(fresh, "optimizer.init(new_params)")
    lost, gained = state.keys() - made.keys(), made.keys() - state.keys()

    if gone or added or lost or gained:
        refuse_entangled(opt_state, grows=bool(gained))
    shapes = by_path(expected, "optimizer.init(old_params)")
    rest_old, own_old = _parts(before, old_params, "old_params", gone, shapes)
    _, own_new = _parts(optimizer, new_params, "new_params", added, made)
    check_local(opt_state, shapes, rest_old)
    check_local(opt_state, shapes, made)
    check_kept(opt_state, state, lost - own_old, frozen_nodes(fresh), "takes away")
    check_kept(fresh, made, gained - own_new, frozen_nodes(opt_state), "gives anew")

    merged = [state.get(path, leaf).value for path, leaf in made.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), merged)


def _abstract_init(optimizer: HasInit, params: Any, what: str) -> Any:
    try:
        # A function of its own, for a trace must not outlive a label function's answers.
        return jax.eval_shape(lambda p: optimizer.init(p), params)
    except Exception as error:
        raise OptimizerSurgeryError(
            f"carry: optimizer.init fails on {what}, called abstractly: {error}. Masks and labels"
            " may look at structure, shapes and dtypes, not at values, and must take"
            " optax.MaskedNode in the place of any leaf, as what is built on jax.tree.map does"
        ) from error


def _parts(
    optimizer: HasInit, params: Any, what: str, others: Set[CanonicalPath], whole: Leaves
) -> tuple[Leaves, Set[CanonicalPath]]:
    """What `init` makes of the incumbents alone, and where it makes something of `others` alone."""
    if not others:
        return whole, set()
    incumbents = by_path(params, what).keys() - others
    rest = _abstract_init(optimizer, without(params, others), f"the incumbents of {what}")
    own = _abstract_init(optimizer, without(params, incumbents), f"the others of {what}")
    shared = by_path(rest, "its state")
    return shared, by_path(own, "its state").keys() - shared.keys()


def _init(optimizer: HasInit, params: Any) -> Any:
    try:
        return optimizer.init(params)
    except Exception as error:
        raise OptimizerSurgeryError(
            f"carry: optimizer.init(new_params) fails: {error}. If masks or labels were given as"
            " a tree of the old structure, give a function of the params instead, such as"
            " lambda params: jax.tree.map(lambda p: p.ndim > 1, params)"
        ) from error
