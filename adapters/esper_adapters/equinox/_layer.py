"""A layer with the kernels that run on it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax

from esper_adapters._graft import Anatomy, Blending, Graft, Shadow, run_graft


def is_stateful(layer: Any) -> bool:
    """Whether a layer is called with a state, and returns the next."""
    return isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful()


class GraftedLayer(eqx.nn.StatefulLayer):
    """Any Equinox layer, its output blended with its running kernels'.

    Takes and returns what its host does: one example, of which the kernels see the first
    argument. Blend weights and failure counts are data that no gradient reaches; `trainable`
    tells them from parameters. What it has no attribute for, its host is asked for.
    """

    esper_host: Any
    """The layer itself."""
    esper_kernels: dict[int, Any]
    """Parameters of the running kernels, by seed."""
    esper_blending: Blending
    esper_shadows: tuple[Shadow, ...]
    esper_anatomy: Anatomy = eqx.field(static=True)

    def is_stateful(self) -> bool:
        """Whether `eqx.nn.Sequential` gives it a state: where it does its host."""
        return is_stateful(self.esper_host)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the host returns, grafted."""
        result = self.esper_host(*args, **options)
        return run_graft(
            self.esper_anatomy, self.esper_kernels, self.esper_blending, result, args, options
        )

    def __getattr__(self, name: str) -> Any:
        # Called for what is not found: before the fields are there, that is all of them.
        if name.startswith(("_", "esper_")):
            raise AttributeError(name)
        return getattr(self.esper_host, name)


def shadow_layer(layer: GraftedLayer, nth: int) -> GraftedLayer:
    """As it is while the model's nth incubating kernel is at alpha 1."""
    shown = layer.esper_shadows[nth]
    return dataclasses.replace(
        layer,
        esper_blending=layer.esper_blending._replace(**shown._asdict()),
        esper_anatomy=layer.esper_anatomy.shadow(nth),
    )


def graft_layer(layer: Any, graft: Graft) -> GraftedLayer:
    """A layer in its grafted form."""
    asarray = jax.numpy.asarray
    return GraftedLayer(  # pyright: ignore[reportCallIssue] (an abstract method, not a field)
        esper_host=layer,
        esper_kernels=dict(graft.kernels),
        esper_blending=jax.tree.map(asarray, graft.blending),
        esper_shadows=jax.tree.map(asarray, graft.shadows),
        esper_anatomy=graft.anatomy,
    )
