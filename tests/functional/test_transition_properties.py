"""Random operations on random states: one meaning on numpy, on jax, on any axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    Outcome,
    SeedLifecycleState,
    SeedState,
    advance,
    incubate,
    init_seeds,
    observe_health,
    record_error,
    record_errors,
    record_success,
    release,
    set_alpha,
    start_ramp,
    state_digest,
    transition,
)
from tests.tolerance import assert_bitwise, assert_tree_close

SHAPE = (3, 4)
STACK = (2, *SHAPE)
RAMPS = {"ramp_up": (1.0, 7), "ramp_half": (0.5, 1), "ramp_refused": (1.5, 4)}


def _operations() -> dict[str, Callable[..., Any]]:
    """Each takes (state, where, step, value, count) and uses what it needs."""
    table: dict[str, Callable[..., Any]] = {
        "record_errors": lambda s, w, t, v, n: record_errors(s, w, n, step=t),
        "record_error": lambda s, w, t, v, n: record_error(s, w, step=t),
        "record_success": lambda s, w, t, v, n: record_success(s, w, step=t),
        "set_alpha": lambda s, w, t, v, n: set_alpha(s, w, v, step=t),
        "advance": lambda s, w, t, v, n: advance(s, t),
        "incubate": lambda s, w, t, v, n: incubate(s, w, step=t),
        "release": lambda s, w, t, v, n: release(s, w, step=t),
        "observe_health": lambda s, w, t, v, n: observe_health(s, w, v, step=t, latency=v * 100),
    }
    for name, (target, span) in RAMPS.items():
        table[name] = lambda s, w, t, v, n, to=target, over=span: start_ramp(s, w, to, over, step=t)
    for stage in SeedLifecycleState:
        table[f"to_{stage.name}"] = lambda s, w, t, v, n, to=stage: transition(
            s, w, to, step=t, slot=n, kernel_id=(17, -4), alpha=0.25
        )
    return table


OPERATIONS = _operations()
JITTED = {name: jax.jit(function) for name, function in OPERATIONS.items()}

sequences = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=8,
)
seeds = st.integers(0, 2**32 - 1)


def random_state(seed: int, shape: tuple[int, ...]) -> SeedState:
    """Any values that the dtypes allow within their ranges, reachable or not."""
    random = np.random.default_rng(seed)

    def ints(low: int, high: int, dtype: Any = np.int32, axes: Any = shape) -> np.ndarray:
        return random.integers(low, high, axes).astype(dtype)

    def floats(gaps: bool = False) -> np.ndarray:
        values = random.random(shape, np.float32)
        return np.where(random.random(shape) < 0.3, np.float32(np.nan), values) if gaps else values

    return SeedState(
        stage=ints(0, 5, np.uint8),
        slot=ints(-1, 9),
        kernel_id=ints(-(2**31), 2**31 - 1, axes=(*shape, 2)),
        # Some at exactly 0, where a seed may incubate.
        alpha=np.where(random.random(shape) < 0.4, np.float32(0.0), floats()),
        ramp_from=floats(),
        ramp_to=floats(),
        ramp_start=ints(0, 20),
        ramp_span=np.where(random.random(shape) < 0.5, 0, ints(0, 8)).astype(np.int32),
        ramp_shape=ints(0, 3).astype(np.uint8),
        health=floats(gaps=True),
        latency=floats(gaps=True),
        last_update=ints(0, 20),
        error_count=ints(0, 4),
        fallback=random.random(shape) < 0.2,
        incubating=random.random(shape) < 0.3,
    )


def operands(seed: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Mask, step, values (some outside [0, 1], some NaN) and counts."""
    random = np.random.default_rng(seed)
    where = random.random(shape) < random.choice([0.1, 0.5, 1.0])
    value = random.uniform(-0.3, 1.3, shape).astype(np.float32)
    value = np.where(random.random(shape) < 0.1, np.float32(np.nan), value)
    step = np.asarray(random.integers(0, 30), np.int32)
    return where, step, value, random.integers(0, 5, shape).astype(np.int32)


def state_of(result: Any) -> SeedState:
    return result.state if isinstance(result, Outcome) else result


def described(state: SeedState) -> list[tuple[np.dtype, tuple[int, ...]]]:
    return [(np.dtype(leaf.dtype), tuple(leaf.shape)) for leaf in jax.tree.leaves(state)]


@given(seeds, sequences)
def test_numpy_equals_jitted_jax(seed, sequence):
    ours = random_state(seed, SHAPE)
    theirs = jax.tree.map(jnp.asarray, ours)
    for name, draw in sequence:
        args = operands(draw, SHAPE)
        left, right = OPERATIONS[name](ours, *args), JITTED[name](theirs, *args)
        assert_tree_close(right, left)
        ours, theirs = state_of(left), state_of(right)


@given(seeds, sequences)
def test_dtypes_and_size_never_change_and_the_argument_is_untouched(seed, sequence):
    state = random_state(seed, SHAPE)
    expected = described(init_seeds(*SHAPE))
    for name, draw in sequence:
        for leaf in jax.tree.leaves(state):
            leaf.setflags(write=False)
        before = state_digest(state)
        result = OPERATIONS[name](state, *operands(draw, SHAPE))
        assert state_digest(state) == before
        state = state_of(result)
        assert described(state) == expected
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 100 * 12
        if isinstance(result, Outcome):
            assert (result.refused.dtype, result.refused.shape) == (np.bool_, SHAPE)


@given(seeds, sequences)
def test_a_stack_equals_each_of_its_slices(seed, sequence):
    stack = random_state(seed, STACK)
    slices = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(STACK[0])]
    for name, draw in sequence:
        where, step, value, count = operands(draw, STACK)
        whole = OPERATIONS[name](stack, where, step, value, count)
        parts = [
            OPERATIONS[name](s, where[i], step, value[i], count[i]) for i, s in enumerate(slices)
        ]
        for i, part in enumerate(parts):
            assert_bitwise(jax.tree.map(lambda a, i=i: a[i], whole), part)
        stack, slices = state_of(whole), [state_of(part) for part in parts]


@given(seeds, sequences)
def test_seeds_outside_the_mask_keep_every_byte(seed, sequence):
    state = random_state(seed, SHAPE)
    # `advance` has no mask: it concerns every ramp.
    for name, draw in [pair for pair in sequence if pair[0] != "advance"]:
        args = operands(draw, SHAPE)
        after = state_of(OPERATIONS[name](state, *args))
        outside = ~args[0]
        assert_bitwise(
            jax.tree.map(lambda a, m=outside: a[m], after),
            jax.tree.map(lambda a, m=outside: a[m], state),
        )
        state = after


@settings(max_examples=4)
@given(seeds, sequences)
def test_vmap_over_a_population_equals_the_stack(seed, sequence):
    population = jax.tree.map(jnp.asarray, random_state(seed, STACK))
    name, draw = sequence[0]
    where, step, value, count = operands(draw, STACK)
    mapped = jax.vmap(OPERATIONS[name], in_axes=(0, 0, None, 0, 0))(
        population, where, step, value, count
    )
    assert_tree_close(mapped, JITTED[name](population, where, step, value, count))


@given(seeds, sequences)
def test_alpha_stays_in_its_range_and_stages_are_stages(seed, sequence):
    state = random_state(seed, SHAPE)
    for name, draw in sequence:
        state = state_of(OPERATIONS[name](state, *operands(draw, SHAPE)))
        assert ((state.alpha >= 0.0) & (state.alpha <= 1.0)).all()
        assert np.isin(state.stage, list(SeedLifecycleState)).all()
