"""The backends agree on a life with a graft, a ramp, an incubation and a fossil."""

from typing import Any

import numpy as np
import pytest

from esper.artifacts import Artifact
from esper.tolaria._trainee import Optimisation, Rates
from esper_functional import Event, EventKind, state_digest
from tests.esper.trainee_life import BATCH, Make, flat, graft, train
from tests.tolerance import assert_close

PARITY: tuple[Optimisation, ...] = (
    Optimisation(),
    Optimisation("adamw", weight_decay=0.05),
    Optimisation("sgd", momentum=0.9, weight_decay=0.01),
    Optimisation("sgd", clip_norm=0.1),
    Optimisation(ema_decay=0.9, accumulate=2),
)
"""The ways to train that are compared."""
RATES = Rates(0.003, {})


def the_backends_agree(
    make: Make, other: Make, artifact: Artifact, optimisation: Optimisation
) -> None:
    """Losses of 50 steps, what is judged, what is probed, and what trained, by the one table.

    Costs are counted by each framework in its own way, and agree in parameters alone.
    """
    ours, theirs = (_life(own(optimisation=optimisation), artifact) for own in (make, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, (np.ndarray, np.generic)):
            assert_close(value, theirs[name])
        else:
            assert value == pytest.approx(theirs[name]), name


def _life(own: Any, artifact: Artifact) -> dict[str, Any]:
    losses = [train(own, 0, 5, RATES)]
    graft(own, artifact, step=5, seed=2, ramp=20)
    graft(own, artifact, step=5, seed=0, incubate=True)
    losses.append(train(own, 5, 30, Rates(0.003, {0: 0.001})))
    own.apply(Event(30, 0, 2, EventKind.FOSSILIZE))
    losses.append(train(own, 30, 50, RATES))
    judged = own.evaluate("test")
    seen = own.probe(0, BATCH)
    variants = [(), [(0, 2)]]
    shot = own.snapshot()
    return {
        "losses": np.frombuffer(b"".join(losses), np.float32),
        "loss": np.float32(judged.loss),
        "accuracy": judged.accuracy,
        "health": judged.health,
        "without": own.losses_without("validation", variants, parts=3),
        "inputs": seen.inputs,
        "outputs": seen.outputs,
        "gradients": seen.gradients,
        "probe": np.float32(seen.loss),
        "predictions": own.predict(np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)),
        "seeds": state_digest(own.seeds),
        "parameters": own.cost([artifact]).parameters,
        **flat({part: shot[part] for part in ("host", "kernels")}),
    }
