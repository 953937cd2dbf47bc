"""Laws of compiled steps: what they are keyed by, and who compiles them when."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import KernelSignature
from esper.errors import EsperError
from esper.execution import PlannedPrograms, count_compilations, load_jax_kernel
from esper.execution._background import COMPILER, SWITCH_INTERVAL, Work
from esper.tezzeret import compile_blueprint, load_blueprint
from esper_functional import (
    KernelMismatchError,
    gather,
    init_seeds,
    kernel_from_function,
    plan,
    run,
)
from tests.functional.networks import (
    SITES,
    batch,
    dense_kernel,
    fossilise,
    grafted_state,
    host_params,
    mlp,
)
from tests.tolerance import assert_bitwise

X = batch()
HOSTS = [host_params(seed) for seed in range(3)]
KERNELS = {0: dense_kernel(0), 1: dense_kernel(1), 2: dense_kernel(2, "out")}
DORMANT = plan(init_seeds(2, 3), {}, SITES)


def make_step(planned):
    def step(params, live, x):
        def loss(params, kernels):
            own = live and dataclasses.replace(live, params=kernels)
            y, after = run(mlp, planned, params, own, x)
            return jnp.mean(y**2), after

        kernels = live.params if live else ()
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, after), grads = gradient(params, kernels)
        params, kernels = jax.tree.map(lambda p, g: p - 0.1 * g, (params, kernels), grads)
        return params, after and dataclasses.replace(after, params=kernels)

    return step


def planned(state, kernels=KERNELS):
    own = plan(state, kernels, SITES)
    return own, gather(state, kernels, own)


ACTIVE, LIVE = planned(grafted_state((0, 0, 0, 0.5)))


@pytest.fixture(scope="module")
def exported():
    """A kernel of the library that fits the first layer."""
    signature = KernelSignature(input_shape=(3,), output_shape=(4,))
    return load_jax_kernel(compile_blueprint(load_blueprint("low_rank"), signature))


def instructions(compiled):
    """A program's text without the places in source files that it was traced from."""
    text = compiled.as_text()
    return re.sub(r",? ?metadata=\{[^}]*\}", "", text[text.index("\n%") :])


class Gate:
    """Builds steps, the one of a plan not before it is let."""

    def __init__(self, blocked=None):
        self.blocked = blocked
        self.begun, self.opened = threading.Event(), threading.Event()
        self.built = []

    def __call__(self, key):
        self.built.append((key, threading.current_thread().name))
        if key == self.blocked:
            self.begun.set()
            assert self.opened.wait(60)
        return make_step(key)


@pytest.fixture
def busy_compiler():
    """The background thread, held by somebody else's program until the test is over."""
    gate = Gate(DORMANT)
    with PlannedPrograms(gate) as others:
        others.prepare(DORMANT, HOSTS[0], None, X)
        assert gate.begun.wait(60)
        yield gate
        gate.opened.set()
        others.get(DORMANT, HOSTS[0], None, X)


WARM = PlannedPrograms(make_step)
JITTED = jax.jit(lambda planned, *args: make_step(planned)(*args), static_argnums=0)


@given(
    alpha=st.floats(0, 1, width=32),
    seed=st.integers(0, 2),
    slot=st.integers(0, 1),
    host=st.integers(0, 2),
)
def test_alphas_parameters_and_which_seed_runs_compile_nothing(alpha, seed, slot, host):
    WARM(ACTIVE, HOSTS[0], LIVE, X)
    JITTED(ACTIVE, HOSTS[0], LIVE, X)
    again, live = planned(grafted_state((0, seed, slot, alpha)))
    asked = WARM.compilations
    with count_compilations() as count:
        WARM.prepare(again, HOSTS[host], live, X)
        assert WARM.ready(again, HOSTS[host], live, X)
        ours = WARM(again, HOSTS[host], live, X)
        theirs = JITTED(again, HOSTS[host], live, X)
        assert count() == 0
    assert WARM.compilations == asked
    assert_bitwise(ours, theirs)


def test_a_life_takes_three_programs_and_a_second_life_none():
    programs = PlannedPrograms(make_step)

    def live_once(seed, slot):
        active = grafted_state((0, seed, slot, 0.3))
        for state in (init_seeds(2, 3), active, fossilise(active, 0, seed)):
            own, live = planned(state)
            programs.prepare(own, HOSTS[0], live, X)
            programs(own, HOSTS[0], live, X)

    with count_compilations() as count:
        live_once(0, 0)
        assert (programs.compilations, count()) == (3, 3)
        live_once(2, 1)
        assert (programs.compilations, count()) == (3, 3)
    assert [len(own.runs) for own in programs.known] == [0, 1, 1]


def test_a_training_step_with_a_kernel_of_the_library_compiles_once(exported):
    own, live = planned(grafted_state((0, 0, 0, 0.5)), {0: exported})
    params, step = HOSTS[0], PlannedPrograms(make_step)
    for _ in range(3):
        params, live = step(own, params, live, X)
    assert step.compilations == 1
    # What it gives is committed to a device, which plain jit takes for another argument.
    assert jax.tree.leaves(params)[0].committed
    params, live = jax.device_put((HOSTS[0], live), jax.devices()[0])
    jitted = jax.jit(make_step(own))
    for _ in range(3):
        params, live = jitted(params, live, X)
    assert jitted._cache_size() == 1


def test_compiled_in_the_background_is_the_same_program():
    gate = Gate(ACTIVE)
    with PlannedPrograms(gate) as behind, PlannedPrograms(Gate()) as here:
        behind.prepare(ACTIVE, HOSTS[0], LIVE, X)
        assert gate.begun.wait(60)  # `get` would compile what has not begun
        gate.opened.set()
        ours, theirs = (p.get(ACTIVE, HOSTS[0], LIVE, X) for p in (behind, here))
    assert gate.built == [(ACTIVE, "esper-compile")]
    assert instructions(ours) == instructions(theirs)
    assert_bitwise(ours(HOSTS[1], LIVE, X), theirs(HOSTS[1], LIVE, X))


def test_the_loop_trains_on_while_the_next_plan_compiles_and_swaps_at_a_boundary():
    gate = Gate(ACTIVE)

    def train(prepare):
        params, live = HOSTS[0], None
        with PlannedPrograms(gate if prepare else make_step) as programs:
            step = programs.get(DORMANT, params, None, X)
            if prepare:
                programs.prepare(ACTIVE, params, LIVE, X)
                assert gate.begun.wait(60)
            for _ in range(20):
                params, live = step(params, live, X)
            if prepare:
                # All of these steps ran while the compiler was held.
                assert not programs.ready(ACTIVE, params, LIVE, X)
                gate.opened.set()
            step, live = programs.get(ACTIVE, params, LIVE, X), LIVE
            assert programs.ready(ACTIVE, params, LIVE, X)
            for _ in range(20):
                params, live = step(params, live, X)
            assert programs.compilations == 2
        return params, live

    assert_bitwise(train(prepare=True), train(prepare=False))


def test_what_has_not_begun_is_compiled_by_who_needs_it(busy_compiler):
    gate = Gate()
    with PlannedPrograms(gate) as programs:
        programs.prepare(ACTIVE, HOSTS[0], LIVE, X)
        assert not programs.ready(ACTIVE, HOSTS[0], LIVE, X)
        programs(ACTIVE, HOSTS[0], LIVE, X)
        assert programs.compilations == 1
    assert gate.built == [(ACTIVE, threading.current_thread().name)]
    assert not busy_compiler.opened.is_set()


def test_eight_threads_that_want_one_program_compile_it_once():
    at_once = threading.Barrier(8)
    got = []

    def want(programs):
        at_once.wait(60)
        programs.prepare(ACTIVE, HOSTS[0], LIVE, X)
        got.append(programs.get(ACTIVE, HOSTS[0], LIVE, X))

    with PlannedPrograms(make_step) as programs, count_compilations() as count:
        threads = [threading.Thread(target=want, args=(programs,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (programs.compilations, count()) == (1, 1)
    assert len(got) == 8
    assert len(set(map(id, got))) == 1


def test_the_background_holds_the_interpreter_for_shorter_and_gives_all_of_it_back():
    gc.unfreeze()  # as the tests around this one leave it
    before = sys.getswitchinterval()
    seen: list[tuple[float, int]] = []
    work = Work(lambda: seen.append((sys.getswitchinterval(), gc.get_freeze_count())))
    COMPILER.submit(work)
    work.result.result(timeout=60)
    ((interval, frozen),) = seen
    assert interval == pytest.approx(SWITCH_INTERVAL, abs=2e-6)
    assert frozen > 0
    deadline = time.monotonic() + 60
    while gc.get_freeze_count() or sys.getswitchinterval() < before - 2e-6:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_closing_gives_up_what_has_not_begun(busy_compiler):
    gate = Gate()
    with PlannedPrograms(gate) as programs:
        step = programs.get(DORMANT, HOSTS[0], None, X)
        programs.prepare(ACTIVE, HOSTS[0], LIVE, X)
    programs.close()
    busy_compiler.opened.set()
    with PlannedPrograms(make_step) as after:
        after.prepare(ACTIVE, HOSTS[0], LIVE, X)
        after.get(ACTIVE, HOSTS[0], LIVE, X)
    assert [key for key, _ in gate.built] == [DORMANT]
    assert not programs.ready(DORMANT, HOSTS[0], None, X)
    for ask in (programs.get, programs.prepare, programs):
        with pytest.raises(EsperError, match="closed and compile nothing more: close them when"):
            ask(DORMANT, HOSTS[0], None, X)
    assert_bitwise(step(HOSTS[1], None, X), JITTED(DORMANT, HOSTS[1], None, X))


# Errors


def narrow(params, x):
    return x


@pytest.mark.parametrize("prepared", [False, True])
def test_an_error_surfaces_as_itself_and_is_tried_again(prepared):
    kernels = {0: kernel_from_function(narrow, {})}
    own, live = planned(grafted_state((0, 0, 0, 0.5)), kernels)
    with PlannedPrograms(make_step) as programs:
        if prepared:
            programs.prepare(own, HOSTS[0], live, X)
        for _ in range(2):
            with pytest.raises(KernelMismatchError, match="returned float32"):
                programs.get(own, HOSTS[0], live, X)
        assert programs.compilations == 2


def test_what_failed_may_succeed_the_next_time():
    left = [ValueError("the first time"), KeyboardInterrupt()]

    def build(planned):
        if left:
            raise left.pop(0)
        return make_step(planned)

    with PlannedPrograms(build) as programs:
        with pytest.raises(ValueError, match="the first time"):
            programs.get(DORMANT, HOSTS[0], None, X)
        with pytest.raises(KeyboardInterrupt):
            programs.get(DORMANT, HOSTS[0], None, X)
        assert not programs.ready(DORMANT, HOSTS[0], None, X)
        programs(DORMANT, HOSTS[0], None, X)
        assert programs.compilations == 3


def test_an_interrupted_thread_leaves_the_program_to_those_who_wait():
    begun, go = threading.Event(), threading.Event()
    got = []

    def build(planned):
        if not begun.is_set():
            begun.set()
            assert go.wait(60)
            raise KeyboardInterrupt
        return make_step(planned)

    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            programs.get(DORMANT, HOSTS[0], None, X)

    with PlannedPrograms(build) as programs:
        first = threading.Thread(target=interrupted)
        first.start()
        assert begun.wait(60)
        second = threading.Thread(
            target=lambda: got.append(programs.get(DORMANT, HOSTS[0], None, X))
        )
        second.start()
        go.set()
        first.join()
        second.join()
        assert got == [programs.get(DORMANT, HOSTS[0], None, X)]


def test_arguments_that_are_no_arrays():
    with PlannedPrograms(make_step) as programs:
        for ask in (programs.prepare, programs.ready, programs.get, programs):
            with pytest.raises(
                TypeError, match=r"args\[1\]\['mode'\] .* is a str: expected an arr"
            ):
                ask(DORMANT, HOSTS[0], {"mode": "train"}, X)
        with pytest.raises(EsperError, match="inside jit, grad or vmap: ask outside"):
            jax.jit(lambda x: programs(DORMANT, HOSTS[0], None, x))(X)
        assert programs.compilations == 0


# Keys


def double(key):
    return lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree)


def test_the_type_of_arguments_is_the_key_and_their_values_are_not():
    same = [jnp.ones(3), jnp.zeros(3), np.ones(3, np.float32), jax.ShapeDtypeStruct((3,), "f4")]
    same += [np.ones(3)]  # float64 is float32 to jax, here
    same += [jax.device_put(jnp.ones(3), jax.devices()[0])]
    other = [jnp.ones(4), jnp.ones(3, jnp.int32), np.ones((3, 1), np.float32)]
    other += [2.0, jnp.float32(2), [jnp.ones(3)], {"a": jnp.ones(3)}, None, jax.random.key(0)]
    with PlannedPrograms(lambda key: lambda tree: tree) as programs:
        for tree in same:
            programs.get("identity", tree)
            assert programs.compilations == 1
        for i, tree in enumerate(other):
            programs.get("identity", tree)
            assert programs.compilations == 2 + i
        for tree in same + other:
            programs.get("identity", tree)
        assert programs.compilations == 1 + len(other)
        programs.get("another", jnp.ones(3))
        assert programs.compilations == 2 + len(other)


@pytest.mark.parametrize("value", [2.5, 2, True, np.float64(2.5), np.arange(3), np.int64(7)])
def test_numpy_arrays_and_numbers_of_python_give_what_jit_gives(value):
    with PlannedPrograms(double) as programs:
        ours, theirs = programs(0, value), jax.jit(double(0))(value)
        assert_bitwise(ours, theirs)
        assert ours.weak_type == theirs.weak_type


def test_a_live_part_of_numpy_arrays_runs_the_program_of_one_on_the_device():
    moved = jax.tree.map(jnp.asarray, LIVE)
    assert any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(LIVE))
    with PlannedPrograms(make_step) as programs:
        step = programs.get(ACTIVE, HOSTS[0], moved, X)
        assert step is programs.get(ACTIVE, HOSTS[0], LIVE, X)
        assert_bitwise(step(HOSTS[0], LIVE, X), step(HOSTS[0], moved, X))


def test_settings_of_the_asking_thread_are_in_force_in_the_background():
    def promote(key):
        return lambda tree: tree["a"] + tree["b"]

    mixed = {"a": np.ones(3, np.int32), "b": np.ones(3, np.float32)}
    with PlannedPrograms(promote) as programs:
        with jax.numpy_dtype_promotion("standard"):
            programs.prepare("sum", mixed)
        with pytest.raises(ValueError, match="promotion path"):
            programs.get("sum", mixed)
        with jax.numpy_dtype_promotion("standard"):
            assert_bitwise(programs("sum", mixed), np.full(3, 2, np.float32))
        assert programs.compilations == 2
        with jax.default_matmul_precision("float32"):
            assert not programs.ready("sum", mixed)


def test_a_donated_argument_is_deleted_by_the_call_and_not_by_preparing():
    def ramp(key):
        return lambda params, step: params + step

    step = jnp.float32(1)
    for donated, gone in (((), False), (0, True), ((0,), True)):
        params = jnp.arange(4, dtype=jnp.float32)
        with PlannedPrograms(ramp, donate_argnums=donated) as programs:
            programs.prepare("ramp", params, step)
            compiled = programs.get("ramp", params, step)
            assert not params.is_deleted()
            params_after = compiled(params, step)
            assert params.is_deleted() == gone
            # The next plan can be prepared from what is gone: its type is not.
            assert programs.ready("ramp", params, step)
            assert_bitwise(compiled(params_after, step), np.arange(2, 6, dtype=np.float32))


@pytest.mark.parametrize("warm_up", [False, True])
def test_warming_up_runs_once_on_zeros_and_changes_no_result(warm_up):
    ran = []

    def tell(key):
        def step(x, random=None):
            jax.debug.callback(lambda seen: ran.append(seen.copy()), x)
            return x / x

        return step

    x = jnp.arange(1, 4, dtype=jnp.float32)
    with (
        PlannedPrograms(tell, warm_up=warm_up, donate_argnums=0) as programs,
        count_compilations() as count,
        jax.debug_nans(True),
    ):
        step = programs.get("tell", x)
        # The background's effects are its own thread's to wait for.
        deadline = time.monotonic() + 60
        while len(ran) < warm_up and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(ran) == warm_up
        assert not np.any(ran)
        programs.get("tell", x)
        programs.get("tell", x, jax.random.key(0))
        jax.effects_barrier()
        assert len(ran) == warm_up
        assert not x.is_deleted()
        assert (programs.compilations, count()) == (2, 2)
        assert_bitwise(step(x), np.ones(3, np.float32))


SHARDING = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from esper.execution import PlannedPrograms, count_compilations

devices = jax.devices()
assert len(devices) == 4

def make_step(key):
    return lambda w, x: (w - 0.1 * jnp.mean(x, axis=0), x + 1.0)

w, x = jnp.ones(4), jnp.ones((8, 4))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    with PlannedPrograms(make_step, warm_up=True) as programs:
        programs("step", w, x)
        ws, xs = jax.device_put(w, whole), jax.device_put(x, split)
        # The type alone, with its sharding, prepares what the array will need.
        programs.prepare("step", ws, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split))
        step = programs.get("step", ws, xs)
        assert programs.compilations == 2
        assert step.input_shardings[0][1].is_equivalent_to(split, 2), step.input_shardings
        # Results come back in equivalent shardings, and ask for nothing new.
        for _ in range(3):
            with count_compilations() as count:
                ws, xs = programs("step", ws, xs)
            assert (programs.compilations, count()) == (2, 0), xs.sharding
        same = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        assert programs.get("step", ws, same) is step
        assert programs.get("step", ws, jax.device_put(x, whole)) is not step
        assert programs.compilations == 3
        for i in (1, 2):
            moved = [jax.device_put(a, devices[i]) for a in (w, x)]
            assert programs("step", *moved)[0].devices() == {devices[i]}
            assert programs.compilations == 3 + i
        with jax.set_mesh(mesh):
            programs.prepare("step", w, x)
            ours, theirs = programs("step", w, x), jax.jit(make_step("step"))(w, x)
            assert [o.sharding for o in ours] == [t.sharding for t in theirs]
        assert programs.compilations == 6
        with jax.default_device(devices[3]):
            assert programs("step", w, x)[0].devices() == {devices[3]}
print("done")
"""


def in_a_process_of_its_own(script, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_shardings_are_part_of_the_key():
    flags = "--xla_force_host_platform_device_count=4"
    done = in_a_process_of_its_own(SHARDING, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert done.stdout.strip() == "done"


LEAVING = """
import atexit, threading
import jax, jax.numpy as jnp
from esper.execution import PlannedPrograms

begun = threading.Event()

def build(key):
    begun.set()
    print("built", key)
    def step(x):
        for i in range(50):
            x = jnp.tanh(x @ x + i)
        return x
    return step

atexit.register(print, "left")
programs = PlannedPrograms(build)
for key in range(5):
    programs.prepare(key, jax.ShapeDtypeStruct((8, 8), "f4"))
assert begun.wait(60)
"""


def test_a_process_that_ends_finishes_one_program_and_leaves_those_behind_it():
    done = in_a_process_of_its_own(LEAVING, JAX_PLATFORMS="cpu")
    assert done.stderr == ""
    first, *others, last = done.stdout.split()[1:]
    assert (first, last) == ("0", "left")
    assert "4" not in others


# Counting


def test_the_counter_counts_all_threads_until_its_block_ends():
    def compile_one():
        with PlannedPrograms(make_step) as programs:
            programs.get(DORMANT, HOSTS[0], None, X)

    with count_compilations() as outer:
        compile_one()
        assert outer() == 1
        with count_compilations() as inner:
            thread = threading.Thread(target=compile_one)
            thread.start()
            thread.join()
        compile_one()
        assert (inner(), outer()) == (1, 3)
    compile_one()
    assert (inner(), outer()) == (1, 3)


def test_importing_esper_execution_starts_nothing():
    script = "import sys, esper.execution; print('esper.execution._programs' in sys.modules)"
    assert in_a_process_of_its_own(script).stdout.strip() == "False"
