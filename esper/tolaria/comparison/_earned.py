"""What a run earned, by the weights that policies are trained with."""

import math

from esper.tolaria.comparison._outcome import Curve, Setting
from esper.tolaria.worth import GROWTH_WEIGHTS, RENT


def earned(setting: Setting, curve: Curve, parameters: int | None) -> float | None:
    """Accuracy, speed and memory at a run's end, as potentials of rewards, less the rent.

    See `REWARD_COMPONENTS` and `GROWTH_WEIGHTS`; the loss is that on test data, over the one before
    the first step, and memory is taken from parameters. Differences between arms of one seed are
    rewards, for what the host alone comes to falls out.

    Returns:
        None where something was not recorded or is not finite.
    """
    bare, losses = setting.host_step_flops, curve.test_loss
    if not bare or not setting.host_parameters or parameters is None or len(curve.steps) < 2:
        return None
    if losses[0] is None or losses[-1] is None or losses[0] <= 0.0 or None in curve.flops:
        return None
    flops = [own for own in curve.flops if own is not None]
    spans = [b - a for a, b in zip(curve.steps[:-1], curve.steps[1:], strict=True)]
    sizes = [(b - a) / span / bare for a, b, span in zip(flops[:-1], flops[1:], spans, strict=True)]
    rent = sum(s * math.log2(max(1.0, z)) for s, z in zip(spans, sizes, strict=True)) / sum(spans)
    gains = {
        "accuracy": 1.0 / (1.0 + losses[-1] / losses[0]),
        "speed": 1.0 / (1.0 + sizes[-1]),
        "memory": 1.0 / (1.0 + parameters / setting.host_parameters),
    }
    return sum(GROWTH_WEIGHTS[name] * gain for name, gain in gains.items()) - RENT * rent
