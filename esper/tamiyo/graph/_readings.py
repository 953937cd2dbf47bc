"""What is measured of a growing network at a decision boundary, as arrays over its graph.

A trainer fills it from a run and the gym from thousands of environments; what a policy sees is
computed from it by one function, `model_graph`, on numpy and on jax alike.
"""

from typing import Any, NamedTuple

PAST = 4
"""Boundaries whose losses are kept."""

KERNEL = 14
"""Numbers by which a kernel is described: see `KERNEL_FEATURES`."""


class Readings(NamedTuple):
    """Arrays of numpy or jax; any leading axes under `jax.vmap`. NaN where nothing was measured.

    Rows are nodes of the model graph, filled up to a bucket as its edges are.
    """

    progress: Any
    """f32 `[]`: the share of the run's steps that are done, in [0, 1]."""
    train_loss: Any
    """f32 `[PAST]`: means over the steps between boundaries, the newest first."""
    validation_loss: Any
    """f32 `[PAST]`: at boundaries, the newest first."""
    validation_accuracy: Any
    """f32 `[]`: in [0, 1]; NaN for regression."""
    first_loss: Any
    """f32 `[]`: the validation loss at the first boundary."""
    loss_spread: Any
    """f32 `[]`: standard deviation of the losses since the last boundary, over their mean."""
    rollbacks: Any
    """f32 `[]`: how often the run was taken back."""
    parameters: Any
    """f32 `[]`: of the network, kernels that are loading included, over the host's."""
    flops: Any
    """f32 `[]`: the same, counted of a forward pass of one example."""

    kind: Any
    """i32 `[nodes]`: which of `KINDS`."""
    sizes: Any
    """f32 `[nodes, 3]`: the host's parameters at a site, elements that it takes, and gives."""
    depth: Any
    """f32 `[nodes]`: as in `Topology.depths`."""
    grows: Any
    """bool `[nodes]`: whether kernels may be grafted there."""
    gradient_norm: Any
    """f32 `[nodes]`: of the mean loss by the host's parameters at a site."""
    weight_norm: Any
    """f32 `[nodes]`: of those parameters."""
    follows: Any
    """f32 `[nodes, 2]`: how much of the loss's gradient by what a site gives maps of what it takes
    follow, by `FOLLOWED`, in [-1, 1]; see `follows`."""

    stage: Any
    """u8 `[nodes, seeds]`: see `SeedLifecycleState`."""
    alpha: Any
    """f32 `[nodes, seeds]`."""
    health: Any
    """f32 `[nodes, seeds]`: of running seeds, in [0, 1]."""
    health_before: Any
    """f32 `[nodes, seeds]`: the same at the boundary before."""
    worth: Any
    """f32 `[nodes, seeds]`: of running seeds, how much the validation loss rises without them."""
    worth_half: Any
    """f32 `[nodes, seeds]`: half the width of its 95 % interval."""
    age: Any
    """f32 `[nodes, seeds]`: boundaries since the graft; 0 without one."""
    held: Any
    """f32 `[nodes, seeds, KERNEL]`: descriptions of the kernels in them; 0 without one."""

    kernels: Any
    """f32 `[kernels, KERNEL]`: descriptions of those that may be grafted; rows of 0 fill up."""
    fits: Any
    """bool `[nodes, kernels]`: which may be grafted where."""
