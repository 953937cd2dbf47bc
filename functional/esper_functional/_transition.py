"""The functions that change a `SeedState`.

Each takes a mask `where` of the seeds it concerns, works on any leading axes,
and is written once against the array API: immediate on numpy, jitted on jax.
What the lifecycle table forbids leaves the seed unchanged and is reported in a
mask; raising is left to the caller, who knows the layer's name.
"""

from typing import NamedTuple

import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float32, Int32

from esper_functional._arrays import Array, namespace
from esper_functional._lifecycle import FAILURES_TO_RECOVERY, LEGAL, SeedLifecycleState
from esper_functional._ramp import CURVES, RESOLUTION, SCALE, RampShape, ramp_shape
from esper_functional._state import NO_SLOT, SeedState, running

EMA_FACTOR = 0.1
"""Weight of a new observation in the moving averages of health and latency."""

_STAGES = len(SeedLifecycleState)
_LEGAL_FLAT = LEGAL.reshape(-1)


class Outcome(NamedTuple):
    """A new state, and a mask of the seeds for which the request was refused."""

    state: SeedState
    refused: Bool[Array, "*axes"]


def _is(state: SeedState, stage: SeedLifecycleState) -> Bool[Array, "*axes"]:
    return state.stage == np.uint8(stage)


def transition(
    state: SeedState,
    where: Bool[Array, "*axes"],
    target: SeedLifecycleState,
    *,
    step: int | Int32[Array, ""],
    slot: int | Int32[Array, "*axes"] = NO_SLOT,
    kernel_id: tuple[int, int] | Int32[Array, " words"] = (0, 0),
    alpha: float | Float32[Array, ""] = 0.0,
) -> Outcome:
    """Move the seeds in `where` to stage `target`, where the table allows it.

    Entering LOADING sets `slot` and `kernel_id`. Entering ACTIVE sets `alpha`
    and clears the error count and the fallback flag. Entering DORMANT clears
    everything but `last_update`. Entering FOSSILIZED ends a ramp where it
    stands: alpha is frozen.

    Args:
        step: the step at which the move takes effect, for `last_update`.
        slot: index of the kernel in the table of kernels.
        kernel_id: `kernel_id_words` of the artifact.
        alpha: the first alpha, in [0, 1]; any other is refused, NaN included.
    """
    xp = namespace(state.stage, where, step, slot, alpha)
    row = xp.astype(state.stage, xp.int32) * _STAGES + int(target)
    legal = xp.take(xp.asarray(_LEGAL_FLAT), row)
    if target == SeedLifecycleState.ACTIVE:
        first = xp.asarray(alpha, dtype=xp.float32)
        legal = legal & (first >= 0.0) & (first <= 1.0)
    move = where & legal
    stays_empty = target == SeedLifecycleState.DORMANT
    loads = target == SeedLifecycleState.LOADING
    activates = target == SeedLifecycleState.ACTIVE

    def moved(value: object, array: Array) -> Array:
        return xp.where(move, xp.asarray(value, dtype=array.dtype), array)

    changes: dict[str, Array] = {
        "stage": moved(int(target), state.stage),
        "last_update": moved(step, state.last_update),
        "ramp_span": moved(0, state.ramp_span),
        "ramp_shape": moved(0, state.ramp_shape),
        "ramp_start": moved(0, state.ramp_start),
        "ramp_from": moved(0.0, state.ramp_from),
        "ramp_to": moved(0.0, state.ramp_to),
        "incubating": moved(False, state.incubating),
    }
    if stays_empty or loads:
        words = xp.asarray(kernel_id if loads else (0, 0), dtype=xp.int32)
        changes |= {
            "slot": moved(slot if loads else NO_SLOT, state.slot),
            "kernel_id": xp.where(move[..., None], words, state.kernel_id),
            "alpha": moved(0.0, state.alpha),
            "health": moved(np.nan, state.health),
            "latency": moved(np.nan, state.latency),
        }
    if stays_empty or loads or activates:
        changes |= {
            "error_count": moved(0, state.error_count),
            "fallback": moved(False, state.fallback),
        }
    if activates:
        changes["alpha"] = moved(alpha, state.alpha)
    return Outcome(state.replace(**changes), where & ~legal)


def set_alpha(
    state: SeedState,
    where: Bool[Array, "*axes"],
    alpha: float | int | Float32[Array, "*axes"],
    *,
    step: int | Int32[Array, ""],
) -> Outcome:
    """Set the alpha of ACTIVE seeds, and end their ramps and their incubation.

    Refused, and unchanged: seeds that are not ACTIVE, and values that are not in
    [0, 1] (NaN included).
    """
    xp = namespace(state.stage, where, alpha, step)
    value = xp.asarray(alpha, dtype=xp.float32)
    allowed = _is(state, SeedLifecycleState.ACTIVE) & (value >= 0.0) & (value <= 1.0)
    hit = where & allowed
    now = xp.asarray(step, dtype=xp.int32)
    zero_f, zero_i = xp.asarray(0.0, dtype=xp.float32), xp.asarray(0, dtype=xp.int32)
    return Outcome(
        state.replace(
            alpha=xp.where(hit, value, state.alpha),
            ramp_from=xp.where(hit, zero_f, state.ramp_from),
            ramp_to=xp.where(hit, zero_f, state.ramp_to),
            ramp_start=xp.where(hit, zero_i, state.ramp_start),
            ramp_span=xp.where(hit, zero_i, state.ramp_span),
            ramp_shape=xp.where(hit, xp.asarray(0, dtype=xp.uint8), state.ramp_shape),
            incubating=state.incubating & ~hit,
            last_update=xp.where(hit, now, state.last_update),
        ),
        where & ~allowed,
    )


def start_ramp(
    state: SeedState,
    where: Bool[Array, "*axes"],
    target: float | int,
    span: int,
    *,
    step: int | Int32[Array, ""],
    shape: RampShape | int | str = RampShape.LINEAR,
) -> Outcome:
    """Let alpha run from where it is to `target` over `span` steps.

    `advance` moves it: alpha is unchanged at `step` and exactly `target` from
    `step + span` on. Refused: seeds that are not ACTIVE, a target outside [0, 1],
    a span below 1.

    Raises:
        KasminaException: for an unknown shape.
    """
    curve = ramp_shape(shape)
    xp = namespace(state.stage, where, step)
    allowed = _is(state, SeedLifecycleState.ACTIVE) & bool(0.0 <= target <= 1.0 and span >= 1)
    hit = where & allowed
    now = xp.asarray(step, dtype=xp.int32)
    return Outcome(
        state.replace(
            ramp_from=xp.where(hit, state.alpha, state.ramp_from),
            ramp_to=xp.where(hit, xp.asarray(target, dtype=xp.float32), state.ramp_to),
            ramp_start=xp.where(hit, now, state.ramp_start),
            ramp_span=xp.where(hit, xp.asarray(span, dtype=xp.int32), state.ramp_span),
            ramp_shape=xp.where(hit, xp.asarray(int(curve), dtype=xp.uint8), state.ramp_shape),
            incubating=state.incubating & ~hit,
            last_update=xp.where(hit, now, state.last_update),
        ),
        where & ~allowed,
    )


def incubate(
    state: SeedState, where: Bool[Array, "*axes"], *, step: int | Int32[Array, ""]
) -> Outcome:
    """Let ACTIVE seeds at alpha 0 train in a shadow forward before they are blended.

    Setting alpha or starting a ramp ends it. Refused: seeds that are not ACTIVE, that have
    an alpha above 0, or a ramp under way.
    """
    xp = namespace(state.stage, where, step)
    allowed = _is(state, SeedLifecycleState.ACTIVE) & (state.alpha == 0.0) & (state.ramp_span == 0)
    hit = where & allowed
    now = xp.asarray(step, dtype=xp.int32)
    return Outcome(
        state.replace(
            incubating=state.incubating | hit,
            last_update=xp.where(hit, now, state.last_update),
        ),
        where & ~allowed,
    )


def release(
    state: SeedState, where: Bool[Array, "*axes"], *, step: int | Int32[Array, ""]
) -> Outcome:
    """Take the kernels of FOSSILIZED seeds away, after they were folded into their hosts.

    The seeds stay FOSSILIZED, hold no slot, and run no more. Refused: all others.
    """
    xp = namespace(state.stage, where, step)
    allowed = _is(state, SeedLifecycleState.FOSSILIZED) & (state.slot >= 0)
    hit = where & allowed
    return Outcome(
        state.replace(
            slot=xp.where(hit, xp.asarray(NO_SLOT, dtype=xp.int32), state.slot),
            last_update=xp.where(hit, xp.asarray(step, dtype=xp.int32), state.last_update),
        ),
        where & ~allowed,
    )


def advance(state: SeedState, step: int | Int32[Array, ""]) -> SeedState:
    """Bring every alpha under a ramp to its value at `step`.

    Idempotent for one step, and independent of which steps were visited before:
    a resumed run meets the same alphas.
    """
    xp = namespace(state.stage, step)
    now = xp.asarray(step, dtype=xp.int32)
    ramping = state.ramp_span > 0
    span = xp.where(ramping, state.ramp_span, xp.asarray(1, dtype=xp.int32))
    elapsed = now - state.ramp_start
    done = ramping & (elapsed >= span)
    past = xp.astype(xp.clip(elapsed, 0, span), xp.float32)
    # The division stands between product and sum: a compiler that contracts the two into one
    # operation would round once where numpy rounds twice, and digests would differ.
    length = xp.astype(span, xp.float32)
    way = (state.ramp_to - state.ramp_from) * past / length
    curved = state.ramp_shape > 0
    if isinstance(curved, Tracer) or curved.any():
        place = xp.astype(xp.floor(past / length * float(RESOLUTION)), xp.int32)
        row = xp.astype(state.ramp_shape, xp.int32) * (RESOLUTION + 1)
        scaled = xp.take(xp.asarray(CURVES), row + place) * (state.ramp_to - state.ramp_from)
        way = xp.where(curved, scaled / SCALE, way)
    between = state.ramp_from + way
    alpha = xp.where(ramping, xp.where(done, state.ramp_to, between), state.alpha)
    zero_f, zero_i = xp.asarray(0.0, dtype=xp.float32), xp.asarray(0, dtype=xp.int32)
    end = state.ramp_start + span
    return state.replace(
        alpha=alpha,
        ramp_from=xp.where(done, zero_f, state.ramp_from),
        ramp_to=xp.where(done, zero_f, state.ramp_to),
        ramp_start=xp.where(done, zero_i, state.ramp_start),
        ramp_span=xp.where(done, zero_i, state.ramp_span),
        ramp_shape=xp.where(done, xp.asarray(0, dtype=xp.uint8), state.ramp_shape),
        last_update=xp.where(done, xp.maximum(end, state.last_update), state.last_update),
    )


def record_errors(
    state: SeedState,
    where: Bool[Array, "*axes"],
    count: int | Int32[Array, "*axes"],
    *,
    step: int | Int32[Array, "*#axes"],
) -> SeedState:
    """Set the consecutive failures of running seeds to `count`.

    From `FAILURES_TO_RECOVERY` on, a seed falls back to its host; an ACTIVE one
    moves to ERROR_RECOVERY (a FOSSILIZED one keeps its stage, as it must). Seeds
    that do not run are left alone.
    """
    xp = namespace(state.stage, where, count, step)
    hit = where & running(state)
    counts = xp.asarray(count, dtype=xp.int32)
    failed = hit & (counts >= FAILURES_TO_RECOVERY)
    recovers = failed & _is(state, SeedLifecycleState.ACTIVE)
    zero_i, zero_f = xp.asarray(0, dtype=xp.int32), xp.asarray(0.0, dtype=xp.float32)
    return state.replace(
        error_count=xp.where(hit, counts, state.error_count),
        fallback=state.fallback | failed,
        stage=xp.where(
            recovers,
            xp.asarray(int(SeedLifecycleState.ERROR_RECOVERY), dtype=xp.uint8),
            state.stage,
        ),
        ramp_span=xp.where(recovers, zero_i, state.ramp_span),
        ramp_start=xp.where(recovers, zero_i, state.ramp_start),
        ramp_from=xp.where(recovers, zero_f, state.ramp_from),
        ramp_to=xp.where(recovers, zero_f, state.ramp_to),
        incubating=state.incubating & ~recovers,
        last_update=xp.where(hit, xp.asarray(step, dtype=xp.int32), state.last_update),
    )


def record_error(
    state: SeedState, where: Bool[Array, "*axes"], *, step: int | Int32[Array, ""]
) -> SeedState:
    """Count one more consecutive failure of the running seeds in `where`."""
    return record_errors(state, where, state.error_count + 1, step=step)


def record_success(
    state: SeedState, where: Bool[Array, "*axes"], *, step: int | Int32[Array, ""]
) -> SeedState:
    """Count a finite step: the consecutive failures of running seeds start anew."""
    return record_errors(state, where, 0, step=step)


def moving_average(
    old: Float32[Array, "*axes"], new: Float32[Array, "*axes"], hit: Bool[Array, "*axes"]
) -> Float32[Array, "*axes"]:
    """The averages after new values, where `hit`: factor `EMA_FACTOR`, the first as it is."""
    xp = namespace(old, new, hit)
    factor = xp.asarray(EMA_FACTOR, dtype=xp.float32)
    # The select stands between product and sum, as the division in `advance` does.
    averaged = old + xp.where(hit & (new == new), factor * (new - old), xp.zeros_like(old))
    return xp.where(hit, xp.where(xp.isnan(old), new, averaged), old)


def observe_health(
    state: SeedState,
    where: Bool[Array, "*axes"],
    health: float | Float32[Array, "*axes"],
    *,
    step: int | Int32[Array, ""],
    latency: float | Float32[Array, "*axes"] | None = None,
) -> SeedState:
    """Take a health score in [0, 1], and a latency in µs, of running seeds into their averages.

    Factor `EMA_FACTOR`; the first observation is taken as is (the owner's
    telemetry rule). Observations that are not finite are passed over.
    """
    xp = namespace(state.stage, where, health, step, latency)

    def column(value: float | Array) -> Array:
        return xp.broadcast_to(xp.asarray(value, dtype=xp.float32), state.shape)

    score = column(health)
    where = where & running(state)
    hit = where & xp.isfinite(score)
    changes: dict[str, Array] = {
        "health": moving_average(state.health, score, hit),
        "last_update": xp.where(hit, xp.asarray(step, dtype=xp.int32), state.last_update),
    }
    observed = state.replace(**changes)
    return observed if latency is None else observe_latency(observed, where, latency)


def observe_latency(
    state: SeedState, where: Bool[Array, "*axes"], latency: float | Float32[Array, "*axes"]
) -> SeedState:
    """Take an execution time in µs of running seeds into their averages.

    As `observe_health` does; `last_update`, which no clock may move, stays as it is.
    """
    xp = namespace(state.stage, where, latency)
    time = xp.broadcast_to(xp.asarray(latency, dtype=xp.float32), state.shape)
    hit = where & running(state) & xp.isfinite(time)
    return state.replace(latency=moving_average(state.latency, time, hit))
