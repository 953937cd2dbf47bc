"""A kernel that begins where the loss would have the layer's output go.

The kernel's last linear map is fitted by least squares to the negative gradient of each example's
loss by the layer's output: Friedman, Greedy Function Approximation: A Gradient Boosting Machine,
Annals of Statistics 29(5), 2001 (algorithm 1: least squares on the negative gradient, then a length
of step); Fahlman and Lebiere, The Cascade-Correlation Learning Architecture, NIPS 1990, whose new
units are fitted to what error is left before they are connected.

Friedman finds the length of the step by a search along the line, which needs the loss at other
points. A probe has it at one, so the length is Polyak's (Introduction to Optimization, 1987): as
long as it takes for the loss, if it went on falling as it begins to, to fall by the share `scale`
of itself. No longer, though, than that the kernel's output is `scale` times as large as what the
layer's output varies by: the gradient tells nothing of what is far.
"""

from collections.abc import Mapping

import numpy as np

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.tamiyo import Probe
from esper.tolaria.initialisations._anatomy import DENSE, Anatomy, anatomy_of
from esper.tolaria.initialisations._linear_map import fitted
from esper.tolaria.initialisations._parameters import compiled, silenced, with_roles
from esper.tolaria.initialisations._variance_transfer import variance
from esper_functional import Blend


def residual_fit(
    artifact: Artifact, probe: Probe, scale: float, blend: Blend
) -> dict[str, np.ndarray]:
    """The artifact's parameters with its last linear map fitted, and the rest as compiled.

    Under `residual` the kernel is a step k = -ρ·g of gradient descent in the layer's output. Under
    `convex` and `sequential`, where it takes the place of h as alpha grows, it is h - ρ·g, fitted
    likewise. Either way the loss does not rise with alpha at 0, by the numbers of the probe. Where
    the gradient is zero, or what the kernel computes has nothing in common with it, the step is 0
    long: under `residual` the last map is zero.

    Raises:
        InputError: for a kernel whose output is linear in the parameters of no one map, or, under
            `convex` and `sequential`, one so unlike the layer that its place is better left as is.
    """
    anatomy = anatomy_of(artifact, "residual_fit")
    params = compiled(artifact)
    # A sum of a mean: times the examples, each gradient is that of its own example's loss.
    step, map_of_step = _fit(anatomy, params, probe, -probe.gradients * np.float32(probe.examples))
    fall = max(0.0, -_first_order(probe, step))
    if blend == "residual":
        if not fall > 0.0:
            return silenced(params, anatomy.last)
        length = _length(artifact, probe, scale, step, fall, 0.0)
        return with_roles(params, anatomy.last, _scaled(map_of_step, length))
    same, map_of_same = _fit(anatomy, params, probe, probe.outputs)
    misfit = _first_order(probe, same - probe.outputs)
    length = _length(artifact, probe, scale, step, fall, misfit) if fall > 0.0 else 0.0
    if length * fall < misfit:
        raise InputError(
            "initialisation 'residual_fit' would raise the loss: under blend"
            f" {blend!r} the kernel takes the layer's place, and kernel {artifact.kernel_id[:12]}"
            f" computes it so badly that the loss would rise by {misfit:.3g} a unit of alpha, where"
            f" the step that is allowed lowers it by {length * fall:.3g}. Take blend 'residual',"
            " 'zero_output', or a kernel that can compute more"
        )
    both = {role: map_of_same[role] + length * map_of_step[role] for role in map_of_same}
    return with_roles(params, anatomy.last, both)


def _length(
    artifact: Artifact, probe: Probe, scale: float, step: np.ndarray, fall: float, misfit: float
) -> float:
    """The length of the step, at least 0.

    Args:
        step: what the kernel gives at length 1.
        fall: of the loss, to first order, at length 1; greater than 0.
        misfit: by how much the loss rises before there is a step.
    """
    size = float(np.sqrt(np.mean(step.astype(np.float64) ** 2)))
    spread = np.sqrt(variance(probe.outputs, artifact))
    if not spread > 0.0:
        # The output of one example, or of a layer that is constant, does not vary: its size then.
        spread = float(np.sqrt(np.mean(probe.outputs.astype(np.float64) ** 2)))
    bounds = [scale * spread / size] if spread > 0.0 else []
    if probe.loss > 0.0:
        bounds.append((scale * probe.loss + misfit) / fall)
    return max(0.0, min(bounds, default=scale))


def _first_order(probe: Probe, change: np.ndarray) -> float:
    """By how much the loss rises, to first order, when the layer's output changes so."""
    return float((probe.gradients.astype(np.float64) * change).sum())


def _scaled(roles: Mapping[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    return {role: value * factor for role, value in roles.items()}


def _fit(
    anatomy: Anatomy, params: Mapping[str, np.ndarray], probe: Probe, target: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the kernel gives with its last map fitted to a target, and that map by role."""
    last = anatomy.last
    features = anatomy.value(anatomy.features, params, probe.inputs)
    plain = dict(params)
    if last.op.kind not in DENSE:
        ones = {role: np.full(params[name].shape, role == "weight", np.float32)
                for role, name in last.params.items()}  # fmt: skip
        plain = with_roles(params, last, ones)
    gain = anatomy.squared_gain(params)
    goal = np.divide(
        anatomy.pull_back(params, target), gain, out=np.zeros(target_shape(anatomy, target)),
        where=gain > 0,
    )  # fmt: skip
    standardised = anatomy.last_alone(plain, features)
    weight_shape = params[last.params["weight"]].shape
    roles = fitted(last, weight_shape, features, standardised, goal)
    return anatomy.run(with_roles(params, last, roles), probe.inputs), roles


def target_shape(anatomy: Anatomy, target: np.ndarray) -> tuple[int, ...]:
    """Of a target for the last map."""
    return (len(target), *anatomy.last.output_shape)
