"""A last linear map of zeros: the graft changes nothing until its first step."""

import numpy as np

from esper.artifacts import Artifact
from esper.tolaria.initialisations._anatomy import anatomy_of
from esper.tolaria.initialisations._parameters import compiled, silenced


def zero_output(artifact: Artifact) -> dict[str, np.ndarray]:
    """The artifact's parameters with the last linear map zero, offsets too.

    The output is exactly 0 for every finite input, so that the network computes what it did, at any
    alpha under `residual` and at alpha 0 under the other blends. The last map learns from the first
    step on and what lies before it from the second. Chen, Goodfellow and Shlens, Net2Net, ICLR
    2016, arXiv:1511.05641 (function preservation); Zhang, Dauphin and Ma, Fixup Initialization,
    ICLR 2019, arXiv:1901.09321 (the last layer of each residual branch starts at 0).

    Raises:
        InputError: for a kernel whose output is linear in the parameters of no one map.
    """
    return silenced(compiled(artifact), anatomy_of(artifact, "zero_output").last)
