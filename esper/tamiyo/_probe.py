"""What a layer saw on some training examples: for triggers and initialisations."""

import dataclasses

import numpy as np


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
