"""A trigger: the gradient that new neurons would get, against what the host's weights get."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo._controller import Observation
from esper.tamiyo._places import free_seeds
from esper.tamiyo._probe import Probe
from esper.tamiyo._trigger import Cue

_RANK_OF_SEQUENCES = 3


class GradientBottleneckTrigger:
    """Fires for the layer where a new weight would get most gradient, against the host's own.

    For a layer with inputs x and gradients g of the loss by its outputs let

        M = E[g xᵀ], with singular values s_1 >= s_2 >= ...

    over examples, and over positions where the data are sequences.

    GradMax (Evci et al., ICLR 2022) adds k neurons whose weights on one side are zero, so that
    the network stays the function that it is, and finds those on the other side for which the
    gradient of the zero ones is largest: orthonormal outgoing weights along the first k left
    singular vectors of M, by which the squared gradient norm is s_1² + ... + s_k². There M joins
    two layers, with a layer between them that is widened. A kernel here reads what its layer
    reads and adds to what that gives, so both x and g are of one layer.

    Of a linear layer M is then the gradient of its own weights, and no k neurons can get more
    than it has: what differs is by how many weights it is shared. The score compares the
    squared gradient per weight, of the k · (in + out) that k neurons have and of all weights of
    the layers that are asked, which are those with a free seed and candidates:

        score = (s_1² + ... + s_k²) / (k · (in + out))  /  (Σ ‖M‖² / Σ in · out)

    so 1 is what the host's weights have on average, and it is large where the gradient is large
    for a layer's size and points in few directions. One layer alone is between
    max(in, out) / (in + out), an even spectrum, and in · out / (k · (in + out)), at most k
    directions. Without a gradient, rounding apart, there is no cue.

    TINY (Verbockhaven et al., TMLR 2024) asks another question: its expressivity bottleneck is
    the part of g that no change of the layer's own weights can follow, the residual of a least
    squares fit of g by x. What is left is uncorrelated with x, so M of it is zero, and only
    features other than x (of the layer before, or through a non-linearity) can follow it. A
    low score here therefore does not say that a layer has no such bottleneck.

    Each of them costs a forward and a backward pass at every boundary.

    Args:
        neurons: k, from 1; where a layer has fewer singular values, all of them count.
        threshold: the score above which it fires, from 0.

    Raises:
        InputError: for values out of range, and for a layer that is not linear by its shapes.
    """

    def __init__(self, *, neurons: int = 1, threshold: float = 1.0) -> None:
        require("neurons of the gradient bottleneck trigger", neurons, 1, whole=True)
        require("threshold of the gradient bottleneck trigger", threshold, 0)
        self._neurons = neurons
        self._threshold = threshold

    def cue(self, observation: Observation) -> Cue | None:
        """See `Trigger.cue`."""
        layers = list(free_seeds(observation))
        gradients = {
            layer: _weight_gradient(observation.probe(layer), observation.sites[layer])
            for layer in layers
        }
        scores = gradient_scores(gradients, self._neurons)
        if not scores:
            return None
        best = max(layers, key=scores.__getitem__)  # of equals, the one that is preferred
        if not scores[best] > self._threshold:
            return None
        reason = (
            f"{self._neurons} new neuron{'s' if self._neurons > 1 else ''} in"
            f" {observation.sites[best]} would get"
            f" {scores[best]:.4g} times the squared gradient per weight that the host has,"
            f" above {self._threshold:g}"
        )
        return Cue(reason, best, scores[best])

    def reset(self) -> None:
        """See `Trigger.reset`: it measures the network as it is."""

    def state(self) -> dict[str, Any]:
        """See `Trigger.state`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trigger.restore`."""


def gradient_scores(gradients: Mapping[int, np.ndarray], neurons: int) -> dict[int, float]:
    """The score of each layer, from 0; see `GradientBottleneckTrigger`.

    Args:
        gradients: f64 `[out, in]` by layer row: M.
        neurons: k.

    Returns:
        Nothing where the gradients are all zero, or not finite.
    """
    energy = sum(float(np.sum(np.square(m))) for m in gradients.values())
    if not (np.isfinite(energy) and energy > 0.0):
        return {}
    per_weight = energy / sum(m.size for m in gradients.values())
    scores: dict[int, float] = {}
    for layer, m in gradients.items():
        k = min(neurons, *m.shape)
        strongest = np.linalg.svd(m, compute_uv=False)[:k]
        scores[layer] = float(np.sum(np.square(strongest))) / (k * sum(m.shape)) / per_weight
    return scores


def _weight_gradient(probe: Probe, site: str) -> np.ndarray:
    """M, f64 `[out, in]`: positions of sequences are examples."""
    x, g = np.asarray(probe.inputs), np.asarray(probe.gradients)
    if x.shape[:-1] != g.shape[:-1] or not 2 <= x.ndim <= _RANK_OF_SEQUENCES:
        raise InputError(
            "the gradient bottleneck trigger needs layers that take `[examples, in]` or"
            f" `[examples, positions, in]` and change the last axis alone; {site} takes"
            f" {list(x.shape)} and gives {list(g.shape)}: leave it out of the layers that may"
            " grow, or choose another trigger"
        )
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    g = g.reshape(-1, g.shape[-1]).astype(np.float64)
    m = g.T @ x
    # Where the host is at rest, M is what rounding has left of terms that cancel.
    rounding = np.finfo(np.float32).eps * np.linalg.norm(g) * np.linalg.norm(x)
    return np.where(np.linalg.norm(m) <= rounding, 0.0, m)
