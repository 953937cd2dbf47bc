"""Whether training left alone what does not train."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_adapters._graft import Graft
from esper_adapters._surgery import Stripped
from esper_functional import KasminaException


def check_frozen(
    grafts: Mapping[str, Graft], stripped: Stripped, row_of: Callable[[str], int]
) -> None:
    """Refuse a trained network in which blend weights or fossils are others than before.

    Args:
        grafts: by layer, as they were before.
        stripped: the network after it.
        row_of: a layer's row, by any of its names: a shared layer may go by another in
            `stripped` than in `grafts`.

    Raises:
        KasminaException: for the first layer in which something moved.
    """
    blending = {row_of(name): own for name, own in stripped.blending.items()}
    kernels = {row_of(name): own for name, own in stripped.kernels.items()}
    for name, graft in grafts.items():
        row = row_of(name)
        moved: list[str] = []
        if not _equal(graft.blending, blending[row]):
            moved.append("the blend weights")
        for seed, run in zip(graft.anatomy.seeds, graft.anatomy.runs, strict=True):
            if run.frozen and not _equal(graft.kernels[seed], kernels[row][seed]):
                moved.append(f"the fossil of seed {seed}")
        if moved:
            raise KasminaException(
                f"with_module: {' and '.join(moved)} of layer {name!r} moved in training, and"
                " they are none of an optimiser's (weight decay moves what has no gradient):"
                " train by esper_adapters.optax.freeze(optimizer, trainable), or update by"
                " eqx.partition(module, trainable(module)) what trains alone"
            )


def _equal(own: Any, other: Any) -> bool:
    """Whether two trees of one structure hold the same numbers; NaN is equal to itself."""
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True)
    return all(a is b or _same(_numbers(a), _numbers(b)) for a, b in pairs)


def _same(own: np.ndarray, other: np.ndarray) -> bool:
    # By value: adding an update of zero makes -0.0 of a frozen parameter +0.0.
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    return bool(np.all((own == other) | ((own != own) & (other != other))))


def _numbers(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)
