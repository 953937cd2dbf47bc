"""What a seed is: data.

`SeedState` is one structure of arrays for all seeds of a model. Only the pure
functions of `_transition` change it, and they return a new one. It is a jax
pytree, and its arrays may be numpy's (control state on the host, the usual
case) or jax's (inside a jitted program).
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from esper_functional._arrays import Array
from esper_functional._errors import KernelIdError
from esper_functional._lifecycle import SeedLifecycleState

NO_SLOT = -1
"""The kernel slot of a seed that holds no kernel."""


@dataclasses.dataclass(frozen=True)
class SeedState:
    """The state of every seed: 52 bytes each.

    All arrays share the leading axes, by convention `[layers, seeds]`; a
    single layer is `[1, seeds]`. The functions on it work for any axes.
    """

    stage: UInt8[Array, "*axes"]
    """`SeedLifecycleState`."""
    slot: Int32[Array, "*axes"]
    """Index of the seed's kernel in the table of kernels, or `NO_SLOT`."""
    kernel_id: Int32[Array, "*axes 2"]
    """First 63 bits of the artifact's SHA-256; zeros where there is none."""
    alpha: Float32[Array, "*axes"]
    """Blending coefficient in [0, 1]."""
    ramp_from: Float32[Array, "*axes"]
    """Alpha at the start of the ramp under way."""
    ramp_to: Float32[Array, "*axes"]
    """Alpha at its end."""
    ramp_start: Int32[Array, "*axes"]
    """The step at which the ramp began."""
    ramp_span: Int32[Array, "*axes"]
    """The ramp's length in steps; 0 when no ramp is under way."""
    ramp_shape: UInt8[Array, "*axes"]
    """The ramp's curve, `RampShape`; 0 when no ramp is under way."""
    health: Float32[Array, "*axes"]
    """Moving average of the health score in [0, 1]; NaN before the first."""
    latency: Float32[Array, "*axes"]
    """Moving average of the execution time in µs; NaN before the first."""
    last_update: Int32[Array, "*axes"]
    """The step of the last change of stage, alpha, health or error count."""
    error_count: Int32[Array, "*axes"]
    """Consecutive failures."""
    fallback: Bool[Array, "*axes"]
    """True where the seed does not run and the host stands in for it."""
    incubating: Bool[Array, "*axes"]
    """True where an ACTIVE seed at alpha 0 trains in a shadow of the forward pass alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The common leading axes."""
        return tuple(self.stage.shape)

    def replace(self, **changes: Any) -> "SeedState":
        """A copy with some arrays exchanged."""
        return dataclasses.replace(self, **changes)


FIELDS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(SeedState))


def _flatten_with_keys(state: SeedState) -> tuple[Any, None]:
    return [(jax.tree_util.GetAttrKey(n), getattr(state, n)) for n in FIELDS], None


def _unflatten(_: None, children: Any) -> SeedState:
    # Pytrees are rebuilt with placeholders for leaves (None, bools, shapes), so
    # the checked constructor is passed by.
    state = object.__new__(SeedState)
    for name, child in zip(FIELDS, children, strict=True):
        object.__setattr__(state, name, child)
    return state


jax.tree_util.register_pytree_with_keys(SeedState, _flatten_with_keys, _unflatten)


def init_seeds(*axes: int) -> SeedState:
    """All seeds dormant, in numpy, with leading axes `axes` (say layers, seeds)."""
    shape = tuple(axes)

    def zeros(dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    return SeedState(
        stage=zeros(np.uint8),
        slot=np.full(shape, NO_SLOT, np.int32),
        kernel_id=np.zeros((*shape, 2), np.int32),
        alpha=zeros(np.float32),
        ramp_from=zeros(np.float32),
        ramp_to=zeros(np.float32),
        ramp_start=zeros(np.int32),
        ramp_span=zeros(np.int32),
        ramp_shape=zeros(np.uint8),
        health=np.full(shape, np.nan, np.float32),
        latency=np.full(shape, np.nan, np.float32),
        last_update=zeros(np.int32),
        error_count=zeros(np.int32),
        fallback=zeros(np.bool_),
        incubating=zeros(np.bool_),
    )


def running(state: SeedState) -> Bool[Array, "*axes"]:
    """True where a seed's kernel runs: ACTIVE or FOSSILIZED, and not in fallback.

    A fossil that was folded into its host has no kernel any more (`NO_SLOT`).
    """
    active = state.stage == np.uint8(SeedLifecycleState.ACTIVE)
    fossil = state.stage == np.uint8(SeedLifecycleState.FOSSILIZED)
    return (active | (fossil & (state.slot >= 0))) & ~state.fallback


def kernel_id_words(kernel_id: str) -> tuple[int, int]:
    """The two int32 words under which `SeedState.kernel_id` keeps an artifact's id.

    Args:
        kernel_id: SHA-256 of the artifact, 64 hexadecimal digits; "" gives (0, 0).

    Raises:
        KernelIdError: for anything else.
    """
    if not kernel_id:
        return 0, 0
    digits = set("0123456789abcdef")
    if len(kernel_id) != 64 or not set(kernel_id) <= digits:
        raise KernelIdError(
            f"a kernel id is the 64 lower-case hexadecimal digits of a SHA-256; got {kernel_id!r}"
        )
    bits = int(kernel_id[:16], 16) >> 1
    high, low = bits >> 32, bits & 0xFFFFFFFF
    return high, low - (1 << 32) if low >= (1 << 31) else low


def state_digest(state: SeedState) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes of all arrays.

    Where all ramps are linear, their shapes have no part in it: ledgers that were written when
    there were no others hold such digests.
    """
    digest = hashlib.sha256()
    for name in FIELDS:
        array = np.ascontiguousarray(np.asarray(getattr(state, name)))
        if name == "ramp_shape" and not array.any():
            continue
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
