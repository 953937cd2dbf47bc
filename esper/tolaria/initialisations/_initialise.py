"""The initialisations by name."""

import difflib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.tamiyo import Probe
from esper.tolaria.initialisations._gradmax import gradmax
from esper.tolaria.initialisations._parameters import compiled
from esper.tolaria.initialisations._residual_fit import residual_fit
from esper.tolaria.initialisations._variance_transfer import variance_transfer
from esper.tolaria.initialisations._zero_output import zero_output
from esper_functional import Blend
from esper_functional import check_blend as _check_blend


class Initialisation(NamedTuple):
    """One way to find a kernel's first parameters."""

    summary: str
    source: str
    preserves: bool
    """Whether the graft leaves the network's output as it was, bit for bit: at any alpha under
    `residual`, and at alpha 0 under `convex` and `sequential`."""
    scale: str
    """What `scale` multiplies."""


INITIALISATIONS: Mapping[str, Initialisation] = MappingProxyType(
    {
        "as_compiled": Initialisation(
            "the artifact's own parameters", "its blueprint", False, "nothing"
        ),
        "zero_output": Initialisation(
            "the last linear map is zero",
            "Chen et al., Net2Net, 2016; Zhang et al., Fixup Initialization, 2019",
            True,
            "nothing",
        ),
        "gradmax": Initialisation(
            "a hidden map of zeros before the last map that makes its gradient largest",
            "Evci et al., GradMax, 2022",
            True,
            "the norm of the last map, √(outputs / 3)",
        ),
        "residual_fit": Initialisation(
            "the last linear map fitted to the negative gradient of the loss",
            "Friedman, Greedy Function Approximation, 2001; Fahlman and Lebiere, 1990",
            False,
            "the share of the loss, and of the layer's spread, that bounds the step",
        ),
        "variance_transfer": Initialisation(
            "the last linear map scaled, so that the output varies as the layer's does",
            "Yuan et al., Variance Transfer and Learning Rate Adaptation, 2023",
            False,
            "the standard deviation",
        ),
    }
)
"""By name, in the order in which they are told of."""


def initialise(
    name: str,
    artifact: Artifact,
    probe: Probe | None,
    *,
    random: np.random.Generator,
    scale: float = 1.0,
    blend: Blend = "residual",
) -> dict[str, np.ndarray]:
    """The parameters with which a kernel is grafted, from what its layer sees.

    Equal arguments, and a `random` in the same state, give equal bits; which backend trains the
    kernel has no part in it. The artifact is left as it is.

    Args:
        name: one of `INITIALISATIONS`.
        probe: what the layer sees; None for `as_compiled` and `zero_output`, which ask nothing.
        random: for what is drawn, by `variance_transfer` alone.
        scale: greater than 0; see `Initialisation.scale`.
        blend: the layer's; `residual_fit` fits something else under `convex`.

    Returns:
        Every parameter by its name in the artifact, in the artifact's shapes and dtype.

    Raises:
        InputError: for an unknown name, a scale that is none, a probe of another layer or with
            values that are not finite, or a kernel for which the initialisation does not exist.
        BlendError: for an unknown blend.
    """
    if name not in INITIALISATIONS:
        near = difflib.get_close_matches(str(name), INITIALISATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"unknown initialisation {name!r}: expected one of {', '.join(INITIALISATIONS)}{hint}"
        )
    if not (isinstance(scale, float | int) and math.isfinite(scale) and scale > 0):
        raise InputError(f"`scale` must be a finite number greater than 0, got {scale!r}")
    _check_blend(blend)
    if name == "as_compiled":
        return compiled(artifact)
    if name == "zero_output":
        return zero_output(artifact)
    if probe is None:
        raise InputError(
            f"initialisation {name!r} needs a probe of the layer: give what `Trainee.probe` returns"
        )
    _check_probe(name, artifact, probe)
    if name == "gradmax":
        params = gradmax(artifact, probe, float(scale))
    elif name == "residual_fit":
        params = residual_fit(artifact, probe, float(scale), blend)
    else:
        params = variance_transfer(artifact, probe, random, float(scale))
    for parameter, value in params.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise InputError(
                f"initialisation {name!r} gave values that are not finite for parameter"
                f" {parameter!r} of kernel {artifact.kernel_id[:12]}: the probe's values are too"
                " large for its arithmetic. Take 'zero_output', or a smaller `scale`"
            )
    return params


def _check_probe(name: str, artifact: Artifact, probe: Probe) -> None:
    signature = artifact.manifest.signature
    wanted = {
        "inputs": (probe.examples, *signature.input_shape),
        "outputs": (probe.examples, *signature.output_shape),
        "gradients": (probe.examples, *signature.output_shape),
    }
    if probe.examples < 1:
        raise InputError(f"initialisation {name!r} needs a probe of at least one example, got none")
    for part, shape in wanted.items():
        values = getattr(probe, part)
        if values.shape != shape:
            raise InputError(
                f"the probe's {part} have shape {values.shape}, and kernel"
                f" {artifact.kernel_id[:12]} ({signature}) needs {shape}: probe the layer that the"
                " kernel is for"
            )
        bad = int(np.size(values) - np.isfinite(values).sum())
        if bad:
            raise InputError(
                f"initialisation {name!r} was given a probe in which {bad} of {values.size} values"
                f" of its {part} are not finite: the network has diverged; go back, or take"
                " 'zero_output'"
            )
    if not math.isfinite(probe.loss):
        raise InputError(
            f"initialisation {name!r} was given a probe whose loss is {probe.loss}: the network has"
            " diverged; go back, or take 'zero_output'"
        )
