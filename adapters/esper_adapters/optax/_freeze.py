"""Freezing part of a parameter tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esper_adapters.optax._errors import OptimizerSurgeryError


class FrozenNode(optax.MaskedNode):
    """Stands in an optimiser's state where a frozen parameter's would be.

    A class of its own, so that `carry` tells freezing, which drops a state on
    purpose, from a mask or label that has slipped.
    """


def freeze(
    optimizer: optax.GradientTransformation, trainable: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` for the trainable parameters; an update of exactly zero for the others.

    A frozen parameter is not there for `optimizer`: it gets no decay, has no
    moments, counts in no global norm. Nothing is added to the state, so an
    optimiser that freezes nothing has the very state of the bare one. Put
    `freeze` outermost: what is chained behind it can still move what is frozen.

    Extra arguments of `update` that have the params' structure lose their
    frozen leaves too. Those that are functions (a line search's `value_fn`, SAM's
    `grad_fn`) get the frozen parameters' values back before they are called.

    Args:
        trainable: from the params to a tree of bools that is a prefix of theirs.
            It runs whenever `update` is traced and must not look at values, only at
            structure, shapes and static fields. `esper_adapters.equinox.trainable` is one.

    Raises:
        OptimizerSurgeryError: from `init` and `update`, where `trainable` gives anything else.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return inner.init(_keep(_mask(trainable, params), params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        mask = _mask(trainable, updates if params is None else params)
        kept, state = inner.update(
            _keep(mask, updates),
            state,
            None if params is None else _keep(mask, params),
            **{name: _keep_extra(mask, params, value) for name, value in extra_args.items()},
        )
        return _restore(mask, kept, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _mask(trainable: Callable[[Any], Any], params: Any) -> Any:
    """A bool for every parameter."""
    prefix = trainable(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(prefix):
        if not isinstance(leaf, bool | np.bool_):
            raise OptimizerSurgeryError(
                f"freeze: `trainable` must give a tree of bools, got {leaf!r} at"
                f" {jax.tree_util.keystr(path) or '.'}; decide by structure and shapes, not by"
                " values"
            )
    try:
        return jax.tree.broadcast(prefix, params)
    except ValueError as error:
        raise OptimizerSurgeryError(
            "freeze: `trainable` must give a tree of bools that is a prefix of the params, got"
            f" {jax.tree.structure(prefix)} for params of {jax.tree.structure(params)}; build it"
            " from the params that it is given, as by jax.tree.map"
        ) from error


def _keep(mask: Any, tree: Any) -> Any:
    return jax.tree.map(lambda keep, leaf: leaf if keep else FrozenNode(), mask, tree)


def _restore(mask: Any, kept: Any, full: Any) -> Any:
    return jax.tree.map(lambda keep, leaf, other: leaf if keep else other, mask, kept, full)


def _keep_extra(mask: Any, params: Any, value: Any) -> Any:
    if params is None:
        return value
    structure = jax.tree.structure(params)
    # Structure comes first: gradients of a callable module are callable too.
    if jax.tree.structure(value) == structure:
        return _keep(mask, value)
    if not callable(value):
        return value

    def over_all(kept: Any, *args: Any, **kwargs: Any) -> Any:
        result = value(_restore(mask, kept, params), *args, **kwargs)
        return _keep(mask, result) if jax.tree.structure(result) == structure else result

    return over_all
