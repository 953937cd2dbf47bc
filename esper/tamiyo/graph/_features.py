"""What a policy sees of a growing network: features of its run, nodes, seeds and kernels.

Each is free of units: ratios are logarithms, losses are over that of the run's beginning, worths
over the present loss. So a policy can judge a network whose sizes and losses it never met.
"""

from typing import Any, NamedTuple

from esper.tamiyo.graph._follows import FOLLOWED
from esper.tamiyo.graph._padded import Edges
from esper.tamiyo.graph._readings import KERNEL, PAST, Readings
from esper.tamiyo.graph._topology import KINDS
from esper_functional import SeedLifecycleState

_STAGES = tuple(stage.name.lower() for stage in SeedLifecycleState)

RUN_FEATURES = (
    "progress", "train_loss", "validation_loss", "gap", "loss_level", "train_fall", "train_falls",
    "validation_fall", "validation_falls", "has_past", "has_long_past", "accuracy",
    "has_accuracy", "loss_spread", "rollbacks", "parameters", "flops",
    *(f"share_{name}" for name in _STAGES), "mean_alpha",
)  # fmt: skip
"""By name, in order; losses are logarithms of ratios."""

NODE_FEATURES = (
    *(f"is_{kind}" for kind in KINDS), "parameters", "inputs", "outputs", "depth",
    "relative_depth", "grows", "gradient_norm", "relative_gradient", "weight_norm",
    *FOLLOWED, *(f"share_{name}" for name in _STAGES), "alpha", "health", "health_trend", "worth",
    "cost",
)  # fmt: skip

SEED_FEATURES = (
    *_STAGES, "alpha", "health", "health_trend", "worth", "worth_half", "sure", "has_worth", "age",
)  # fmt: skip

RUN, NODE = len(RUN_FEATURES), len(NODE_FEATURES)
OWN_SEED = len(SEED_FEATURES)
SEED = OWN_SEED + KERNEL
"""Features of a seed: its own, and those of the kernel in it."""

BOUND = 8.0
"""Of every feature, on both sides."""

_LAST = PAST - 1

_NO_STAGE = 255
"""Of seeds of nodes that only fill up."""

_TINY = 1e-6
"""Below it a loss or a norm counts as this: logarithms end somewhere."""


class Legal(NamedTuple):
    """What lifecycle and candidates allow."""

    graft: Any
    """bool `[nodes, kernels]`."""
    unload: Any
    """bool `[nodes, seeds]`."""
    fossilize: Any
    """bool `[nodes, seeds]`."""
    retarget: Any
    """bool `[nodes, seeds]`."""
    free: Any
    """i32 `[nodes]`: the seed that a graft would take, the first DORMANT one; -1 without."""


class Held(NamedTuple):
    """Where the seeds of a list are."""

    at: Any
    """i32 `[nodes, seeds]`: the row of each; the last one for all that hold nothing."""
    node: Any
    """i32 `[rows]`: of the seed in a row; of no meaning for rows that only fill up."""


class ModelGraph(NamedTuple):
    """A growing network as a policy sees it. All features are finite, in [-BOUND, BOUND]."""

    run: Any
    """f32 `[RUN]`: `RUN_FEATURES`."""
    nodes: Any
    """f32 `[nodes, NODE]`: `NODE_FEATURES`."""
    seeds: Any
    """f32 `[nodes, seeds, SEED]`: `SEED_FEATURES`; in a list `[rows, columns]`, those beyond `SEED`
    being 0."""
    kernels: Any
    """f32 `[kernels, KERNEL]`."""
    edges: Edges
    legal: Legal
    held: Held | None = None
    """For seeds in a list: see `list_seeds`."""


def model_graph(readings: Readings, edges: Edges, xp: Any) -> ModelGraph:
    """What a policy sees of a network.

    Args:
        readings: without leading axes; map over them with `jax.vmap`.
        edges: with as many nodes as the readings have rows.
        xp: numpy, or jax.numpy, which gives the same to rounding.
    """
    there = xp.asarray(edges.there)
    stage = xp.where(there[:, None], xp.asarray(readings.stage), _NO_STAGE)
    running = (stage == int(SeedLifecycleState.ACTIVE)) | (
        stage == int(SeedLifecycleState.FOSSILIZED)
    )
    each = xp.asarray([int(own) for own in SeedLifecycleState], dtype=stage.dtype)
    stages = (stage[..., None] == each).astype(xp.float32)
    seen = _Seen(
        stages,
        _over_seeds(stages),
        running,
        there,
        _or(readings.health - readings.health_before, 0.0, xp),
        xp.maximum(_or(readings.validation_loss[0], 1.0, xp), _TINY),
    )
    return ModelGraph(
        _bounded(_run(readings, seen, xp), xp),
        _bounded(_nodes(readings, seen, xp), xp),
        _bounded(_seeds(readings, seen, xp), xp),
        _bounded(xp.asarray(readings.kernels), xp),
        edges,
        legal_choices(readings, there, xp),
    )


def legal_choices(readings: Readings, there: Any, xp: Any) -> Legal:
    """What may be chosen: a graft where a seed is DORMANT, the rest where one is ACTIVE."""
    stage = xp.asarray(readings.stage)
    dormant = (stage == int(SeedLifecycleState.DORMANT)) & there[:, None]
    active = (stage == int(SeedLifecycleState.ACTIVE)) & there[:, None]
    some = xp.any(dormant, axis=1)
    free = xp.where(some, xp.argmax(dormant, axis=1), -1).astype(xp.int32)
    room = (some & xp.asarray(readings.grows))[:, None]
    return Legal(room & xp.asarray(readings.fits), active, active, active, free)


class _Seen(NamedTuple):
    """What several features are made of."""

    stages: Any
    """f32 `[nodes, seeds, stages]`: one of each row is 1."""
    counts: Any
    """f32 `[nodes, stages]`: seeds of a node in each."""
    running: Any
    """bool `[nodes, seeds]`."""
    there: Any
    trend: Any
    """f32 `[nodes, seeds]`: of health since the boundary before."""
    loss: Any
    """f32 `[]`: the validation loss, above 0."""

    def over_running(self, values: Any, xp: Any) -> Any:
        """The sum of `[nodes, seeds]` over the running seeds of each node."""
        return _over_seeds(xp.where(self.running, values, 0.0))


def _run(readings: Readings, seen: _Seen, xp: Any) -> Any:
    train = _log(readings.train_loss, xp)
    validation = _log(readings.validation_loss, xp)
    first = _log(readings.first_loss, xp)
    accuracy = xp.asarray(readings.validation_accuracy)
    scalars = [
        readings.progress,
        train[0] - first,
        validation[0] - first,
        validation[0] - train[0],
        validation[0] / 4.0,
        train[0] - train[1],
        (train[0] - train[_LAST]) / _LAST,
        validation[0] - validation[1],
        (validation[0] - validation[_LAST]) / _LAST,
        xp.isfinite(validation[1]),
        xp.isfinite(validation[_LAST]),
        accuracy,
        xp.isfinite(accuracy),
        xp.log1p(readings.loss_spread),
        xp.log1p(readings.rollbacks),
        xp.log(readings.parameters),
        xp.log(readings.flops),
    ]
    own = xp.stack([xp.asarray(value).astype(xp.float32) for value in scalars])
    growing = xp.sum(xp.where(xp.asarray(readings.grows)[:, None], seen.counts, 0.0), axis=0)
    shares = growing / xp.maximum(xp.sum(growing), 1.0)
    count = xp.maximum(_count(seen.running, xp), 1.0)
    alpha = xp.sum(seen.over_running(readings.alpha, xp)) / count
    return xp.concatenate([own, shares, alpha.astype(xp.float32)[None]])


def _nodes(readings: Readings, seen: _Seen, xp: Any) -> Any:
    there = seen.there
    kinds = xp.asarray(readings.kind)[:, None] == xp.arange(len(KINDS))
    sizes = xp.log2(1.0 + xp.asarray(readings.sizes)) / 8.0
    depth = xp.asarray(readings.depth)
    deepest = xp.maximum(xp.max(xp.where(there, depth, 0.0)), 1.0)
    gradient = _log(readings.gradient_norm, xp)
    known = xp.isfinite(gradient) & there
    middle = xp.sum(xp.where(known, gradient, 0.0)) / xp.maximum(_count(known, xp), 1.0)
    some = xp.maximum(_over_seeds(seen.running.astype(xp.float32)), 1.0)
    worth = seen.over_running(_or(readings.worth, 0.0, xp), xp) / seen.loss
    places = [
        depth / 8.0,
        depth / deepest,
        xp.asarray(readings.grows).astype(xp.float32),
        gradient / 4.0,
        gradient - middle,
        _log(readings.weight_norm, xp) / 4.0,
        *xp.moveaxis(xp.asarray(readings.follows), -1, 0),
    ]
    kernels = [
        seen.over_running(readings.alpha, xp),
        seen.over_running(_or(readings.health, 1.0, xp), xp) / some,
        seen.over_running(seen.trend, xp) / some,
        _squash(worth, xp),
        _over_seeds(xp.asarray(readings.held)[:, :, 1]),
    ]
    shares = seen.counts / seen.stages.shape[1]
    parts = [kinds.astype(xp.float32), sizes, xp.stack(places, axis=1), shares]
    features = xp.concatenate([*parts, xp.stack(kernels, axis=1)], axis=1)
    return xp.where(there[:, None], features, 0.0)


def _seeds(readings: Readings, seen: _Seen, xp: Any) -> Any:
    worth = xp.asarray(readings.worth)
    known = xp.isfinite(worth)
    half = _or(readings.worth_half, 0.0, xp)
    value = xp.where(known, worth, 0.0)
    columns = [
        xp.asarray(readings.alpha),
        _or(readings.health, 0.0, xp),
        seen.trend,
        _squash(value / seen.loss, xp),
        _squash(half / seen.loss, xp),
        xp.tanh(value / (half + _TINY)),
        known.astype(xp.float32),
        xp.log1p(readings.age),
    ]
    return xp.concatenate(
        [seen.stages, xp.stack(columns, axis=-1), xp.asarray(readings.held)], axis=-1
    )


def _over_seeds(values: Any) -> Any:
    """The sum of `[nodes, seeds, ...]` over seeds: numpy is slow over an axis that is short."""
    each = [values[:, seed] for seed in range(values.shape[1])]
    return sum(each[1:], each[0])


def _count(where: Any, xp: Any) -> Any:
    return xp.sum(where.astype(xp.float32))


def _or(values: Any, other: float, xp: Any) -> Any:
    return xp.where(xp.isfinite(values), values, other)


def _log(values: Any, xp: Any) -> Any:
    """The logarithm, and NaN of what is not finite."""
    values = xp.asarray(values)
    fine = xp.isfinite(values)
    return xp.where(fine, xp.log(xp.maximum(xp.where(fine, values, 1.0), _TINY)), xp.nan)


def _squash(values: Any, xp: Any) -> Any:
    return xp.sign(values) * xp.log1p(4.0 * xp.abs(values))


def _bounded(features: Any, xp: Any) -> Any:
    """What is not known, or not finite, is 0: the flags tell."""
    return xp.asarray(xp.clip(_or(features, 0.0, xp), -BOUND, BOUND), dtype=xp.float32)
