"""How the models of a framework are taken apart and put together, and what is known of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_adapters._functional import Call, FunctionalModel
from esper_adapters._graft import Blending, Graft
from esper_functional import Live, Plan


class Signature(NamedTuple):
    """What a site's layer takes and returns, with whatever leading axes it was called with."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_dtype: Any
    dtype: Any
    """Of what it returns."""
    whole: bool = False
    """Whether the shapes are those of a call, batch and all, or those of their last axes."""
    alone: bool = True
    """Whether it takes one array and returns one."""


class Linear(NamedTuple):
    """The weights of a linear layer, in numpy."""

    weight: np.ndarray
    """`[out, in]`."""
    bias: np.ndarray | None


Probed = tuple[Any, tuple[jax.Array, ...]]
"""A network's output, and for each running kernel whether it failed."""


class Stripped(NamedTuple):
    """A network taken apart."""

    host: Any
    kernels: dict[str, Mapping[int, Any]]
    """Parameters by layer and seed."""
    blending: dict[str, Blending]
    """By layer."""


class Surgery(NamedTuple):
    """How the models of one framework are taken apart and put together."""

    framework: str
    layers: Callable[[Any], dict[str, Any]]
    """All layers of a bare host, by path."""
    signature: Callable[[Any], Signature | None]
    """What a layer takes and returns, where its weights say so."""
    stacked: Callable[[Any], bool]
    """Whether a layer is several in one, stacked for a scan or a map over layers."""
    graft: Callable[[Any, Mapping[str, Graft]], Any]
    """The network with grafted layers, for a host; never the host's own mutable parts."""
    strip: Callable[[Any], Stripped]
    """A network's host, and what its grafted layers hold."""
    grafted: Callable[[Any], dict[str, Any]]
    """The layers of a network by path, grafted ones as such."""
    structure: Callable[[Any], tuple[Any, dict[str, str]]]
    """What two networks of one plan have equal: whatever is static, and each array's kind."""
    functional: Callable[[Any, Sequence[str], Call | None], FunctionalModel]
    """The flat form of a host with sites."""
    probe: Callable[[Any, tuple[str, ...], Plan, Live | None, tuple[Any, ...], Call | None], Probed]
    """One compiled forward pass of a host with sites, by `call` or as the framework's models are
    called: its output, and whether each running kernel failed, in its shadow if it incubates."""
    linear: Callable[[Any], Linear | None]
    """The weights of a linear layer; None for another."""
    with_linear: Callable[[Any, str, Linear], Any]
    """A host with other weights in one linear layer."""
    plain: Callable[[Any, Mapping[str, Graft], Mapping[str, Signature]], Any]
    """A host with some layers in their grafted form, by means of jax and the framework alone."""
    mutable: bool
    """Whether models are graphs of objects that change in place: one layer at several paths is
    one layer. In trees it is several."""
