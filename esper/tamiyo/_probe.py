"""What a layer saw on some training examples: for triggers and initialisations."""

import dataclasses

import numpy as np

from esper.tamiyo.graph import FOLLOWED, MOST_ROWS, follows

_LEAST_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Probe:
    """A layer's input, its output as it runs, and the gradient of the loss by that output.

    The loss is the mean over `examples` training examples, drawn by the run's seed and the step
    alone. Kernels that run have their part in the output and none of their own here.
    """

    inputs: np.ndarray
    """f32 `[examples, *in]`."""
    outputs: np.ndarray
    """f32 `[examples, *out]`."""
    gradients: np.ndarray
    """f32 `[examples, *out]`: of the mean loss, so each is of the order of 1 / examples."""
    loss: float

    @property
    def examples(self) -> int:
        """How many examples."""
        return len(self.inputs)


def probe_follows(probe: Probe, kind: str) -> np.ndarray:
    """How much of the gradient maps of what the layer takes follow, f32 `[2]`; see `follows`.

    Positions of sequences are rows of their own, at most `MOST_ROWS`, evenly drawn; of what
    convolves or changes positions, an example is one. NaN where there is nothing to fit, such as
    of numbers of tokens.

    Args:
        kind: of the layer, one of `esper.tamiyo.graph.KINDS`.
    """
    x, g = probe.inputs, probe.gradients
    if not (np.issubdtype(x.dtype, np.floating) and x.size and g.size):
        return np.full(len(FOLLOWED), np.nan, np.float32)
    if x.shape[:-1] == g.shape[:-1] and kind != "convolution":
        x, g = (own.reshape(-1, own.shape[-1]) for own in (x, g))
    else:
        x, g = (own.reshape(len(own), -1) for own in (x, g))
    if len(x) < _LEAST_ROWS:
        return np.full(len(FOLLOWED), np.nan, np.float32)
    if len(x) > MOST_ROWS:
        rows = np.linspace(0, len(x) - 1, MOST_ROWS).astype(np.int64)
        x, g = x[rows], g[rows]
    with np.errstate(all="ignore"):
        return follows(x, g, np)
