"""From a network in training to the measurements that rewards are computed from."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from esper.errors import InputError
from esper.tamiyo import Cost
from esper.tolaria._trainee import Place, Trainee
from esper.tolaria.worth._components import Measurements
from esper.tolaria.worth._costs import memory_bytes
from esper.tolaria.worth._removal import PARTS, part_losses
from esper_functional import running_seeds


@dataclasses.dataclass(frozen=True)
class Reference:
    """The bare host at the run's beginning: what measurements are divided by."""

    loss: float
    """Mean validation loss."""
    cost: Cost
    memory: int
    """Bytes."""
    latency: float | None = None
    """Of a forward pass, in µs; None where it is not measured."""


def reference(
    trainee: Trainee,
    *,
    split: str = "validation",
    memory: int | None = None,
    latency: float | None = None,
) -> Reference:
    """What a dormant network costs and how well it does.

    Args:
        memory: bytes of its parameters and moments; by default those there are, which are too few
            before the first step on a backend that makes moments then.
        latency: of a forward pass, in µs.

    Raises:
        InputError: where kernels run already, or the loss is not finite and greater than 0.
    """
    running = running_seeds(trainee.seeds)
    if running:
        raise InputError(
            "a reference is of the bare host, and kernels run at"
            f" {', '.join(map(str, running))}: take it before the first graft"
        )
    loss = float(part_losses(trainee, split, [()], 1)[0, 0])
    if not (np.isfinite(loss) and loss > 0.0):
        raise InputError(
            f"the host's {split} loss is {loss}, and measurements are divided by it: it must be"
            " finite and greater than 0. Take the reference at the run's beginning"
        )
    held = memory_bytes(trainee.snapshot()) if memory is None else memory
    return Reference(loss, trainee.cost(), held, latency)


def measure(
    trainee: Trainee,
    start: Reference,
    *,
    without: Collection[Place] = (),
    cost: Cost | None = None,
    memory: int | None = None,
    latency: float | None = None,
    outputs: np.ndarray | None = None,
    outputs_of_host: np.ndarray | None = None,
    train_losses: Sequence[float] = (),
    rollbacks: int = 0,
    faults: int = 0,
    vetoes: int = 0,
    worth_spread_of_seeds: float = 0.0,
    parts: int = PARTS,
    split: str = "validation",
) -> Measurements:
    """What is known of a network now, in units of the bare host at the run's beginning.

    Args:
        without: kernels that are taken as absent; with `cost` and `memory` as they would be, so
            that one step gives what a decision is compared with.
        cost: by default the network's as it is.
        memory: bytes; by default those of its parameters and moments as they are.
        latency: of a forward pass, in µs; None leaves it out.
        outputs: on held-out data, as the network is.
        outputs_of_host: on the same data, with no kernel running; novelty is 0 without the two.
        train_losses: of the steps since the last boundary.
        rollbacks: since the run began, as are `faults` and `vetoes`.
        worth_spread_of_seeds: standard deviation of the kernels' worth over runs of other seeds.
        parts: of the held-out data, over which the spread of worth is taken.

    Raises:
        InputError: for outputs of two shapes, or a latency where the reference has none.
    """
    if latency is not None and start.latency is None:
        raise InputError(
            "a latency is divided by the host's, and the reference has none: give `reference` the"
            " host's `latency`"
        )
    running = running_seeds(trainee.seeds)
    losses = part_losses(trainee, split, [tuple(without), tuple(running)], parts) / start.loss
    recent = np.asarray(train_losses, np.float64)
    with np.errstate(invalid="ignore"):  # of infinite losses, whose differences are NaN
        worth = losses[1] - losses[0]
        spread = float(worth.std(ddof=1)) if len(worth) > 1 else 0.0
        mean = float(recent.mean()) if len(recent) else 0.0
        # Losses whose mean is 0 have no spread in its units: they are all 0, or no losses.
        loss_spread = float(recent.std()) / abs(mean) if mean else 0.0
    now = trainee.cost() if cost is None else cost
    held = memory_bytes(trainee.snapshot()) if memory is None else memory
    if outputs is None or outputs_of_host is None:
        novelty = 0.0
    else:
        novelty = output_distance(outputs, outputs_of_host)
    return Measurements(
        loss=float(losses[0].mean()),
        flops=now.flops / start.cost.flops,
        latency=1.0 if latency is None or start.latency is None else latency / start.latency,
        memory=held / start.memory,
        parameters=now.parameters / start.cost.parameters,
        loss_spread=loss_spread,
        rollbacks=float(rollbacks),
        faults=float(faults),
        vetoes=float(vetoes),
        novelty=novelty,
        worth=float(worth.mean()),
        worth_spread=spread,
        worth_spread_of_seeds=worth_spread_of_seeds,
    )


def output_distance(outputs: np.ndarray, others: np.ndarray) -> float:
    """How differently two networks behave: |a - b| / (|a| + |b|), in [0, 1].

    0 for equal outputs, 1 where one is the opposite of the other or zero; symmetric, and without a
    unit. By the triangle inequality it is never more than 1.

    Raises:
        InputError: for outputs of two shapes.
    """
    if outputs.shape != others.shape:
        raise InputError(
            f"outputs of shapes {outputs.shape} and {others.shape} cannot be compared: give those"
            " of the same examples"
        )
    a, b = outputs.astype(np.float64), others.astype(np.float64)
    size = float(np.sqrt((a * a).sum()) + np.sqrt((b * b).sum()))
    return float(np.sqrt(((a - b) ** 2).sum())) / size if size > 0.0 else 0.0
