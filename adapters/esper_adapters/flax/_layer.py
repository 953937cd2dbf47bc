"""A Flax NNX layer with the kernels that run on it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from esper_adapters._graft import Blending, Graft, Shadow, run_graft


class FossilParam(nnx.Variable[Any]):
    """A parameter of a kernel that does not train: a fossil's, or an integer.

    Not an `nnx.Param`, so no optimiser of those touches it.
    """


class BlendData(nnx.Variable[Any]):
    """Blend weights and failure counts: data that the seed state decides."""


class StandIn(nnx.Module):
    """A module in a layer's place, which has all of its attributes."""

    esper_host: nnx.Module

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "esper_")):
            raise AttributeError(name)
        return getattr(self.esper_host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is set on a layer, such as `deterministic` by `model.eval()`, is meant for the host.
        own = name.startswith(("_", "esper_"))
        super().__setattr__(name, value) if own else setattr(self.esper_host, name, value)


class GraftedLayer(StandIn):
    """Any NNX layer, its output blended with its running kernels'.

    Takes and returns what its host does; the kernels see the first argument. Parameters of
    kernels are `nnx.Param`, those of fossils `FossilParam`. What it has no attribute for, its
    host is asked for.
    """

    def __init__(self, layer: nnx.Module, graft: Graft) -> None:
        self.esper_host = layer
        frozen = {
            seed: run.frozen
            for seed, run in zip(graft.anatomy.seeds, graft.anatomy.runs, strict=True)
        }
        kernels: dict[int, Any] = {}
        structures: list[tuple[int, tuple[str, ...], Any]] = []
        for seed, params in graft.kernels.items():
            leaves, structure = jax.tree.flatten(params)
            names = _leaf_names(params)
            kernels[seed] = {
                name: _variable(leaf, frozen[seed])
                for name, leaf in zip(names, leaves, strict=True)
            }
            structures.append((seed, names, structure))
        self.esper_kernels = nnx.data(kernels)
        self.esper_structures = tuple(structures)
        self.esper_blending = nnx.data(
            {
                "now": [BlendData(jnp.asarray(value)) for value in graft.blending],
                "shadows": [
                    [BlendData(jnp.asarray(value)) for value in shadow] for shadow in graft.shadows
                ],
            }
        )
        self.esper_anatomy = graft.anatomy

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the host returns, grafted."""
        layer: Any = self.esper_host
        result = layer(*args, **options)
        return run_graft(
            self.esper_anatomy, kernel_params(self), blending_of(self), result, args, options
        )


def blending_of(layer: GraftedLayer) -> Blending:
    """Its blend weights and failure counts, as arrays."""
    return Blending(*(value[...] for value in layer.esper_blending["now"]))


def kernel_params(layer: GraftedLayer) -> dict[int, Any]:
    """Parameters by seed, as plain trees of arrays."""
    return {
        seed: jax.tree.unflatten(
            structure, [layer.esper_kernels[seed][name][...] for name in names]
        )
        for seed, names, structure in layer.esper_structures
    }


def _leaf_names(params: Any) -> tuple[str, ...]:
    """Dotted paths, or where those are not unique, jax's own."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = tuple(jax.tree_util.keystr(path, simple=True, separator=".") for path in paths)
    return names if len(set(names)) == len(names) else tuple(map(jax.tree_util.keystr, paths))


def _variable(leaf: Any, frozen: bool) -> nnx.Variable[Any]:
    value = jnp.asarray(leaf)
    trains = jnp.issubdtype(value.dtype, jnp.inexact) and not frozen
    return nnx.Param(value) if trains else FossilParam(value)


def show_shadow(layer: GraftedLayer, nth: int) -> None:
    """Let it become what it is while the model's nth incubating kernel is at alpha 1."""
    shown = Shadow(*(value[...] for value in layer.esper_blending["shadows"][nth]))
    host_weight, weights, _ = layer.esper_blending["now"]
    host_weight[...], weights[...] = shown.host_weight, shown.weights
    layer.esper_anatomy = layer.esper_anatomy.shadow(nth)
