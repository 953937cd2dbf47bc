"""A kernel's output as varied as the output of the layer that it is blended into.

Yuan, Savarese and Maire, Accelerated Training via Incrementally Growing Neural Networks using
Variance Transfer and Learning Rate Adaptation, NeurIPS 2023, arXiv:2306.12700. Their networks grow
wider, and they choose the scale of new weights, and rescale old ones, so that the variance of what
each layer gives stays what it was.

What of it applies to a graft: the new weights' scale is chosen by the variance of what is there.
What does not: the rescaling of old weights (a graft leaves the host's as they are; its blend weighs
both), the pairs of neurons with opposite signs that keep the function (alpha keeps it), and the
learning rate of each part of the network (that is the trainer's `Rates`). They scale by counts of
neurons, which say what the variance is at initialisation; here it is measured, because what a
trained layer gives is no longer that.
"""

import numpy as np

from esper.artifacts import Artifact
from esper.tamiyo import Probe
from esper.tezzeret import read_blueprint
from esper.tolaria.initialisations._anatomy import DENSE, anatomy_of
from esper.tolaria.initialisations._parameters import compiled, with_roles


def variance_transfer(
    artifact: Artifact, probe: Probe, random: np.random.Generator, scale: float
) -> dict[str, np.ndarray]:
    """The artifact's parameters with its last linear map scaled.

    The variance of the kernel's output on the probe, over examples and positions and in the mean
    over features, is `scale²` times that of the layer's. A last map that was compiled as zeros is
    drawn first, by PyTorch's default, uniform in ±1/√inputs (factors of each feature are 1);
    offsets are 0. Where either variance is 0, as with one example, no factor would do and the map
    is zero.

    Raises:
        InputError: for a kernel whose output is linear in the parameters of no one map.
    """
    anatomy = anatomy_of(artifact, "variance_transfer")
    last, params = anatomy.last, compiled(artifact)
    weight = params[last.params["weight"]].astype(np.float64)
    if last.op.kind in DENSE:
        # Drawn in any case, so that what is drawn later does not depend on the kernel.
        bound = np.prod(weight.shape[1:]) ** -0.5
        drawn = random.uniform(-bound, bound, weight.shape)
    else:
        drawn = np.ones_like(weight)
    weight = weight if weight.any() else drawn
    roles = {"weight": weight}
    if "bias" in last.params:
        roles["bias"] = np.zeros(params[last.params["bias"]].shape)
    params = with_roles(params, last, roles)
    own = variance(anatomy.run(params, probe.inputs), artifact)
    there = variance(probe.outputs, artifact)
    factor = scale * np.sqrt(there / own) if own > 0.0 else 0.0
    return with_roles(params, last, {"weight": weight * factor})


def variance(values: np.ndarray, artifact: Artifact) -> float:
    """Over examples and positions, in the mean over features.

    The features of an example are its last axis, and the first of an image, and of a signal.
    """
    axis = feature_axis_of(values, artifact)
    rows = np.moveaxis(values.astype(np.float64), axis, -1).reshape(-1, values.shape[axis])
    # The variance of equal numbers is 0, and not what rounding leaves of it.
    spread = np.where(np.ptp(rows, axis=0) > 0, rows.var(axis=0), 0.0)
    return float(spread.mean())


def feature_axis_of(values: np.ndarray, artifact: Artifact) -> int:
    """Where a batch of a kernel's outputs has its features."""
    if artifact.blueprint is None or values.ndim < 3:
        return -1
    blueprint = read_blueprint(artifact.blueprint, "the artifact's blueprint")
    return -1 if "sequence" in blueprint.takes and values.ndim == 3 else 1
