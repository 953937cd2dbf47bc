"""How large each layer's parameters are, and how strongly the loss asks them to change."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class SiteNorms(NamedTuple):
    """L2 norms over the host's own parameters of each layer with seeds, by row.

    Kernels have no part in them. A layer without parameters has 0; what is not finite is handed on.
    """

    gradient: Float[np.ndarray, " sites"]
    """f32: of the gradient of the mean loss by those parameters."""
    weight: Float[np.ndarray, " sites"]
    """f32: of the parameters themselves."""
